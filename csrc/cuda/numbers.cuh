// Reads rows of numbers of an element type, 16 bytes at a time if the alignment allows it.
#pragma once

#include <device.cuh>

#include "args.h"

namespace zsl {

// The raw words in memory.
struct alignas(16) Words {
  uint32_t v[4];
};
struct alignas(16) Floats {
  float v[4];
};

struct Float32Numbers {
  using Bits = uint32_t;
  __device__ __forceinline__ static float widen(Bits bits) { return float_of(bits); }
};
struct Bfloat16Numbers {
  using Bits = uint16_t;
  __device__ __forceinline__ static float widen(Bits bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
};
struct Float16Numbers {
  using Bits = uint16_t;
  __device__ __forceinline__ static float widen(Bits bits) { return widen_float16(bits); }
};

template <class E>
constexpr int per_word = 4 / static_cast<int>(sizeof(typename E::Bits));
template <class E>
constexpr int per_16_bytes = 4 * per_word<E>;

// `length` adjacent numbers of a row.
template <class E, int length>
struct Numbers {
  static constexpr int words = length / per_16_bytes<E>;
  static_assert(words * per_16_bytes<E> == length);
  Words of[words];

  __device__ __forceinline__ float operator[](int i) const {
    const uint32_t word = of[i / per_16_bytes<E>].v[i % per_16_bytes<E> / per_word<E>];
    return E::widen(static_cast<typename E::Bits>(per_word<E> == 1 ? word : word >> 16 * (i % per_word<E>)));
  }
};

// Loads the same columns of `count` rows. It loads the numbers from from[i] on, of which `left` exist, and fills the rest with
// zeros. A null pointer stands for a row of zeros. All loads are issued before the first result is used.
template <class E, int length, int count>
__device__ __forceinline__ void load_rows(Numbers<E, length> (&to)[count], const typename E::Bits* const (&from)[count],
                                          int64_t stride, int left, bool vectors) {
  if (vectors && left >= length) {
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int w = 0; w < Numbers<E, length>::words; ++w) {
        to[i].of[w] = {{0, 0, 0, 0}};
        if (from[i]) to[i].of[w] = reinterpret_cast<const Words*>(from[i])[w];
      }
    return;
  }
#pragma unroll
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int w = 0; w < Numbers<E, length>::words; ++w)
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < per_word<E>; ++e) {
          const int at = w * per_16_bytes<E> + v * per_word<E> + e;
          if (from[i] && at < left) word |= static_cast<uint32_t>(from[i][at * stride]) << 16 * e;
        }
        to[i].of[w].v[v] = word;
      }
}

}  // namespace zsl
