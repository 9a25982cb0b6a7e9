// Computes the tiles of examples' gradients by matrix products, g_i = b_iᵀ a_i, in slots of shared memory.
//
// A step covers several positions of a few examples. The steps are staged: copies of the next steps are in flight while one step is
// multiplied. The steps of all examples form one sequence, so that short examples also keep the pipeline full.
#pragma once

#include <device.cuh>

#include "split.cuh"
#include "tile.cuh"

namespace zsl {

struct Float32 {
  using Bits = uint32_t;
};
struct Bfloat16 {
  using Bits = uint16_t;
  __device__ static void multiply(float (&c)[4], const uint32_t (&x)[4], uint32_t y0, uint32_t y1) { mma_bfloat16(c, x, y0, y1); }
};
struct Float16 {
  using Bits = uint16_t;
  __device__ static void multiply(float (&c)[4], const uint32_t (&x)[4], uint32_t y0, uint32_t y1) { mma_float16(c, x, y0, y1); }
};

template <class E, class Tile>
class Product {
  using Bits = typename E::Bits;
  static constexpr int depth = step_bytes / static_cast<int>(sizeof(Bits));  // positions per step
  static constexpr int vector = 16 / static_cast<int>(sizeof(Bits));
  static constexpr int blocks_down = Tile::rows / Tile::warp_rows / 16;
  static constexpr int blocks_across = Tile::cols / Tile::warp_cols / 8;
  static_assert(blocks_across == 2);

  // A step of a sequence: `depth` positions, starting at `position`, of the examples in slots [slot, slot + together).
  struct Step {
    int slot;
    int64_t position, longest;
  };

 public:
  __device__ Product(const ProductArgs& args, const Held& held, const Place<Tile>& place, float* slots, unsigned char* stages)
      : args_(args), held_(held), place_(place), slots_(slots), stages_(stages) {}

  // A barrier precedes the first write to the slots. The barrier at the end of the previous run precedes the first write to the
  // stages.
  __device__ void run() {
    Step fill = first(0), use = first(0);
    int fill_stage = 0, use_stage = 0;
    for (int s = 0; s < Tile::stages - 1; ++s) stage(fill, fill_stage);
    clear();
    while (use.slot < held_.total()) {
      // The common case: the same examples have more steps, and every copy continues the previous one.
      int64_t more = a_vectors_ && b_vectors_ && fill.slot == use.slot ? (fill.longest - fill.position - 1) / depth : 0;
      for (; more > 0; --more) {
        await();
        copy_step<false>(fill, fill_stage);
        copy_async_commit();
        multiply(use_stage);
        fill.position += depth, use.position += depth;
        fill_stage = next(fill_stage), use_stage = next(use_stage);
      }
      await();
      stage(fill, fill_stage);
      multiply(use_stage);
      use_stage = next(use_stage);
      if (use.position + depth >= use.longest) keep(use.slot);
      advance(use);
    }
    copy_async_wait<0>();
    __syncthreads();
    if (args_.added.begin) {
      add_rows();
      __syncthreads();
    }
  }

 private:
  __device__ const Examples& set(int slot) const { return args_.sets[held_.second_set && held_.is_second(slot) ? 1 : 0]; }

  __device__ bool all_vectors(bool of_b) const {
    const Examples &x = set(0), &y = set(held_.total() - 1);
    return of_b ? x.b.vectors && y.b.vectors : x.a.vectors && y.a.vectors;
  }

  __device__ int64_t length(int slot) const {
    if (slot >= held_.total()) return 0;
    const Examples& x = set(slot);
    const int64_t i = held_.example(slot);
    return x.begin ? x.begin[i + 1] - x.begin[i] : x.positions;
  }

  __device__ Step first(int slot) const {
    int64_t longest = 0;
    for (int e = 0; e < Tile::together; ++e) {
      const int64_t own = length(slot + e);
      longest = own > longest ? own : longest;
    }
    return {slot, 0, longest};
  }

  // Waits until the next step has arrived and all threads have finished with the stage that is overwritten next.
  __device__ void await() const {
    copy_async_wait<Tile::stages - 2>();
    __syncthreads();
  }

  __device__ static int next(int stage) { return stage + 1 == Tile::stages ? 0 : stage + 1; }

  __device__ void advance(Step& step) const {
    step.position += depth;
    if (step.position >= step.longest) step = first(step.slot + Tile::together);
  }

  // Starts the copies of a step. Every call commits exactly one group of copies, which may be empty.
  __device__ void stage(Step& step, int& at) {
    if (step.slot < held_.total()) {
      copy_step<true>(step, at);
      advance(step);
      at = next(at);
    }
    copy_async_commit();
  }

  // Any: whether the step may be the first one of its examples, or may have strides that require a copy by elements.
  template <bool Any>
  __device__ void copy_step(const Step& step, int at) {
    Bits* b = reinterpret_cast<Bits*>(stages_ + at * Tile::stage_bytes);
    Bits* a = b + Tile::together * depth * Tile::row_pitch;
    if (!Any || b_vectors_)
      copy<Tile::rows, true, Any>(b, step, b_parts_);
    else
      move<Tile::rows, true>(b, step);
    if (!Any || a_vectors_)
      copy<Tile::cols, false, Any>(a, step, a_parts_);
    else
      move<Tile::cols, false>(a, step);
  }

  // What a thread copies in every step of the same examples: 16 bytes of one position of one example.
  struct Part {
    const Bits* from;  // in the example's first step
    int64_t stride;    // between positions
    int64_t left;      // number of positions, counted from the first step's
    int bytes;         // bytes of features: 16, except at the weight's edge
  };
  template <int Features>
  static constexpr int parts = (Tile::together * depth * Features / vector + threads - 1) / threads;

  template <int Features, bool OfB>
  __device__ Part part(int slot, int t, int f) const {
    const Examples& x = set(slot);
    const Operand& operand = OfB ? x.b : x.a;
    const Bits* data = static_cast<const Bits*>(operand.data);
    const int64_t feature = (OfB ? place_.row : place_.col) + f, features = (OfB ? place_.O : place_.K) - feature;
    const int64_t left = features > 0 ? length(slot) - t : 0;
    if (left <= 0) return {data, 0, 0, 0};
    const int64_t i = held_.example(slot);
    const int64_t first = x.begin ? x.begin[i] * operand.position : i * operand.example;
    return {data + first + t * operand.position + feature * operand.feature, operand.position, left,
            least(features, vector) * static_cast<int>(sizeof(Bits))};
  }

  // Copies (together, depth, Features) of b or a, 16 bytes at a time. It fills with zeros past the example's positions and past the
  // features.
  template <int Features, bool OfB, bool Any>
  __device__ void copy(Bits* to, const Step& step, Part (&own)[parts<Features>]) const {
    constexpr int across = Features / vector, count = Tile::together * depth * across;
#pragma unroll
    for (int p = 0; p < parts<Features>; ++p) {
      const int at = threadIdx.x + p * threads, t = at / across % depth, f = at % across * vector;
      if (count % threads != 0 && at >= count) continue;
      if (Any && step.position == 0) own[p] = part<Features, OfB>(step.slot + at / (depth * across), t, f);
      const bool inside = step.position < own[p].left;
      const Bits* from = inside ? own[p].from + step.position * own[p].stride : own[p].from;
      copy_async(to + at / across * (Features + pad) + f, from, inside ? own[p].bytes : 0);
    }
  }

  // Does the same for any strides, element by element.
  template <int Features, bool OfB>
  __device__ void move(Bits* to, const Step& step) const {
#pragma unroll 1
    for (int at = threadIdx.x; at < Tile::together * depth * Features; at += threads) {
      const int t = at / Features % depth, f = at % Features;
      const Part x = part<Features, OfB>(step.slot + at / (depth * Features), t, f);
      to[at / Features * (Features + pad) + f] = step.position < x.left ? x.from[step.position * x.stride] : Bits(0);
    }
  }

  __device__ int warp() const { return threadIdx.x / warp_size; }
  __device__ int lane() const { return threadIdx.x % warp_size; }
  __device__ int own_example() const { return warp() / (Tile::warp_rows * Tile::warp_cols); }
  __device__ int own_row() const { return warp() / Tile::warp_cols % Tile::warp_rows * blocks_down * 16; }
  __device__ int own_col() const { return warp() % Tile::warp_cols * blocks_across * 8; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < blocks_down; ++i)
#pragma unroll
      for (int j = 0; j < blocks_across; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[i][j][e] = 0;
  }

  // Adds the step's product to the warp's part of its example's tile.
  __device__ void multiply(int at) {
    // (depth, rows) of b and (depth, cols) of a
    const Bits* panels = reinterpret_cast<const Bits*>(stages_ + at * Tile::stage_bytes);
    const Bits* b = panels + own_example() * depth * Tile::row_pitch + own_row();
    const Bits* a = panels + (Tile::together * Tile::row_pitch + own_example() * Tile::col_pitch) * depth + own_col();
    if constexpr (sizeof(Bits) == 2)
      multiply_halves(b, a);
    else
      multiply_floats(b, a);
  }

  __device__ void multiply_halves(const Bits* b, const Bits* a) {
    // Lane 8m + r holds the address of row r of matrix m. The matrices of b advance along its features first, those of a along its
    // positions.
    const int r = lane() % 8, low = lane() / 8 % 2 * 8, high = lane() / 16 * 8;
    float step[blocks_down][blocks_across][4] = {};  // split.cuh explains why the matrix unit does not add it
#pragma unroll
    for (int t = 0; t < depth; t += 16) {
      uint32_t y[4];
      load_matrices_transposed(y, a + (t + low + r) * Tile::col_pitch + high);
#pragma unroll
      for (int i = 0; i < blocks_down; ++i) {
        uint32_t x[4];
        load_matrices_transposed(x, b + (t + high + r) * Tile::row_pitch + i * 16 + low);
#pragma unroll
        for (int j = 0; j < blocks_across; ++j) E::multiply(step[i][j], x, y[2 * j], y[2 * j + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < blocks_down; ++i)
#pragma unroll
      for (int j = 0; j < blocks_across; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[i][j][e] += step[i][j][e];
  }

  __device__ void multiply_floats(const Bits* b, const Bits* a) {
    const int row = lane() / 4, t0 = lane() % 4;
#pragma unroll
    for (int t = 0; t < depth; t += 8) {
      Split y[blocks_across][2];
#pragma unroll
      for (int j = 0; j < blocks_across; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) y[j][e] = split(float_of(a[(t + t0 + 4 * e) * Tile::col_pitch + j * 8 + row]));
#pragma unroll
      for (int i = 0; i < blocks_down; ++i) {
        Split x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
          x[e] = split(float_of(b[(t + t0 + 4 * (e / 2)) * Tile::row_pitch + i * 16 + row + 8 * (e % 2)]));
#pragma unroll
        for (int j = 0; j < blocks_across; ++j) multiply_split(sums_[i][j], x, y[j], args_.sizes.exact);
      }
    }
  }

  // Moves the finished tile of the warp's example to its slot. It writes zeros past the weight's edge, where the products of packed
  // zeros are NaN if the other operand is not finite.
  __device__ void keep(int slot) {
    slot += own_example();
    if (slot < held_.total()) {
      float* to = slots_ + slot * Tile::slot_floats;
#pragma unroll
      for (int i = 0; i < blocks_down; ++i)
#pragma unroll
        for (int j = 0; j < blocks_across; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = own_row() + i * 16 + lane() / 4 + 8 * (e / 2), col = own_col() + j * 8 + lane() % 4 * 2 + e % 2;
            const int at = row * Tile::cols + col;
            to[at] = place_.has(at) ? sums_[i][j][e] : 0.0f;
          }
    }
    clear();
  }

  // Adds the rows of a tied weight that lie in the tile, for every example. There is at most one for each row of an example's
  // gradient.
  __device__ void add_rows() const {
    const Added& added = args_.added;
    for (int slot = warp(); slot < held_.total(); slot += warps) {
      const int64_t i = held_.example(slot);
      int64_t low = added.begin[i], high = added.begin[i + 1];
      const int64_t end = high;
      while (low < high) {  // find the first one at or past the tile's first row
        const int64_t middle = (low + high) / 2;
        if (added.feature[middle] < place_.row)
          low = middle + 1;
        else
          high = middle;
      }
      for (; low < end && added.feature[low] < place_.row + Tile::rows; ++low) {
        // (cols,) of the row's values
        float* to = slots_ + slot * Tile::slot_floats + (added.feature[low] - place_.row) * Tile::cols;
        for (int col = lane(); col < Tile::cols; col += warp_size)
          if (place_.col + col < place_.K) to[col] += added.values[low * place_.K + place_.col + col];
      }
    }
  }

  const ProductArgs& args_;
  const Held& held_;
  const Place<Tile>& place_;
  float* slots_;
  unsigned char* stages_;
  const bool a_vectors_ = all_vectors(false), b_vectors_ = all_vectors(true);
  Part a_parts_[parts<Tile::cols>], b_parts_[parts<Tile::rows>];
  float sums_[blocks_down][blocks_across][4];
};

}  // namespace zsl
