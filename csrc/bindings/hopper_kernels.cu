// Launches the kernels for compute capability 9.0 with the template arguments that match the request.
#include "hopper_kernels.h"

#include <hopper_launch.cuh>
#include <stdexcept>

#include "../cuda/hopper.cuh"
#include "../cuda/pack.cuh"

namespace zsl {
namespace {

struct WarpgroupBfloat16 {
  __device__ static void multiply_boxes(float (&c)[64], BoxPlace b, BoxPlace a, bool add) { multiply_boxes_bfloat16(c, b, a, add); }
};
struct WarpgroupFloat16 {
  __device__ static void multiply_boxes(float (&c)[64], BoxPlace b, BoxPlace a, bool add) { multiply_boxes_float16(c, b, a, add); }
};

TensorMap map_of(const MappedTensor& x, bool bfloat16) {
  const uint64_t sizes[4] = {x.features, x.positions, x.examples, x.parts};
  const uint64_t strides[3] = {2 * x.position, 2 * x.example, 2 * x.part};
  return tensor_map(x.data, sizes, strides, bfloat16);
}

template <class E, Slab slab, Fold fold>
void launch_as(const HopperArgs& args, uintptr_t stream) {
  const HopperSchedule& s = args.schedule;
  const int split = s.tiles - s.whole;
  const unsigned blocks = static_cast<unsigned>(s.whole + split * s.parts);
  launch("hopper_kernel", hopper_kernel<E, slab, fold>, 1, blocks, hopper_threads, sizeof(HopperShared), stream, args);
  if constexpr (fold != Fold::none) {
    const int64_t scalars = static_cast<int64_t>(args.scalars) * args.operands.examples;
    const int64_t last = (s.parts > 1 ? split * matrices_of<fold> * 16 : 0) + (scalars + hopper_warps - 1) / hopper_warps;
    if (last > 0) launch("finish_kernel", finish_kernel<fold>, 1, static_cast<unsigned>(last), hopper_consumers, 0, stream, args);
  }
}

template <class E>
void launch_element(int slab, Fold fold, const HopperArgs& args, uintptr_t stream) {
  if (fold == Fold::sums && slab == 0) return launch_as<E, Slab::none, Fold::sums>(args, stream);
  if (fold == Fold::sums && slab == 1) return launch_as<E, Slab::bfloat16, Fold::sums>(args, stream);
  if (fold == Fold::sums && slab == 2) return launch_as<E, Slab::float32, Fold::sums>(args, stream);
  if (fold == Fold::none && slab == 1) return launch_as<E, Slab::bfloat16, Fold::none>(args, stream);
  if (fold == Fold::none && slab == 2) return launch_as<E, Slab::float32, Fold::none>(args, stream);
  if (fold == Fold::scalars && slab == 0) return launch_as<E, Slab::none, Fold::scalars>(args, stream);
  if (fold == Fold::weighted && slab == 0) return launch_as<E, Slab::none, Fold::weighted>(args, stream);
  throw std::invalid_argument("hopper: expected a fold and a slab dtype that a kernel supports together");
}

}  // namespace

void launch_hopper(Element element, int slab, Fold fold, const MappedTensor& a, const MappedTensor& b,
                   const HopperOperands& operands, const HopperSchedule& schedule, const HopperResults& results,
                   const HopperAdded& added, uintptr_t stream) {
  const bool bfloat16 = element != Element::float16;  // also for the bfloat16 parts of float32
  int scalars = 0;
  for (const float* x : {results.l1, results.sq_norm, results.dot, results.abs_dot}) scalars += x != nullptr;
  const HopperArgs args = {map_of(a, bfloat16), map_of(b, bfloat16), operands, schedule, results, added, scalars};
  if (bfloat16)
    launch_element<WarpgroupBfloat16>(slab, fold, args, stream);
  else
    launch_element<WarpgroupFloat16>(slab, fold, args, stream);
}

void launch_pack(const Pack& x, unsigned blocks, uintptr_t stream) {
  const PackArgs args = {x.from,     x.element, x.examples, x.positions, x.begin, x.first_step,
                         x.features, x.pitch,   x.part,     x.with_low,  x.to};
  launch("pack_kernel", pack_kernel, blocks, static_cast<unsigned>(x.examples), pack_threads, 0, stream, args);
}

}  // namespace zsl
