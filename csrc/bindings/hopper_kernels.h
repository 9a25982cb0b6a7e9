// The launches of the kernels of compute capability 9.0: what csrc/bindings/cuda_module.cpp calls.
#pragma once

#include "../cuda/args.h"
#include "../cuda/hopper_args.h"

namespace zsl {

// (parts, examples, positions, features) two-byte numbers; strides in elements, that of features being 1.
struct MappedTensor {
  const void* data;
  uint64_t parts, examples, positions, features;
  uint64_t part, example, position;  // strides
};

// slab: 0 none, 1 bfloat16, 2 float32. Two launches where there are parts or scalars, which the second adds up.
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
