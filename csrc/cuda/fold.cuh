// Folds the tiles that a block holds into the sums over examples, the examples' scalars and the Gram matrix.
#pragma once

#include <device.cuh>

#include "split.cuh"
#include "tile.cuh"

namespace zsl {

// Computes Σ g, Σ |g| and Σ g² of a tile's coordinates, with one thread per coordinate. If the examples are held in several
// batches, they are summed in runs, and `runs` (3, size) keeps the partial sums of the current run.
template <class Tile>
__device__ void fold_sums(const Results& out, const Held& held, const Place<Tile>& place, const float* slots, float* runs,
                          int64_t N) {
  const int64_t next = held.first + held.count;
  const bool begins = held.first % sum_run == 0, ends = next % sum_run == 0 || next == N, totals = held.first >= sum_run;
  for (int at = threadIdx.x; at < Tile::size; at += threads) {
    float sums[3] = {0, 0, 0};
#pragma unroll
    for (int s = 0; s < 3; ++s)
      if (!begins) sums[s] = runs[s * Tile::size + at];
#pragma unroll 4
    for (int slot = 0; slot < held.count; ++slot) {
      const float g = slots[slot * Tile::slot_floats + at];
      sums[0] += g;
      sums[1] += g < 0 ? -g : g;
      sums[2] += g * g;
    }
    const int64_t to = place.row_of(at) * place.K + place.col_of(at);
    float* const results[3] = {out.grad_sum + to, out.abs_sum + to, out.sq_sum + to};
#pragma unroll
    for (int s = 0; s < 3; ++s)
      if (!ends)
        runs[s * Tile::size + at] = sums[s];
      else if (place.has(at))
        *results[s] = totals ? *results[s] + sums[s] : sums[s];
  }
}

// Computes l1, sq_norm and, with a direction, dot and abs_dot of each held example over the tile. Each warp processes one example.
// It accumulates in float32 within a tile and in float64 across tiles.
template <class Tile>
__device__ void fold_scalars(const Results& out, const Held& held, const Place<Tile>& place, const float* slots, int64_t N,
                             bool first_tile) {
  const int lane = threadIdx.x % warp_size;
  for (int slot = threadIdx.x / warp_size; slot < held.count; slot += warps) {
    float sums[4] = {0, 0, 0, 0};
    for (int at = lane; at < Tile::size; at += warp_size) {
      const float g = slots[slot * Tile::slot_floats + at], size = g < 0 ? -g : g;
      sums[0] += size;
      sums[1] += g * g;
      if (out.direction && place.has(at)) {
        const float p = g * out.direction[place.row_of(at) * out.direction_row + place.col_of(at) * out.direction_col];
        sums[2] += p;
        sums[3] += p < 0 ? -p : p;
      }
    }
#pragma unroll
    for (int f = 0; f < 4; ++f) {
#pragma unroll
      for (int mask = warp_size / 2; mask > 0; mask /= 2) sums[f] += shuffle_xor(sums[f], mask);
      double* to = out.scalars + (static_cast<int64_t>(blockIdx.y) * 4 + f) * N + held.example(slot);
      if (lane == 0) *to = first_tile ? sums[f] : *to + sums[f];
    }
  }
}

// Computes the inner products of the held tiles: those of the first examples with the second ones, or of one group with itself.
template <class Tile>
__device__ void fold_gram(double* pairs, const Held& held, const float* slots, int64_t N, int64_t M, bool first_tile, bool exact) {
  constexpr int length = Tile::size / Tile::shares;
  const bool itself = held.second_count == 0;
  const int warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
  const int row = warp % Tile::gram_rows * 16, share = warp / (Tile::gram_rows * Tile::gram_col_groups);
  const int col = warp / Tile::gram_rows % Tile::gram_col_groups * Tile::gram_cols * 8;
  const int rows = held.count, cols = itself ? held.count : held.second_count;
  if (row >= rows || col >= cols || (itself && col + Tile::gram_cols * 8 <= row)) return;

  // A slot past the last one does not exist. The last slot is read in its place, and the resulting products are never read.
  const auto coordinates = [&](int slot, int count, int from) {
    return slots + (from + (slot < count ? slot : count - 1)) * Tile::slot_floats + share * length + lane % 4;
  };
  const float* x[2] = {coordinates(row + lane / 4, rows, 0), coordinates(row + lane / 4 + 8, rows, 0)};
  const float* y[Tile::gram_cols];
  float sums[Tile::gram_cols][4];
#pragma unroll
  for (int j = 0; j < Tile::gram_cols; ++j) {
    y[j] = coordinates(col + j * 8 + lane / 4, cols, itself ? 0 : rows);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[j][e] = 0;
  }
#pragma unroll 2
  for (int at = 0; at < length; at += 8) {
    const Split xs[4] = {split(x[0][at]), split(x[1][at]), split(x[0][at + 4]), split(x[1][at + 4])};
#pragma unroll
    for (int j = 0; j < Tile::gram_cols; ++j) {
      const Split ys[2] = {split(y[j][at]), split(y[j][at + 4])};
      multiply_split(sums[j], xs, ys, exact);
    }
  }
#pragma unroll
  for (int j = 0; j < Tile::gram_cols; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = row + lane / 4 + 8 * (e / 2), c = col + j * 8 + lane % 4 * 2 + e % 2;
      if (r >= rows || c >= cols) continue;
      const int64_t second = itself ? held.first + c : held.second_first + c;
      double* to = pairs + ((static_cast<int64_t>(blockIdx.y) * Tile::shares + share) * N + held.first + r) * M + second;
      *to = first_tile ? sums[j][e] : *to + sums[j][e];
    }
}

// Loops over the block's tiles. For each tile it loops over the examples, as many at a time as are held. With the Gram matrix,
// these are the examples of the block's pair of groups. `form(held, place, slots, stages)` computes their tiles after all threads
// have finished with the previous ones.
template <class Tile, class Form>
__device__ void fold_tiles(const Sizes& sizes, const Results& out, int64_t N, int64_t M, Form form) {
  float* slots = reinterpret_cast<float*>(dynamic_shared());
  unsigned char* stages = reinterpret_cast<unsigned char*>(slots + sizes.slots * Tile::slot_floats);
  float* runs = reinterpret_cast<float*>(stages + Tile::stages * Tile::stage_bytes);
  const int64_t tiles = Place<Tile>::count(sizes);
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const Place<Tile> place(sizes, tile);
    const bool first_tile = tile == blockIdx.y;
    for (int64_t first = 0; first < (out.pairs ? 1 : N); first += sizes.slots) {
      const Held held = out.pairs ? held_pair(sizes, N, M, blockIdx.x) : Held{first, 0, least(N - first, sizes.slots), 0, false};
      form(held, place, slots, stages);
      if (out.grad_sum) {
        fold_sums<Tile>(out, held, place, slots, runs, N);
        fold_scalars<Tile>(out, held, place, slots, N, first_tile);
      }
      if (out.pairs) fold_gram<Tile>(out.pairs, held, slots, N, M, first_tile, sizes.exact);
    }
  }
}

}  // namespace zsl
