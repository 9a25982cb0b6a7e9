// Computes the Gram matrix ⟨x_i, y_k⟩ of gradients in slabs, (N, E) and (M, E), on the matrix unit. It reads each slab once.
//
// A warp has a range of the elements and up to 32 rows of each slab, whose numbers it holds in registers. The products are sums
// over elements, so any order of the elements is valid if both operands use the same one. Therefore a thread loads 16 adjacent
// bytes of a row and uses them as its entries of a fragment.
#pragma once

#include <device.cuh>

#include "split.cuh"

namespace zsl {

constexpr int slab_warps = 8, slab_threads = 32 * slab_warps;
constexpr int slab_group = 32;  // maximum number of rows of a slab per block
constexpr int slab_unit = 512;  // elements that a block processes at a time
// Whether the registers suffice to issue all loads of a unit at once for four octets of float32. This is the case only on compute
// capability 9.0.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
constexpr bool slab_loads_at_once = true;
#else
constexpr bool slab_loads_at_once = false;
#endif

struct SlabGramArgs {
  const void *x, *y;  // (rows, elements); if y is null, x is multiplied by itself
  int64_t x_rows, y_rows, elements;
  double* pairs;  // (blocks, x_rows, y_rows)
  bool upper;     // for one set: only groups on and above the diagonal
  bool add;       // whether to add to the results of an earlier launch
};

struct alignas(16) Loaded {
  uint32_t v[4];
};

// Numbers in 16 bytes of the rows of two slabs, as fragments.
struct SlabBfloat16 {
  static constexpr int numbers = 8;
  static constexpr int octets_of_two = 4;  // octets of rows, of each of two slabs, that fit in registers
  __device__ static void multiply(float (&c)[4], const Loaded& x, const Loaded& x8, const Loaded& y) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
      mma_bfloat16(c, {x.v[2 * s], x8.v[2 * s], x.v[2 * s + 1], x8.v[2 * s + 1]}, y.v[2 * s], y.v[2 * s + 1]);
  }
};
struct SlabFloat32 {
  static constexpr int numbers = 4;
  static constexpr int octets_of_two = 2;
  __device__ static void multiply(float (&c)[4], const Loaded& x, const Loaded& x8, const Loaded& y) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const Split xs[4] = {split(float_of(x.v[2 * s])), split(float_of(x8.v[2 * s])), split(float_of(x.v[2 * s + 1])),
                           split(float_of(x8.v[2 * s + 1]))};
      const Split ys[2] = {split(float_of(y.v[2 * s])), split(float_of(y.v[2 * s + 1]))};
      multiply_split(c, xs, ys, true);
    }
  }
};

// octets: the number of groups of eight rows that the thread block has of each slab. Grid: (pairs of groups, blocks of elements).
template <class E, int octets, bool two>
__global__ void __launch_bounds__(slab_threads, two || (octets == 4 && E::numbers == 4) ? 1 : 2)
    slab_gram_kernel(const __grid_constant__ SlabGramArgs args) {
  constexpr int side = 8 * octets, down = (octets + 1) / 2;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t across = (args.y_rows + side - 1) / side;
  int64_t p = 0, q = blockIdx.x;
  if (args.upper)
    while (q >= across - p) q -= across - p, ++p;
  else
    p = q / across, q = q % across;
  if (args.upper) q += p;
  const int64_t x_first = p * side, y_first = q * side;

  // Rows past the last one produce products that are never read.
  const unsigned char *xs[octets], *ys[octets];
  const int64_t bytes = args.elements * 16 / E::numbers;
#pragma unroll
  for (int i = 0; i < octets; ++i) {
    const int64_t x_row = x_first + 8 * i + lane / 4, y_row = y_first + 8 * i + lane / 4;
    xs[i] = static_cast<const unsigned char*>(args.x) + (x_row < args.x_rows ? x_row : args.x_rows - 1) * bytes + lane % 4 * 16;
    if (two)
      ys[i] = static_cast<const unsigned char*>(args.y) + (y_row < args.y_rows ? y_row : args.y_rows - 1) * bytes + lane % 4 * 16;
  }
  float sums[down][octets][4] = {};
  const int64_t units = args.elements / slab_unit;
  const int64_t from = units * blockIdx.y / gridDim.y, to = units * (blockIdx.y + 1) / gridDim.y;
  constexpr int loads = slab_unit / (slab_warps * 4 * E::numbers);  // loads of a unit by each thread for each row
  for (int64_t unit = from; unit < to; ++unit) {
    // The matrix unit truncates sums in place of rounding them, so it adds only the terms of one unit.
    float step[down][octets][4] = {};
    const auto multiply = [&](int load) {
      const int64_t at = ((unit * loads + load) * slab_warps + warp) * 64;
      Loaded x[2 * down], y[octets];
#pragma unroll
      for (int i = 0; i < octets; ++i) {
        x[i] = *reinterpret_cast<const Loaded*>(xs[i] + at);
        if (two) y[i] = *reinterpret_cast<const Loaded*>(ys[i] + at);
      }
      if (octets < 2 * down) x[2 * down - 1] = {{0, 0, 0, 0}};
#pragma unroll
      for (int i = 0; i < down; ++i)
#pragma unroll
        for (int j = 0; j < octets; ++j) E::multiply(step[i][j], x[2 * i], x[2 * i + 1], two ? y[j] : x[j]);
    };
    if (octets == 4 && E::numbers == 4 && !slab_loads_at_once) {
#pragma unroll 2
      for (int load = 0; load < loads; ++load) multiply(load);
    } else {
#pragma unroll
      for (int load = 0; load < loads; ++load) multiply(load);
    }
#pragma unroll
    for (int i = 0; i < down; ++i)
#pragma unroll
      for (int j = 0; j < octets; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] += step[i][j][e];
  }
  float* const shared = reinterpret_cast<float*>(dynamic_shared());  // (warps, side, side)
#pragma unroll
  for (int i = 0; i < down; ++i)
#pragma unroll
    for (int j = 0; j < octets; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = 16 * i + lane / 4 + e / 2 * 8, c = 8 * j + lane % 4 * 2 + e % 2;
        if (r < side) shared[(warp * side + r) * side + c] = sums[i][j][e];
      }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < side * side; at += slab_threads) {
    const int64_t r = x_first + at / side, c = y_first + at % side;
    double total = 0;
    for (int w = 0; w < slab_warps; ++w) total += shared[w * side * side + at];
    if (r >= args.x_rows || c >= args.y_rows) continue;
    double* const pair = args.pairs + (blockIdx.y * args.x_rows + r) * args.y_rows + c;
    *pair = args.add ? *pair + total : total;
  }
}

}  // namespace zsl
