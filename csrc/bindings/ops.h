// The kernels' ops that other bindings call without a dispatch. Their contracts are those of zsl_cpu's ops of the same names.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "workers.h"

namespace zsl {

// grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, gram; undefined if not asked for.
using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Sums interference(const Tensor& a, const Tensor& b, const OptionalTensor& direction, bool gram, int64_t tile_o, int64_t tile_k,
                  const OptionalTensor& begin, const OptionalTensor& added_begin, const OptionalTensor& added_index,
                  const OptionalTensor& added_values);

// (weights, 8): the sums over coordinates of each, along a direction or none.
Tensor coordinate_sums_of_many(const std::vector<std::pair<const Sums*, OptionalTensor>>& weights);

Sums dense_interference(const Tensor& g, const OptionalTensor& direction, bool gram);

std::tuple<Tensor, Tensor> scale_bias_grad(const OptionalTensor& x, const Tensor& b, const OptionalTensor& mean,
                                           const OptionalTensor& rstd, const OptionalTensor& example_ids, int64_t num_examples,
                                           bool bias);

}  // namespace zsl
