// Declares the launch functions of the row kernels and of the Gram matrix of slabs, which csrc/bindings/cuda_module.cpp calls.
#pragma once

#include "../cuda/row_args.h"

namespace zsl {

// The grid has `blocks` blocks of coordinates and `parts` parts of the examples.
void launch_dense(Element element, const DenseArgs& args, unsigned blocks, unsigned parts, uintptr_t stream);

// `parts` is the number of parts of each example's positions. If x.data is null, `x_element` is ignored.
void launch_scale_bias(Element x_element, Element b_element, const ScaleBiasArgs& args, unsigned parts, uintptr_t stream);

// Takes at most `partials_at_once` sets. This function sets their `blocks`.
void launch_add_partials(AddPartialsArgs args, uintptr_t stream);

// Computes (blocks, x_rows, y_rows) partial products of slabs. If y is null, it multiplies x by itself and computes only the
// products on and above the diagonal.
struct SlabGram {
  const void *x, *y;
  bool bfloat16;
  int64_t x_rows, y_rows, elements;
  double* pairs;
  bool add;
};
void launch_slab_gram(const SlabGram& args, unsigned blocks, uintptr_t stream);

}  // namespace zsl
