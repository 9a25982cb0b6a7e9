// The launches of the row kernels, and of the Gram of gradients in slabs: what csrc/bindings/cuda_module.cpp calls.
#pragma once

#include "../cuda/row_args.h"

namespace zsl {

// `blocks` of coordinates, `parts` of the examples.
void launch_dense(Element element, const DenseArgs& args, unsigned blocks, unsigned parts, uintptr_t stream);

// `parts` of each example's positions. With x.data null `x_element` is not read.
void launch_scale_bias(Element x_element, Element b_element, const ScaleBiasArgs& args, unsigned parts, uintptr_t stream);

// Of at most `partials_at_once`; their `blocks` are set here.
void launch_add_partials(AddPartialsArgs args, uintptr_t stream);

// (blocks, x_rows, y_rows) partial products of slabs; y null: of x with itself, on and above the diagonal.
struct SlabGram {
  const void *x, *y;
  bool bfloat16;
  int64_t x_rows, y_rows, elements;
  double* pairs;
  bool add;
};
void launch_slab_gram(const SlabGram& args, unsigned blocks, uintptr_t stream);

}  // namespace zsl
