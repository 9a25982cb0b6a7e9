// Copies an operand to a layout in which its boxes can be addressed, and splits float32 numbers into bfloat16 parts.
//
// In this layout features are contiguous, rows begin at multiples of 16 bytes, and each ragged example begins at the first position
// of a step. The matrix unit multiplies the bfloat16 parts.
#pragma once

#include <device.cuh>
#include <hopper_device.cuh>

#include "args.h"
#include "hopper_args.h"

namespace zsl {

constexpr int pack_threads = 256, pack_vector = 8;

struct PackArgs {
  Operand from;
  Element element;
  int64_t examples, positions;  // positions: number per example, if `begin` is null
  const int64_t* begin;         // (N + 1,) for ragged rows: the rows of each example
  const int* first_step;        // (N + 1,) for ragged rows: their destination, in steps of 64 positions
  int64_t features, pitch;      // pitch: features per row of the copy, a multiple of 8
  int64_t part;                 // distance in elements from one part to the next
  bool with_low;                // whether to write the low parts
  void* to;                     // (parts, rows, pitch)
};

struct alignas(16) Packed {
  uint16_t v[pack_vector];
};

// Rounds to the nearest bfloat16 number, but never past the largest finite one.
__device__ __forceinline__ uint32_t nearest_bfloat16(float x) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffffu;
  if (size >= 0x7f7f8000u) return size > 0x7f800000u ? 0x7fc0u : bits >> 16;  // truncated; infinity; NaN
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

struct Parts {
  uint16_t of[part_count];
};
// x = high + middle + low exactly, as long as the parts are normal numbers.
__device__ __forceinline__ Parts split_parts(float x) {
  const uint32_t first = nearest_bfloat16(x);
  if ((bits_of(x) & 0x7f800000u) == 0x7f800000u) return {{static_cast<uint16_t>(first), 0, 0, 0}};
  const float rest = x - float_of(first << 16);
  const uint32_t second = nearest_bfloat16(rest);
  const uint32_t third = nearest_bfloat16(rest - float_of(second << 16));
  return {
      {static_cast<uint16_t>(first), static_cast<uint16_t>(second), static_cast<uint16_t>(third), static_cast<uint16_t>(first)}};
}

// Grid: (examples, blocks per example). A thread processes eight features of a row.
__global__ void __launch_bounds__(pack_threads) pack_kernel(const __grid_constant__ PackArgs args) {
  const int64_t n = blockIdx.x;
  const int64_t source = args.begin ? args.begin[n] : 0,
                target = args.begin ? args.first_step[n] * int64_t{box_positions} : n * args.positions;
  const int64_t length = args.begin ? args.begin[n + 1] - source : args.positions;
  const int64_t rows = args.begin ? (args.first_step[n + 1] - args.first_step[n]) * int64_t{box_positions} : length;
  const int64_t vectors = args.pitch / pack_vector;
  for (int64_t at = blockIdx.y * int64_t{pack_threads} + threadIdx.x; at < rows * vectors;
       at += int64_t{gridDim.y} * pack_threads) {
    const int64_t t = at / vectors, f = at % vectors * pack_vector;
    const int64_t from =
        (args.begin ? (source + t) * args.from.position : n * args.from.example + t * args.from.position) + f * args.from.feature;
    const int64_t to = (target + t) * args.pitch + f;
    const int64_t count = t < length ? args.features - f : 0;
    if (args.element != Element::float32) {
      Packed packed;
#pragma unroll
      for (int j = 0; j < pack_vector; ++j)
        packed.v[j] = j < count ? static_cast<const uint16_t*>(args.from.data)[from + j * args.from.feature] : uint16_t{0};
      *reinterpret_cast<Packed*>(static_cast<uint16_t*>(args.to) + to) = packed;
      continue;
    }
    Packed parts[part_count];
#pragma unroll
    for (int j = 0; j < pack_vector; ++j) {
      const Parts x = split_parts(j < count ? static_cast<const float*>(args.from.data)[from + j * args.from.feature] : 0.f);
#pragma unroll
      for (int p = 0; p < part_count; ++p) parts[p].v[j] = x.of[p];
    }
#pragma unroll
    for (int p = 0; p < part_count; ++p)
      if (p != low || args.with_low) *reinterpret_cast<Packed*>(static_cast<uint16_t*>(args.to) + p * args.part + to) = parts[p];
  }
}

}  // namespace zsl
