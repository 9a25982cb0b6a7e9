// dense_interference: computes the sums and scalars of per-example gradients g (N, P) that are already in memory, in one pass.
//
// Each warp has a piece of the coordinates, with 16 bytes of each gradient per lane. It processes its examples four at a time, so
// that their loads are in flight together and their scalars are reduced over the warp together. The sums over examples stay in
// registers. The scalars of each example stay in shared memory, in float64, while the block continues with its next coordinates.
// The kernel uses no atomics, so results are bitwise reproducible.
#pragma once

#include <device.cuh>

#include "numbers.cuh"
#include "row_args.h"

namespace zsl {

constexpr int dense_examples = 4;  // examples that a warp processes at a time

// Sums each of `count` numbers over the lanes of the warp. Each lane receives the sum of number `lane / (32 / count)`. In each step
// a lane gives half of its sums to a partner and takes the partner's other half. This needs 16 exchanges in place of 80.
template <int count>
__device__ __forceinline__ float sum_over_lanes(float (&x)[count], int lane) {
  static_assert(count == 8 || count == 16);
  int mask = 16;
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + shuffle_xor(given, mask);
    }
  }
#pragma unroll
  for (; mask > 0; mask /= 2) x[0] += shuffle_xor(x[0], mask);
  return x[0];
}

// Writes a gradient's numbers to its row of the slab.
template <int length>
__device__ __forceinline__ void store_row(void* slab, int64_t at, const Numbers<Float32Numbers, length>& g) {
  *reinterpret_cast<Words*>(static_cast<uint32_t*>(slab) + at) = g.of[0];
}
template <int length>
__device__ __forceinline__ void store_row(void* slab, int64_t at, const Numbers<Bfloat16Numbers, length>& g) {
  *reinterpret_cast<Words*>(static_cast<uint16_t*>(slab) + at) = g.of[0];
}
template <int length>
__device__ __forceinline__ void store_row(void* slab, int64_t at, const Numbers<Float16Numbers, length>& g) {
#pragma unroll
  for (int i = 0; i < length; i += 4)
    *reinterpret_cast<Floats*>(static_cast<float*>(slab) + at + i) = {{g[i], g[i + 1], g[i + 2], g[i + 3]}};
}

template <int length>
__device__ __forceinline__ void store_sums(float* to, const float (&sums)[length], int left, bool vectors) {
  if (vectors && left >= length) {
#pragma unroll
    for (int i = 0; i < length; i += 4) *reinterpret_cast<Floats*>(to + i) = {{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]}};
    return;
  }
#pragma unroll
  for (int i = 0; i < length; ++i)
    if (i < left) to[i] = sums[i];
}

// Shared memory holds the scalars (row_warps, examples of a warp, fields). If several warps share coordinates, it also holds their
// sums (3, row_warps, 32 × a lane's coordinates).
template <bool along>
constexpr int dense_fields = along ? 4 : 2;

template <class E, bool along>
size_t dense_shared_bytes(int held, int lanes) {
  const size_t scalars = sizeof(double) * row_warps * static_cast<size_t>(held) * dense_fields<along>;
  return scalars + (lanes > 1 ? sizeof(float) * 3 * row_threads * per_16_bytes<E> : 0);
}

// Grid: (blocks of coordinates, parts of the examples).
template <class E, bool along>
__global__ void __launch_bounds__(row_threads, 2) dense_kernel(const __grid_constant__ DenseArgs args) {
  using Bits = typename E::Bits;
  constexpr int length = per_16_bytes<E>, piece = 32 * length, fields = dense_fields<along>, values = dense_examples * fields;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int lanes = args.lanes, columns = row_warps / lanes, row = warp % lanes, column = warp / lanes;
  const int64_t P = args.coordinates, first = blockIdx.y * args.part;
  const int64_t end = first + args.part < args.count ? first + args.part : args.count;

  double* const scalars = reinterpret_cast<double*>(dynamic_shared());
  float* const shared = reinterpret_cast<float*>(scalars + row_warps * args.held * fields);
  for (int i = thread; i < row_warps * args.held * fields; i += row_threads) scalars[i] = 0;
  __syncthreads();
  double* const own = scalars + warp * args.held * fields;

  const bool several = gridDim.y > 1;  // whether there are several parts of the examples
  float* const part_sums = args.sums + blockIdx.y * 3 * P;
  float* const results[3] = {several ? part_sums : args.grad_sum, several ? part_sums + P : args.abs_sum,
                             several ? part_sums + 2 * P : args.sq_sum};
  const int64_t pieces = (args.padded + piece - 1) / piece, groups = (pieces + columns - 1) / columns;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t at = (group * columns + column) * piece + lane * length;
    const int left = static_cast<int>(P - at < length ? P - at : length);
    const Bits* const g = static_cast<const Bits*>(args.g.data) + at * args.g.feature;
    Numbers<Float32Numbers, length> u[1];
    if (along) {
      const uint32_t* const from[1] = {reinterpret_cast<const uint32_t*>(args.direction) + at * args.direction_stride};
      load_rows(u, from, args.direction_stride, left, args.direction_vectors);
    }
    float sums[3][length] = {};
    int local = 0;
    for (int64_t n = first + row; n < end; n += dense_examples * lanes, local += dense_examples) {
      const Bits* from[dense_examples];
#pragma unroll
      for (int j = 0; j < dense_examples; ++j) from[j] = n + j * lanes < end ? g + (n + j * lanes) * args.g.example : nullptr;
      Numbers<E, length> numbers[dense_examples];
      load_rows(numbers, from, args.g.feature, left, args.g.vectors);
      if (args.slab && at < args.padded)
#pragma unroll
        for (int j = 0; j < dense_examples; ++j)
          if (n + j * lanes < end) store_row(args.slab, (n + j * lanes) * args.padded + at, numbers[j]);
      float terms[values];
#pragma unroll
      for (int j = 0; j < dense_examples; ++j) {
        float l1 = 0, sq_norm = 0, dot = 0, abs_dot = 0;
#pragma unroll
        for (int i = 0; i < length; ++i) {
          const float x = numbers[j][i], size = fabsf(x);
          sums[0][i] += x, sums[1][i] += size, sums[2][i] += x * x;
          l1 += size, sq_norm += x * x;
          if (along) {
            const float p = x * u[0][i];
            dot += p, abs_dot += fabsf(p);
          }
        }
        terms[j * fields] = l1, terms[j * fields + 1] = sq_norm;
        if (along) terms[j * fields + fields - 2] = dot, terms[j * fields + fields - 1] = abs_dot;
      }
      const float total = sum_over_lanes(terms, lane);
      const int value = lane / (32 / values), j = value / fields;
      if (lane % (32 / values) == 0 && n + j * lanes < end) own[local * fields + value] += total;
    }
    if (lanes == 1) {
#pragma unroll
      for (int f = 0; f < 3; ++f) store_sums(results[f] + at, sums[f], left, args.sums_vectors);
      continue;
    }
#pragma unroll
    for (int f = 0; f < 3; ++f)
#pragma unroll
      for (int i = 0; i < length; i += 4)
        *reinterpret_cast<Floats*>(shared + f * row_warps * piece + thread * length +
                                   i) = {{sums[f][i], sums[f][i + 1], sums[f][i + 2], sums[f][i + 3]}};
    __syncthreads();
#pragma unroll
    for (int f = 0; f < 3; ++f)
      for (int i = thread; i < columns * piece; i += row_threads) {
        const float* const parts = shared + (f * row_warps + i / piece * lanes) * piece + i % piece;
        float total = 0;
        for (int l = 0; l < lanes; ++l) total += parts[l * piece];
        const int64_t to = group * columns * piece + i;
        if (to < P) results[f][to] = total;
      }
    __syncthreads();  // the next sums overwrite these
  }

  __syncthreads();
  for (int i = thread; i < (end - first) * fields; i += row_threads) {
    const int f = i % fields, n = i / fields, own_row = n % lanes, at = n / lanes * fields + f;
    double total = 0;
    for (int c = 0; c < columns; ++c) total += scalars[(c * lanes + own_row) * args.held * fields + at];
    if (gridDim.x > 1)
      args.scalars[(static_cast<int64_t>(blockIdx.x) * fields + f) * args.count + first + n] = total;
    else
      (f == 0 ? args.l1 : f == 1 ? args.sq_norm : f == 2 ? args.dot : args.abs_dot)[first + n] = static_cast<float>(total);
  }
}

}  // namespace zsl
