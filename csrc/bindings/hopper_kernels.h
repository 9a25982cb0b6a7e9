// Declares the launch functions of the kernels for compute capability 9.0, which csrc/bindings/cuda_module.cpp calls.
#pragma once

#include "../cuda/args.h"
#include "../cuda/hopper_args.h"

namespace zsl {

// A (parts, examples, positions, features) tensor of two-byte numbers. Strides are in elements, and the stride of features is 1.
struct MappedTensor {
  const void* data;
  uint64_t parts, examples, positions, features;
  uint64_t part, example, position;  // strides
};

// slab: 0 for none, 1 for bfloat16, 2 for float32. If there are parts or scalars, a second launch adds them.
void launch_hopper(Element element, int slab, Fold fold, const MappedTensor& a, const MappedTensor& b,
                   const HopperOperands& operands, const HopperSchedule& schedule, const HopperResults& results,
                   const HopperAdded& added, uintptr_t stream);

struct Pack {
  Operand from;
  Element element;
  int64_t examples, positions;
  const int64_t* begin;
  const int* first_step;
  int64_t features, pitch, part;
  bool with_low;
  void* to;
};
void launch_pack(const Pack& pack, unsigned blocks, uintptr_t stream);

}  // namespace zsl
