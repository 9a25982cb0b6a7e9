// The tiles: sizes, the layout of shared memory, and which warp does what. zsl_kernels/planning/tiles.py has the same numbers.
#pragma once

#include "args.h"

namespace zsl {

constexpr int warp_size = 32, warps = 8, threads = warps * warp_size;
constexpr int step_bytes = 64;  // of one feature's positions in a step of the product: 32 of half precision, 16 of float32
constexpr int pad = 8;          // elements between rows of a staged panel: rows of a fragment then lie in different banks
constexpr int sum_run = 64;     // examples whose gradients are added before their sum joins the others'

template <int Rows, int Cols, int Slots, int Together, int WarpRows, int WarpCols, int Stages>
struct Tile {
  static constexpr int rows = Rows, cols = Cols, size = Rows * Cols;
  static constexpr int slots = Slots;        // examples whose tiles are held, at most
  static constexpr int together = Together;  // examples that are formed at a time, each by its own warps
  static constexpr int warp_rows = WarpRows, warp_cols = WarpCols;
  static constexpr int stages = Stages;
  static_assert(Together * WarpRows * WarpCols == warps);

  // Four floats past the size: eight examples' coordinates then lie in different banks, as the Gram's fragments want them.
  static constexpr int slot_floats = size + 4;
  static constexpr int row_pitch = Rows + pad, col_pitch = Cols + pad;
  static constexpr int stage_bytes = Together * (row_pitch + col_pitch) * step_bytes;

  // The tiles held, the stages and, where examples are held one batch after another, the sums of a run of them.
  static constexpr size_t shared_bytes(int held, bool runs) {
    return sizeof(float) * (static_cast<size_t>(held) * slot_floats + (runs ? 3 * size : 0)) +
           static_cast<size_t>(Stages) * stage_bytes;
  }

  // The Gram: a warp has 16 examples by gram_cols × 8, and a share of the coordinates.
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

// Where a tile of the weight lies.
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
  // Coordinates of a tile go row by row.
  __device__ int64_t row_of(int at) const { return row + at / Tile::cols; }
  __device__ int64_t col_of(int at) const { return col + at % Tile::cols; }
  __device__ bool has(int at) const { return row_of(at) < O && col_of(at) < K; }
};

// The examples whose tiles a block holds at a time: [first, first + count) of one set and, past them, of the second.
struct Held {
  int64_t first, second_first;
  int count, second_count;
  bool second_set;  // whether the second ones are of the second set

  __device__ int total() const { return count + second_count; }
  __device__ bool is_second(int slot) const { return slot >= count; }
  __device__ int64_t example(int slot) const { return is_second(slot) ? second_first + (slot - count) : first + slot; }
};

__device__ inline int least(int64_t x, int y) { return x < y ? static_cast<int>(x) : y; }

// The pair of groups that blockIdx.x names: all pairs of two sets', or those on and above the diagonal of one set's.
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
