// The primitives of csrc/cuda/device/device.cuh for threads of a CPU (fibers.h), and the words that CUDA adds to C++.
#pragma once

#include <cmath>

#include "fibers.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (simt::block->self().thread)
#define blockIdx (simt::block->at)
#define gridDim (simt::block->grid)

inline void __syncthreads() { simt::block->barrier(); }

namespace zsl {

inline unsigned char* dynamic_shared() { return simt::block->shared; }

inline void require_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) simt::fail("an address that has to be a multiple of 16 is not");
}

// A copy happens when its group is waited for, and not before: until then the old bytes are read.
inline void copy_async(void* to, const void* from, int bytes) {
  require_aligned(to);
  require_aligned(from);
  simt::Fiber& self = simt::block->self();
  self.copies.push_back({to, from, bytes, self.group});
}
inline void copy_async_commit() { ++simt::block->self().group; }
template <int Left>
void copy_async_wait() {
  simt::Fiber& self = simt::block->self();
  size_t count = 0;
  for (; count < self.copies.size() && self.copies[count].group < self.group - Left; ++count) {
    const simt::Copy& copy = self.copies[count];
    for (int i = 0; i < 16; ++i)
      static_cast<unsigned char*>(copy.to)[i] = i < copy.bytes ? static_cast<const unsigned char*>(copy.from)[i] : 0;
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float widen_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
inline float widen_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}

// A warp's lanes meet to name their rows; each then reads what it receives by itself, as the sanitizers shall see it.
struct Rows {
  const uint16_t* own;
  const uint16_t* of[simt::warp_size];
};
ZSL_UNSEEN inline void share_rows(Rows** lanes) {
  for (int to = 0; to < simt::warp_size; ++to)
    for (int from = 0; from < simt::warp_size; ++from) lanes[to]->of[from] = lanes[from]->own;
}
inline void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  require_aligned(row);
  Rows rows = {static_cast<const uint16_t*>(row), {}};
  simt::block->meet(&rows, share_rows);
  const int lane = static_cast<int>(threadIdx.x) % simt::warp_size;
  for (int m = 0; m < 4; ++m) {
    const uint16_t* const* matrix = rows.of + 8 * m;
    const uint32_t low = matrix[lane % 4 * 2][lane / 4], high = matrix[lane % 4 * 2 + 1][lane / 4];
    x[m] = low | high << 16;
  }
}

// A warp's fragments: c (16, 8) += a (16, Depth) b (Depth, 8), in float32, in order.
template <int Elements>
struct Fragments {
  float* c;
  const uint32_t *a, *b;
};
template <int Elements, class Widen>
ZSL_UNSEEN void multiply_fragments(Fragments<Elements>** lanes, Widen widen) {
  constexpr int depth = 8 * Elements;  // Elements numbers in each register
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < simt::warp_size; ++lane)
    for (int part = 0; part < Elements; ++part) {
      const int row = lane / 4, at = lane % 4 * Elements + part;
      for (int e = 0; e < 4; ++e) a[row + e % 2 * 8][at + e / 2 * 4 * Elements] = widen(lanes[lane]->a[e], part);
      for (int e = 0; e < 2; ++e) b[at + e * 4 * Elements][row] = widen(lanes[lane]->b[e], part);
    }
  for (int lane = 0; lane < simt::warp_size; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, col = lane % 4 * 2 + e % 2;
      float sum = lanes[lane]->c[e];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][col];
      lanes[lane]->c[e] = sum;
    }
}

ZSL_UNSEEN inline float half_of(uint32_t both, int part, bool bfloat16) {
  const uint16_t bits = static_cast<uint16_t>(both >> 16 * part);
  return bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  Fragments<2> mine = {c, a, b};
  simt::block->meet(&mine, [](Fragments<2>** lanes) {
    multiply_fragments<2>(lanes, [](uint32_t both, int part) { return half_of(both, part, true); });
  });
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  Fragments<2> mine = {c, a, b};
  simt::block->meet(&mine, [](Fragments<2>** lanes) {
    multiply_fragments<2>(lanes, [](uint32_t both, int part) { return half_of(both, part, false); });
  });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments<1> mine = {c, a, b};
  simt::block->meet(&mine, [](Fragments<1>** lanes) {
    multiply_fragments<1>(lanes, [](uint32_t bits, int) { return float_of(bits & 0xffffe000u); });
  });
}

template <class T>
struct Shuffled {
  T own, other;
  int from;
};
template <class T>
ZSL_UNSEEN void exchange(Shuffled<T>** lanes) {
  for (int lane = 0; lane < simt::warp_size; ++lane) lanes[lane]->other = lanes[lanes[lane]->from]->own;
}
template <class T>
T shuffle_xor(T x, int mask) {
  Shuffled<T> mine = {x, 0, static_cast<int>(threadIdx.x) % simt::warp_size ^ mask};
  simt::block->meet(&mine, exchange<T>);
  return mine.other;
}

struct Ballot {
  bool own;
  uint32_t all;
};
ZSL_UNSEEN inline void count_votes(Ballot** lanes) {
  uint32_t all = 0;
  for (int lane = 0; lane < simt::warp_size; ++lane) all |= static_cast<uint32_t>(lanes[lane]->own) << lane;
  for (int lane = 0; lane < simt::warp_size; ++lane) lanes[lane]->all = all;
}
inline uint32_t ballot(bool x) {
  Ballot mine = {x, 0};
  simt::block->meet(&mine, count_votes);
  return mine.all;
}
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }

}  // namespace zsl
