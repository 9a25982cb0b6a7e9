// A float32 product on the matrix units.
//
// The units use only the leading 11 bits of an operand (tf32). With x = hi + lo, the product is x y ≈ hi hi + (hi lo + lo hi),
// which omits at most 2⁻²² of the product. If a product exceeds the largest float32 by a factor of about 2¹¹, its parts may be
// infinite with opposite signs. The result is then NaN, where float32 gives Inf.
#pragma once

#include <device.cuh>

namespace zsl {

struct Split {
  uint32_t hi;
  uint32_t finite_hi;  // hi if x is finite, else 0: only the first product contains Inf, because Inf times a lo of 0 is NaN
  uint32_t lo;
};

__device__ __forceinline__ Split split(float x) {
  constexpr uint32_t mask = 0xffffe000u, infinity = 0x7f800000u;
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  uint32_t hi = (bits + 0x1000u) & mask;
  // Rounding up would turn the largest numbers into infinity and could change a NaN into any value.
  if (size >= 0x7f7ff000u) hi = size > infinity ? 0x7fffe000u : bits & mask;
  const bool finite = size < infinity;
  const uint32_t lo = finite ? (bits_of(x - float_of(hi)) + 0x1000u) & mask : 0u;
  return {hi, finite ? hi : 0u, lo};
}

// Computes c += x y for fragments of 16 × 8 and 8 × 8. The matrix units truncate sums in place of rounding them, which biases long
// chains toward zero. Therefore they add only the terms of one step, and the steps are added here.
__device__ __forceinline__ void multiply_split(float (&c)[4], const Split (&x)[4], const Split (&y)[2], bool exact) {
  const uint32_t x_hi[4] = {x[0].hi, x[1].hi, x[2].hi, x[3].hi}, y_hi[2] = {y[0].hi, y[1].hi};
  float step[4] = {0, 0, 0, 0};
  if (exact) {
    const uint32_t x_lo[4] = {x[0].lo, x[1].lo, x[2].lo, x[3].lo}, y_lo[2] = {y[0].lo, y[1].lo};
    const uint32_t x_finite[4] = {x[0].finite_hi, x[1].finite_hi, x[2].finite_hi, x[3].finite_hi};
    const uint32_t y_finite[2] = {y[0].finite_hi, y[1].finite_hi};
    mma_tf32(step, x_lo, y_finite);
    mma_tf32(step, x_finite, y_lo);
  }
  mma_tf32(step, x_hi, y_hi);
#pragma unroll
  for (int e = 0; e < 4; ++e) c[e] += step[e];
}

}  // namespace zsl
