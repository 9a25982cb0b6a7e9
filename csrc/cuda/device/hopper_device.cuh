// Primitives that compute capability 9.0 adds: barriers that count bytes, copies of boxes of a tensor, and warpgroup products.
//
// A warpgroup has four warps. tests/native/simt/hopper_device.cuh has the same primitives for CPU threads.
#pragma once

#include <cuda.h>

#include <device.cuh>

namespace zsl {

// A box in shared memory has 64 positions × 64 features. Each row has 128 bytes, whose 16-byte parts are permuted within eight rows
// ("128-byte swizzle"), so that neither the copy nor the product causes bank conflicts.
constexpr int box_positions = 64, box_features = 64, box_bytes = box_positions * box_features * 2;

// A tensor (parts, examples, positions, features) of two-byte numbers, divided into such boxes. Numbers outside the tensor read as
// zero.
using TensorMap = CUtensorMap;

// Boxes begin at multiples of 1024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared_of_boxes() {
  extern __shared__ __align__(1024) unsigned char boxes[];
  return boxes;
}

struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes the initialized barriers visible to the copies that follow.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives at the barrier and makes the current phase also wait for `bytes` bytes of copies.
__device__ __forceinline__ void barrier_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Waits until the phase with this parity has ended.
__device__ __forceinline__ void barrier_wait(Barrier* b, int parity) {
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
                   shared_address(b)),
               "r"(parity)
               : "memory");
}

// Copies a box. When its bytes have arrived, they count toward the barrier's phase.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, Barrier* b, int feature, int position, int example,
                                         int part) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(feature), "r"(position), "r"(example), "r"(part)
      : "memory");
}

// Moves registers from the warps that copy to the warps that multiply.
template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// The address of a box as a product reads it: the lower half of the instruction's matrix descriptor. Both operands have contiguous
// features, with 64 features per box. Groups of eight positions are 1024 bytes apart. This distance and the kind of swizzle form
// the upper half.
using BoxPlace = uint32_t;
__device__ __forceinline__ BoxPlace place_of(const void* box) {
  return (shared_address(box) & 0x3ffff) >> 4 | (box_bytes >> 4) << 16;
}
__device__ __forceinline__ BoxPlace further(BoxPlace box, int positions) { return box + (positions * 128 >> 4); }

#define ZSL_C(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define ZSL_WARPGROUP_PRODUCT(name, type)                                                                                       \
  __device__ __forceinline__ void name(float (&c)[64], BoxPlace b, BoxPlace a, bool add) {                                      \
    asm volatile(                                                                                                               \
        "{\n.reg .pred p;\n.reg .b64 b, a;\nsetp.ne.b32 p, %66, 0;\nmov.b64 b, {%64, 0x40000040};\n"                            \
        "mov.b64 a, {%65, 0x40000040};\n"                                                                                       \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                            \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
        "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, b, a, p, 1, 1, 1, 1;\n}"              \
        : ZSL_C(0), ZSL_C(8), ZSL_C(16), ZSL_C(24), ZSL_C(32), ZSL_C(40), ZSL_C(48), ZSL_C(56)                                  \
        : "r"(b), "r"(a), "r"(static_cast<int>(add)));                                                                          \
  }
// Computes c (64, 128) = bᵀ a, and adds the previous c if `add` is set. It multiplies 16 positions of one box b of 64 features and
// of two boxes a. Thread t of the warpgroup holds c[4 i + 2 h + j] at row 16 (t / 32) + t % 32 / 4 + 8 h and column 8 i + 2 (t % 4)
// + j.
ZSL_WARPGROUP_PRODUCT(multiply_boxes_bfloat16, "bf16")
ZSL_WARPGROUP_PRODUCT(multiply_boxes_float16, "f16")
#undef ZSL_WARPGROUP_PRODUCT
#undef ZSL_C

// Call before the first product of a group. It orders the threads' earlier accesses to c before the products.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all groups of products except the last `Left` have finished reading the boxes and writing c.
template <int Left>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// Hides the origin of a number from the compiler. Otherwise the compiler would compute values that depend on it in advance and keep
// them in registers that the sums need.
template <class T>
__device__ __forceinline__ T hidden(T x) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
  return x;
}

// Rounds two numbers to bfloat16 and packs them, with x in the lower half.
__device__ __forceinline__ uint32_t round_to_bfloat16(float x, float y) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return both;
}

}  // namespace zsl
