// The tiles: their sizes, the layout of shared memory, and the work of each warp.
//
// zsl_kernels/planning/tiles.py contains the same numbers.
#pragma once

#include "args.h"

namespace zsl {

constexpr int warp_size = 32, warps = 8, threads = warps * warp_size;
constexpr int step_bytes = 64;  // bytes of one feature's positions per step: 32 positions of half precision, 16 of float32
constexpr int pad = 8;          // elements between rows of a staged panel, so that the rows of a fragment use different banks
constexpr int sum_run = 64;     // examples whose gradients are summed before their sum is added to the total

template <int Rows, int Cols, int Slots, int Together, int WarpRows, int WarpCols, int Stages>
struct Tile {
  static constexpr int rows = Rows, cols = Cols, size = Rows * Cols;
  static constexpr int slots = Slots;        // maximum number of examples whose tiles are held
  static constexpr int together = Together;  // examples computed at a time, each by its own warps
  static constexpr int warp_rows = WarpRows, warp_cols = WarpCols;
  static constexpr int stages = Stages;
  static_assert(Together * WarpRows * WarpCols == warps);

  // A slot is four floats longer than a tile. The coordinates of eight examples then lie in different banks when the Gram matrix
  // loads its fragments.
  static constexpr int slot_floats = size + 4;
  static constexpr int row_pitch = Rows + pad, col_pitch = Cols + pad;
  static constexpr int stage_bytes = Together * (row_pitch + col_pitch) * step_bytes;

  // The tiles held, the stages and, if the examples are held in several batches, the sums of a run of examples.
  static constexpr size_t shared_bytes(int held, bool runs) {
    return sizeof(float) * (static_cast<size_t>(held) * slot_floats + (runs ? 3 * size : 0)) +
           static_cast<size_t>(Stages) * stage_bytes;
  }

  // The Gram matrix: a warp has 16 examples × gram_cols × 8 examples, and a share of the coordinates.
  static constexpr int gram_rows = (Slots + 15) / 16;
  static constexpr int gram_cols = Slots / 8 < 4 ? Slots / 8 : 4;
  static constexpr int gram_col_groups = Slots / 8 / gram_cols;
  static constexpr int shares = warps / (gram_rows * gram_col_groups);
  static_assert(gram_rows * gram_col_groups * shares == warps && size % (8 * shares) == 0);
};

using Tile8 = Tile<64, 64, 8, 1, 2, 4, 3>;
using Tile16 = Tile<64, 32, 16, 1, 4, 2, 3>;
using Tile32 = Tile<32, 32, 32, 2, 2, 2, 3>;
using Tile64 = Tile<32, 16, 64, 4, 2, 1, 2>;

// The position of a tile in the weight.
template <class Tile>
struct Place {
  int64_t row, col, O, K;

  __device__ Place(const Sizes& sizes, int64_t tile) : O(sizes.O), K(sizes.K) {
    const int64_t across = (K + Tile::cols - 1) / Tile::cols;
    row = tile / across * Tile::rows, col = tile % across * Tile::cols;
  }
  __device__ static int64_t count(const Sizes& sizes) {
    return (sizes.O + Tile::rows - 1) / Tile::rows * ((sizes.K + Tile::cols - 1) / Tile::cols);
  }
  // Coordinates of a tile are in row-major order.
  __device__ int64_t row_of(int at) const { return row + at / Tile::cols; }
  __device__ int64_t col_of(int at) const { return col + at % Tile::cols; }
  __device__ bool has(int at) const { return row_of(at) < O && col_of(at) < K; }
};

// The examples whose tiles a block holds at a time: [first, first + count) of one set, followed by those of the second.
struct Held {
  int64_t first, second_first;
  int count, second_count;
  bool second_set;  // whether the second examples belong to the second set

  __device__ int total() const { return count + second_count; }
  __device__ bool is_second(int slot) const { return slot >= count; }
  __device__ int64_t example(int slot) const { return is_second(slot) ? second_first + (slot - count) : first + slot; }
};

__device__ inline int least(int64_t x, int y) { return x < y ? static_cast<int>(x) : y; }

// Returns the pair of groups that blockIdx.x selects. For two sets it enumerates all pairs. For one set it enumerates the pairs on
// and above the diagonal.
__device__ inline Held held_pair(const Sizes& sizes, int64_t N, int64_t M, int64_t index) {
  const int64_t groups = (N + sizes.group - 1) / sizes.group, second_groups = (M + sizes.group - 1) / sizes.group;
  int64_t p = 0, q = 0;
  if (sizes.cross) {
    p = index / second_groups, q = index % second_groups;
  } else {
    while (index >= groups - p) index -= groups - p, ++p;
    q = p + index;
  }
  const bool second = sizes.cross || p != q;
  const int64_t first = p * sizes.group, second_first = q * sizes.group;
  return {first, second_first, least(N - first, sizes.group), second ? least(M - second_first, sizes.group) : 0, sizes.cross};
}

}  // namespace zsl
