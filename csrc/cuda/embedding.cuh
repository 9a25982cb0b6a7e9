// interference of an embedding, where an example's gradient is the sum of b over the positions that refer to a row of the weight.
//
// Positions are sorted by row, then by example. The positions with the same row and example form a pair, and their sum is the row
// of the example's gradient. The sizes of all launches depend on the number of positions, not on their values, so the host never
// waits to learn how many rows were touched.
//
// The sorted positions are divided into windows of equal length. A warp sums one window for one group of columns, in registers. A
// row or a pair may cross the boundaries of windows. A window writes its partial results of such a row to memory as pieces. In a
// second launch, the warp of the window in which the row begins adds the pieces. A row that most positions refer to is therefore
// divided among many warps. The kernels use no atomics, so results are bitwise reproducible.
#pragma once

#include <device.cuh>

#include "embedding_args.h"

namespace zsl {

constexpr int embedding_warps = 4, embedding_threads = 32 * embedding_warps;
constexpr int embedding_ahead = 4;  // rows of b that a warp loads before it adds the first of them
constexpr int order_threads = 256, finish_threads = 256;
constexpr int64_t skipped_key = 0x7fffffffffffffff;

// The pieces of a window, with K numbers each. A head belongs to the row or pair that began before the window. A tail belongs to
// the row or pair that crosses the window's end.
enum Piece : int { head_gradient, tail_gradient, head_sums, tail_sums = head_sums + 3, piece_count = tail_sums + 3 };
// Values of `open`: no pair crosses the window's end, or one does that began before the window.
constexpr int32_t open_none = -1, open_throughout = -2;

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int64_t lesser(int64_t x, int64_t y) { return x < y ? x : y; }

// The order ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t example_of(const int64_t* examples, int64_t positions, int64_t position) {
  return examples ? examples[position] : position / positions;
}

// Ids that are out of range are skipped. The CPU rejects them, but here the host would have to wait for the check.
__global__ void __launch_bounds__(order_threads) embedding_keys_kernel(const __grid_constant__ EmbeddingOrderArgs args) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * order_threads + threadIdx.x;
  if (p >= args.count) return;
  const int64_t row = args.ids[p], n = example_of(args.examples, args.positions, p);
  const bool used = row >= 0 && row < args.num_rows && row != args.padding && n >= 0 && n < args.num_examples;
  args.keys[p] = used ? row * args.num_examples + n : skipped_key;
}

__device__ __forceinline__ bool row_begins(const EmbeddingOrderArgs& args, int64_t p) {
  if (p >= args.count || args.sorted[p] == skipped_key) return false;
  return p == 0 || args.sorted[p] / args.num_examples != args.sorted[p - 1] / args.num_examples;
}

// Returns the sum over the block's threads to every thread. `held` is shared memory with one number per warp.
__device__ inline int64_t sum_of_block(int64_t x, int64_t* held) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  __syncthreads();  // all threads have read the previous values
  if (lane_of_warp() == 0) held[threadIdx.x / 32] = x;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < order_threads / 32; ++w) total += held[w];
  return total;
}

// Counts the rows that begin in each block's chunk of the sorted positions.
__global__ void __launch_bounds__(order_threads) embedding_count_kernel(const __grid_constant__ EmbeddingOrderArgs args) {
  const int64_t begin = blockIdx.x * args.chunk, end = lesser(begin + args.chunk, args.count);
  int64_t found = 0;
  for (int64_t p = begin + threadIdx.x; p < end; p += order_threads) found += row_begins(args, p);
  const int64_t total = sum_of_block(found, reinterpret_cast<int64_t*>(dynamic_shared()));
  if (threadIdx.x == 0) args.counts[blockIdx.x] = total;
}

// Numbers the touched rows and writes a place for each position.
__global__ void __launch_bounds__(order_threads) embedding_places_kernel(const __grid_constant__ EmbeddingOrderArgs args) {
  int64_t* const held = reinterpret_cast<int64_t*>(dynamic_shared());
  int64_t before = 0;  // rows that begin before the chunk, and later before the threads' places
  if (args.counts) {
    int64_t mine = 0;
    for (int64_t block = threadIdx.x; block < blockIdx.x; block += order_threads) mine += args.counts[block];
    before = sum_of_block(mine, held);
  }
  const int64_t begin = blockIdx.x * args.chunk, end = lesser(begin + args.chunk, args.count);
  for (int64_t from = begin; from < end; from += order_threads) {
    const int64_t p = from + threadIdx.x;
    const bool begins = p < end && row_begins(args, p);
    const uint32_t of_warp = ballot(begins);
    __syncthreads();  // all threads have read the values of the previous places
    if (lane_of_warp() == 0) held[threadIdx.x / 32] = count_bits(of_warp);
    __syncthreads();
    int64_t row = before - 1, total = 0;
    for (int w = 0; w < order_threads / 32; ++w) {
      if (w < static_cast<int>(threadIdx.x) / 32) row += held[w];
      total += held[w];
    }
    row += count_bits(of_warp << (31 - lane_of_warp()));
    before += total;
    if (p >= end) continue;
    const int64_t key = args.sorted[p], slot = args.order[p];
    int32_t segment = -1;
    if (key != skipped_key) segment = static_cast<int32_t>(2 * row + (p == 0 || key != args.sorted[p - 1]));
    const int64_t offset = slot / args.positions * args.example + slot % args.positions * args.position;
    args.places[p] = {offset, segment, static_cast<int32_t>(slot)};
    if (begins) args.rows[row] = key / args.num_examples;
  }
  if (threadIdx.x == 0 && blockIdx.x + 1 == gridDim.x) *args.touched = before;
}

// Numbers of 16 bytes -----------------------------------------------------------------------------------------------------------

struct alignas(16) Raw {
  uint32_t v[4];
};
struct alignas(16) Sum4 {
  float v[4];
};

struct PlainFloat32 {
  static constexpr int numbers = 4;
  using Number = uint32_t;
  __device__ static float widen(const Raw& x, int j) { return float_of(x.v[j]); }
};
struct PlainBfloat16 {
  static constexpr int numbers = 8;
  using Number = uint16_t;
  __device__ static float widen(const Raw& x, int j) { return float_of(j % 2 ? x.v[j / 2] & 0xffff0000u : x.v[j / 2] << 16); }
};
struct PlainFloat16 {
  static constexpr int numbers = 8;
  using Number = uint16_t;
  __device__ static float widen(const Raw& x, int j) { return widen_float16(static_cast<uint16_t>(x.v[j / 2] >> j % 2 * 16)); }
};

// The columns of a thread in a group of 32 × numbers columns. They are adjacent if 16 bytes are read at once. Otherwise they are 32
// columns apart, so that the threads of a warp read adjacent columns.
template <int numbers, bool vectors>
struct Columns {
  int64_t first, K;

  __device__ Columns(int64_t group, int64_t K_) : K(K_) { first = group * 32 * numbers + lane_of_warp() * (vectors ? numbers : 1); }
  __device__ __forceinline__ int64_t at(int j) const { return first + (vectors ? j : 32 * j); }
  __device__ __forceinline__ bool has(int j) const { return at(j) < K; }
  // Rows of K numbers begin at multiples of 16 bytes if K is a multiple of four.
  __device__ __forceinline__ bool in_fours() const { return vectors && K % 4 == 0; }

  __device__ __forceinline__ void store(float* row, const float (&x)[numbers]) const {
    if (in_fours()) {
#pragma unroll
      for (int j = 0; j < numbers; j += 4)
        if (has(j)) *reinterpret_cast<Sum4*>(row + at(j)) = {{x[j], x[j + 1], x[j + 2], x[j + 3]}};
    } else {
#pragma unroll
      for (int j = 0; j < numbers; ++j)
        if (has(j)) row[at(j)] = x[j];
    }
  }
  __device__ __forceinline__ void load(float (&x)[numbers], const float* row) const {
    if (in_fours()) {
#pragma unroll
      for (int j = 0; j < numbers; j += 4) {
        Sum4 four = {{0, 0, 0, 0}};
        if (has(j)) four = *reinterpret_cast<const Sum4*>(row + at(j));
#pragma unroll
        for (int e = 0; e < 4; ++e) x[j + e] = four.v[e];
      }
    } else {
#pragma unroll
      for (int j = 0; j < numbers; ++j) x[j] = has(j) ? row[at(j)] : 0.f;
    }
  }
};

// Loads a thread's numbers of a row of b, with zeros past the last column.
template <class E, bool vectors>
__device__ __forceinline__ Raw load_row(const EmbeddingArgs& args, const Columns<E::numbers, vectors>& columns, int64_t offset) {
  using Number = typename E::Number;
  const Number* const row = static_cast<const Number*>(args.b.data) + offset;
  if (vectors && columns.has(E::numbers - 1)) return *reinterpret_cast<const Raw*>(row + columns.first);
  Raw x = {{0, 0, 0, 0}};
#pragma unroll
  for (int j = 0; j < E::numbers; ++j)
    if (columns.has(j)) {
      const uint32_t bits = row[columns.at(j) * (vectors ? 1 : args.b.feature)];
      x.v[j * sizeof(Number) / 4] |= bits << j * sizeof(Number) % 4 * 8;
    }
  return x;
}

__device__ __forceinline__ float widened(const void* data, int type, int64_t at) {
  if (type == 3) return static_cast<float>(static_cast<const double*>(data)[at]);
  if (type == static_cast<int>(Element::float32)) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return type == static_cast<int>(Element::bfloat16) ? float_of(static_cast<uint32_t>(bits) << 16) : widen_float16(bits);
}

// Folding -----------------------------------------------------------------------------------------------------------------------

// Sums four numbers over a warp. Each of the first two steps halves the numbers per thread. The threads with lane / 8 == f receive
// field f.
__device__ __forceinline__ float of_warp(const float (&x)[4]) {
  const bool high = lane_of_warp() & 16, odd = lane_of_warp() & 8;
  const float first = shuffle_xor(high ? x[0] : x[2], 16) + (high ? x[2] : x[0]);
  const float second = shuffle_xor(high ? x[1] : x[3], 16) + (high ? x[3] : x[1]);
  float total = shuffle_xor(odd ? first : second, 8) + (odd ? second : first);
#pragma unroll
  for (int mask = 4; mask; mask /= 2) total += shuffle_xor(total, mask);
  return total;
}

// A warp's columns of a row: the sums over the pairs that are complete, and the gradient of the pair that is not.
template <int numbers>
struct RowSums {
  float gradient[numbers], sums[3][numbers], direction[numbers];

  __device__ __forceinline__ void clear_gradient() {
#pragma unroll
    for (int j = 0; j < numbers; ++j) gradient[j] = 0;
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int j = 0; j < numbers; ++j) sums[0][j] = sums[1][j] = sums[2][j] = 0;
  }
};

template <int numbers, bool vectors>
struct Folding {
  const EmbeddingArgs& args;
  const Columns<numbers, vectors> columns;
  const int64_t group;
  RowSums<numbers> row = {};

  __device__ Folding(const EmbeddingArgs& args_, int64_t group_) : args(args_), columns(group_, args_.K), group(group_) {}

  __device__ __forceinline__ void load_direction(int64_t touched_row) {
    if (!args.direction) return;
    const int64_t from = args.rows[touched_row] * args.direction_row;
    if (args.direction_rows) return columns.load(row.direction, static_cast<const float*>(args.direction) + from);
#pragma unroll
    for (int j = 0; j < numbers; ++j)
      row.direction[j] =
          columns.has(j) ? widened(args.direction, args.direction_type, from + columns.at(j) * args.direction_col) : 0.f;
  }

  __device__ __forceinline__ void write_scalar(int64_t slot, float x) {
    const int fields = args.direction ? 4 : 2, field = lane_of_warp() / 8;
    if (lane_of_warp() % 8 == 0 && field < fields) args.scalars[(group * args.count + slot) * fields + field] = x;
  }

  // Adds the complete gradient to the row's sums and writes the pair's scalars. If the slab contains the row, it also writes the
  // gradient to the slab.
  __device__ __forceinline__ void fold_pair(int64_t slot, int64_t touched_row) {
    float fields[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < numbers; ++j) {
      const float g = row.gradient[j], size = g < 0 ? -g : g;
      row.sums[0][j] += g, row.sums[1][j] += size, row.sums[2][j] += g * g;
      fields[0] += size, fields[1] += g * g;
      if (args.direction) {
        const float p = g * row.direction[j];
        fields[2] += p, fields[3] += p < 0 ? -p : p;
      }
    }
    write_scalar(slot, of_warp(fields));
    if (args.slab && touched_row >= args.first_row && touched_row < args.first_row + args.slab_rows) {
      const int64_t n = example_of(args.examples, args.positions, slot);
      columns.store(args.slab + (n * args.slab_rows + touched_row - args.first_row) * args.K, row.gradient);
    }
    row.clear_gradient();
  }

  __device__ __forceinline__ float* piece(int64_t window, int which) const {
    return args.pieces + (window * piece_count + which) * args.K;
  }
  __device__ __forceinline__ void write_sums(int64_t touched_row) {
    const int64_t to = touched_row * args.K;
    columns.store(args.grad_sum + to, row.sums[0]);
    columns.store(args.abs_sum + to, row.sums[1]);
    columns.store(args.sq_sum + to, row.sums[2]);
    row.clear_sums();
  }
  __device__ __forceinline__ void leave_sums(int64_t window, int which) {
#pragma unroll
    for (int f = 0; f < 3; ++f) columns.store(piece(window, which + f), row.sums[f]);
    row.clear_sums();
  }
};

// Returns whether a window has places of the requested rows. Without a slab all rows are requested. Skipped places are processed
// with the first slab.
__device__ __forceinline__ bool is_wanted(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  if (!args.slab) return true;
  const int32_t first = args.places[begin].segment, last = args.places[end - 1].segment;
  if (first < 0) return args.first_row == 0;
  return first / 2 < args.first_row + args.slab_rows && (last < 0 || last / 2 >= args.first_row);
}

// A warp sums one window for one group of columns. Grid: (windows × groups / warps, 1).
template <class E, bool vectors>
__global__ void __launch_bounds__(embedding_threads, 4) embedding_kernel(const __grid_constant__ EmbeddingArgs args) {
  constexpr int numbers = E::numbers;
  const int64_t groups = (args.K + 32 * numbers - 1) / (32 * numbers), windows = (args.count + args.window - 1) / args.window;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * embedding_warps + threadIdx.x / 32;
  if (task >= windows * groups) return;
  const int64_t window = task / groups, begin = window * args.window, end = lesser(begin + args.window, args.count);
  if (!is_wanted(args, begin, end)) return;
  Folding<numbers, vectors> fold(args, task % groups);
  int32_t current = begin ? args.places[begin - 1].segment / 2 : -1;  // the row of the previous place
  int32_t slot = 0;                                                   // the slot of the pair's first place
  int32_t next = 0;                                                   // the segment of the next place
  bool own_row = false, own_pair = false;                             // whether the row or pair begins in this window
  bool has_direction = false;
  for (int64_t from = begin; from < end; from += embedding_ahead) {
    EmbeddingPlace places[embedding_ahead];
    Raw numbers_of[embedding_ahead];
#pragma unroll
    for (int i = 0; i < embedding_ahead; ++i) places[i] = from + i < args.count ? args.places[from + i] : EmbeddingPlace{0, -1, 0};
    const int32_t behind = from + embedding_ahead < args.count ? args.places[from + embedding_ahead].segment : -1;
#pragma unroll
    for (int i = 0; i < embedding_ahead; ++i) {
      numbers_of[i] = {{0, 0, 0, 0}};
      if (from + i < end && places[i].segment >= 0) numbers_of[i] = load_row<E, vectors>(args, fold.columns, places[i].offset);
    }
#pragma unroll
    for (int i = 0; i < embedding_ahead; ++i) {
      if (from + i >= end) continue;
      const int32_t segment = places[i].segment, row = segment / 2;
      next = i + 1 < embedding_ahead ? places[i + 1].segment : behind;
      if (segment < 0) {
        fold.write_scalar(places[i].slot, 0);
        continue;
      }
      if (row != current || !has_direction) {
        own_row = row != current;
        current = row, has_direction = true;
        fold.load_direction(row);
      }
      if (segment % 2)
        slot = places[i].slot, own_pair = true;
      else
        fold.write_scalar(places[i].slot, 0);
#pragma unroll
      for (int j = 0; j < numbers; ++j) fold.row.gradient[j] += E::widen(numbers_of[i], j);
      if (next < 0 || next % 2) {
        if (own_pair) {
          fold.fold_pair(slot, row);
        } else {
          fold.columns.store(fold.piece(window, head_gradient), fold.row.gradient);
          fold.row.clear_gradient();
        }
      }
      if (next < 0 || next / 2 != row) {
        if (own_row)
          fold.write_sums(row);
        else
          fold.leave_sums(window, head_sums);
      }
    }
  }
  // What crosses the window's end. After the last place, `next` is the segment of the place after the window.
  const bool row_goes_on = end < args.count && next >= 0 && next / 2 == current && args.places[end - 1].segment >= 0;
  const bool pair_goes_on = row_goes_on && next % 2 == 0;
  if (pair_goes_on) fold.columns.store(fold.piece(window, own_pair ? tail_gradient : head_gradient), fold.row.gradient);
  if (row_goes_on) fold.leave_sums(window, own_row ? tail_sums : head_sums);
  if (fold.group == 0 && lane_of_warp() == 0) args.open[window] = !pair_goes_on ? open_none : own_pair ? slot : open_throughout;
}

// The pieces of a window for a row that began before it.
template <int numbers>
struct WindowPieces {
  float head[numbers], sums[3][numbers], tail[numbers];
  int32_t open;
  bool goes_on;  // whether the row continues in the next window

  template <class F>
  __device__ __forceinline__ void load(const F& fold, int64_t window, int32_t row) {
    const EmbeddingArgs& args = fold.args;
    const int64_t end = (window + 1) * args.window;
    const int32_t next = end < args.count ? args.places[end].segment : -1;
    goes_on = next >= 0 && next / 2 == row;
    open = args.open[window];
    fold.columns.load(head, fold.piece(window, head_gradient));
    fold.columns.load(tail, fold.piece(window, tail_gradient));
#pragma unroll
    for (int f = 0; f < 3; ++f) fold.columns.load(sums[f], fold.piece(window, head_sums + f));
  }
};

// Adds the rows that cross window boundaries. The warp of the window in which a row begins processes that row. The grid is that of
// the sums. The warp loads the pieces of the next window while it adds those of the current window.
template <int numbers>
__global__ void __launch_bounds__(embedding_threads) embedding_join_kernel(const __grid_constant__ EmbeddingArgs args) {
  const int64_t groups = (args.K + 32 * numbers - 1) / (32 * numbers), windows = (args.count + args.window - 1) / args.window;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * embedding_warps + threadIdx.x / 32;
  if (task >= windows * groups) return;
  int64_t window = task / groups;
  const int64_t begin = window * args.window, end = begin + args.window;
  if (end >= args.count) return;
  const int32_t next = args.places[end].segment, row = next / 2;
  if (next < 0 || args.places[end - 1].segment / 2 != row) return;     // no row crosses the end
  if (begin > 0 && args.places[begin - 1].segment / 2 == row) return;  // it began before this window
  if (args.slab && (row < args.first_row || row >= args.first_row + args.slab_rows)) return;
  Folding<numbers, true> fold(args, task % groups);
  fold.load_direction(row);
#pragma unroll
  for (int f = 0; f < 3; ++f) fold.columns.load(fold.row.sums[f], fold.piece(window, tail_sums + f));
  int32_t slot = args.open[window];  // the slot of the pair that continues, if there is one
  if (slot != open_none) fold.columns.load(fold.row.gradient, fold.piece(window, tail_gradient));
  WindowPieces<numbers> pieces;
  pieces.load(fold, ++window, row);
  for (;;) {
    WindowPieces<numbers> ahead = pieces;
    if (pieces.goes_on) ahead.load(fold, window + 1, row);
    if (slot != open_none) {
#pragma unroll
      for (int j = 0; j < numbers; ++j) fold.row.gradient[j] += pieces.head[j];
      if (pieces.open != open_throughout) {
        fold.fold_pair(slot, row);
        slot = open_none;
      }
    }
#pragma unroll
    for (int f = 0; f < 3; ++f)
#pragma unroll
      for (int j = 0; j < numbers; ++j) fold.row.sums[f][j] += pieces.sums[f][j];
    if (!pieces.goes_on) break;
    if (pieces.open >= 0) {
      slot = pieces.open;
#pragma unroll
      for (int j = 0; j < numbers; ++j) fold.row.gradient[j] = pieces.tail[j];
    }
    pieces = ahead;
    ++window;
  }
  fold.write_sums(row);
}

// The ends --------------------------------------------------------------------------------------------------------------------

// Zeroes the first slab, the slabs of touched rows, and the slab after these. The latter still holds earlier rows, and its Gram
// matrix is added like the others.
__global__ void __launch_bounds__(order_threads) embedding_clear_kernel(const __grid_constant__ EmbeddingClearArgs args) {
  if (args.first_row > 0 && args.first_row - args.slab_rows >= *args.touched) return;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * order_threads + threadIdx.x; at < args.count / 4;
       at += static_cast<int64_t>(gridDim.x) * order_threads)
    reinterpret_cast<Sum4*>(args.slab)[at] = {{0, 0, 0, 0}};
  if (blockIdx.x == 0 && threadIdx.x < args.count % 4) args.slab[args.count / 4 * 4 + threadIdx.x] = 0;
}

// A block adds the scalars of one example in float64 and in a fixed order. The blocks after these fill the rows that no example
// touches. Grid: (N + number of filling blocks, 1).
__global__ void __launch_bounds__(finish_threads) embedding_finish_kernel(const __grid_constant__ EmbeddingFinishArgs args) {
  if (blockIdx.x >= args.num_examples) {
    const int64_t touched = *args.touched, step = (gridDim.x - args.num_examples) * int64_t{finish_threads};
    const int64_t mine = (blockIdx.x - args.num_examples) * int64_t{finish_threads} + threadIdx.x;
    for (int64_t row = touched + mine; row < args.most_rows; row += step) args.rows[row] = -1;
    for (int64_t at = touched * args.K + mine; at < args.most_rows * args.K; at += step)
      args.grad_sum[at] = args.abs_sum[at] = args.sq_sum[at] = 0;
    return;
  }
  double* const held = reinterpret_cast<double*>(dynamic_shared());  // (warps, 4)
  const int64_t n = blockIdx.x, begin = args.begin ? args.begin[n] : n * args.positions;
  const int64_t slots = args.begin ? args.begin[n + 1] - begin : args.positions;
  double total[4] = {0, 0, 0, 0};
  for (int group = 0; group < args.groups; ++group) {
    const float* const scalars = args.scalars + group * args.count * args.fields;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < slots; i += finish_threads) {
      const int64_t slot = args.member ? args.member[begin + i] : begin + i;
      if (args.fields == 4) {
        const Sum4 x = reinterpret_cast<const Sum4*>(scalars)[slot];
#pragma unroll
        for (int f = 0; f < 4; ++f) total[f] += x.v[f];
      } else {
        total[0] += scalars[2 * slot], total[1] += scalars[2 * slot + 1];
      }
    }
  }
#pragma unroll
  for (int f = 0; f < 4; ++f) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) total[f] += shuffle_xor(total[f], mask);
    if (lane_of_warp() == 0) held[threadIdx.x / 32 * 4 + f] = total[f];
  }
  __syncthreads();
  const int field = static_cast<int>(threadIdx.x);
  if (field >= args.fields) return;
  double sum = 0;
  for (int w = 0; w < finish_threads / 32; ++w) sum += held[4 * w + field];
  args.results[field][n] = static_cast<float>(sum);
}

}  // namespace zsl
