// Declares the CPU ops that other bindings call directly, without torch's dispatcher.
//
// Their contracts are those of the zsl_cpu ops with the same names.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "workers.h"

namespace zsl {

// grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, gram. A tensor that was not requested is undefined.
using Sums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Sums interference(const Tensor& a, const Tensor& b, const OptionalTensor& direction, bool gram, int64_t tile_o, int64_t tile_k,
                  const OptionalTensor& begin, const OptionalTensor& added_begin, const OptionalTensor& added_index,
                  const OptionalTensor& added_values);

// Returns a (weights, 8) tensor: the sums over coordinates of each weight, with an optional direction.
Tensor coordinate_sums_of_many(const std::vector<std::pair<const Sums*, OptionalTensor>>& weights);

Sums dense_interference(const Tensor& g, const OptionalTensor& direction, bool gram);

std::tuple<Tensor, Tensor> scale_bias_grad(const OptionalTensor& x, const Tensor& b, const OptionalTensor& mean,
                                           const OptionalTensor& rstd, const OptionalTensor& example_ids, int64_t num_examples,
                                           bool bias);

}  // namespace zsl
