// A float32 product on the matrix units, which take the leading 11 bits of an operand (tf32): x = hi + lo, and
// x y ≈ hi hi + (hi lo + lo hi), which leaves out 2⁻²² of the product at most. Where a product is some 2¹¹ times
// past the largest float32, its parts may be infinite of both signs: the result is NaN then, where float32's is Inf.
#pragma once

#include <device.cuh>

namespace zsl {

struct Split {
  uint32_t hi;
  uint32_t finite_hi;  // hi where x is finite, else 0: Inf is in the first product alone, for Inf times a lo of 0 would be NaN
  uint32_t lo;
};

__device__ __forceinline__ Split split(float x) {
  constexpr uint32_t mask = 0xffffe000u, infinity = 0x7f800000u;
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  uint32_t hi = (bits + 0x1000u) & mask;
  // Rounding up would make the largest numbers infinite, and a NaN anything.
  if (size >= 0x7f7ff000u) hi = size > infinity ? 0x7fffe000u : bits & mask;
  const bool finite = size < infinity;
  const uint32_t lo = finite ? (bits_of(x - float_of(hi)) + 0x1000u) & mask : 0u;
  return {hi, finite ? hi : 0u, lo};
}

// c += x y for fragments of 16 × 8 and 8 × 8. The matrix units cut sums off instead of rounding them: over a long chain that is a
// bias towards zero. So they add up the terms of one step alone, and the steps are added here.
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
