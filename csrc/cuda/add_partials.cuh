// Adds the partial results of the blocks of an earlier launch: the second launch of the row kernels.
#pragma once

#include <device.cuh>

#include "row_args.h"

namespace zsl {

// A block processes 32 adjacent numbers. Its warps take the rows in turn, and then the sums of the warps are added in order. Grid:
// (blocks of all sets, 1).
__global__ void __launch_bounds__(row_threads) add_partials_kernel(const __grid_constant__ AddPartialsArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int64_t block = blockIdx.x;
  int which = 0;
  for (; which + 1 < partials_at_once && block >= args.of[which].blocks; ++which) block -= args.of[which].blocks;
  const Partials& x = args.of[which];
  const int64_t at = block * 32 + lane;
  double* const shared = reinterpret_cast<double*>(dynamic_shared());  // (warps, 32)
  double total = 0;
  if (at < x.width) {
    const int64_t r = x.side ? at / x.side : 0, c = x.side ? at % x.side : at;
    const int64_t from = r > c ? c * x.side + r : at;
#pragma unroll 4
    for (int64_t i = warp; i < x.rows; i += row_warps)
      total += x.wide ? static_cast<const double*>(x.from)[i * x.width + from]
                      : static_cast<double>(static_cast<const float*>(x.from)[i * x.width + from]);
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || at >= x.width) return;
  for (int w = 1; w < row_warps; ++w) total += shared[w * 32 + lane];
  x.to[at / x.each][at % x.each] = static_cast<float>(total);
}

}  // namespace zsl
