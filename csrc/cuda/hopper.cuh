// The product kernels for compute capability 9.0, which form per-example gradients g_i = b_iᵀ a_i of one weight.
//
// They compute sums, scalars and a slab for `interference` and `gram`, only scalars for `sq_norm` and `dot`, and a weighted sum for
// `weighted_grad`.
//
// A block has a 128 × 128 tile of the weight. One warpgroup copies boxes of the operands into a ring of stages, which continues
// across examples. Two other warpgroups compute the tile of each g_i in registers, 64 rows each, and fold it. Σ g and Σ |g| stay in
// registers. Σ g² stays in shared memory in the order of the threads, which avoids bank conflicts. The kernels use no atomics, so
// results are bitwise reproducible.
#pragma once

#include <device.cuh>
#include <hopper_device.cuh>

#include "hopper_args.h"

namespace zsl {

constexpr int hopper_sum_run = 64;  // examples whose gradients are summed before their sum is added to the total

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(16) Word4 {
  uint32_t v[4];
};
struct alignas(8) Float2 {
  float v[2];
};

struct HopperShared {
  unsigned char stages[hopper_stages][4 * box_bytes];  // two boxes of b, two of a
  Float4 squares[16][hopper_consumers];
  Barrier full[hopper_stages], empty[hopper_stages];

  // The direction's tile, in the order of the threads. It occupies the last two stages if squares are summed, and otherwise the
  // memory of the squares.
  template <Fold fold>
  __device__ __forceinline__ Float4* direction() {
    return fold == Fold::sums ? reinterpret_cast<Float4*>(stages[hopper_stages - 2]) : squares[0];
  }
};
static_assert(2 * 4 * box_bytes == sizeof(float) * tile_floats);

struct HopperArgs {
  TensorMap a, b;
  HopperOperands operands;
  HopperSchedule schedule;
  HopperResults results;
  HopperAdded added;
  int scalars;  // number of requested scalars per example
};

enum class Slab { none, bfloat16, float32 };

// The position of a tile of the weight. Tiles that are processed at the same time form a block of the weight and share operands in
// the L2 cache.
struct TilePlace {
  int row, col;    // the corner
  int rows, cols;  // number of rows and columns that the weight has here

  __device__ __forceinline__ TilePlace(int tile, int64_t O, int64_t K, int group) {
    const int down = static_cast<int>((O + hopper_tile - 1) / hopper_tile),
              across = static_cast<int>((K + hopper_tile - 1) / hopper_tile);
    const int at = tile / (group * across), first = at * group, within = tile - at * group * across;
    const int high = down - first < group ? down - first : group;
    row = (first + within % high) * hopper_tile, col = within / high * hopper_tile;
    rows = O - row < hopper_tile ? static_cast<int>(O - row) : hopper_tile;
    cols = K - col < hopper_tile ? static_cast<int>(K - col) : hopper_tile;
  }
  __device__ __forceinline__ bool whole() const { return rows == hopper_tile && cols == hopper_tile; }
};

// Selects the parts of b and a for each product of float32, smallest first. Only the last product contains infinities. In the
// others they would be multiplied by zeros. The first three products are omitted if tf32 precision suffices.
__device__ __forceinline__ void parts_of(int product, int products, int& of_b, int& of_a) {
  constexpr unsigned b_parts = high << 20 | finite << 16 | middle << 12 | middle << 8 | finite << 4 | low;
  constexpr unsigned a_parts = high << 20 | middle << 16 | finite << 12 | middle << 8 | low << 4 | finite;
  const int at = 4 * (6 - products + product);
  of_b = products == 1 ? 0 : b_parts >> at & 15, of_a = products == 1 ? 0 : a_parts >> at & 15;
}

struct Ring {
  int stage = 0, parity, stages;
  __device__ Ring(int parity, int stages) : parity(parity), stages(stages) {}
  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ int before() const { return (stage ? stage : stages) - 1; }
};

template <Fold fold>
__device__ __forceinline__ int stages_of(const HopperResults& out) {
  return fold == Fold::sums && out.direction ? hopper_stages - 2 : hopper_stages;
}

struct ThreadPlace {
  int thread, lane, warp;
  __device__ ThreadPlace() : thread(threadIdx.x), lane(thread % 32), warp(thread / 32) {}
  __device__ __forceinline__ int row() const { return warp * 16 + lane / 4; }
  __device__ __forceinline__ int col() const { return lane % 4 * 2; }
};

__device__ __forceinline__ int steps_of(const HopperOperands& x, int n) { return x.begin ? x.begin[n + 1] - x.begin[n] : x.steps; }

__device__ inline void copy_operands(const HopperArgs& args, HopperShared& shared, const TilePlace& tile, int from, int to,
                                     int stages) {
  const HopperOperands& x = args.operands;
  Ring ring(1, stages);
  for (int n = from; n < to; ++n) {
    const int steps = steps_of(x, n), first = x.begin ? x.begin[n] : 0, example = x.begin ? 0 : n;
    for (int p = 0; p < x.products; ++p) {
      int of_b, of_a;
      parts_of(p, x.products, of_b, of_a);
      for (int k = 0; k < steps; ++k) {
        Barrier* const full = &shared.full[ring.stage];
        unsigned char* const stage = shared.stages[ring.stage];
        const int position = (first + k) * box_positions;
        barrier_wait(&shared.empty[ring.stage], ring.parity);
        barrier_expect(full, 4 * box_bytes);
        for (int j = 0; j < 2; ++j) {
          const int feature = j * box_features;
          copy_box(stage + j * box_bytes, &args.b, full, tile.row + feature, position, example, of_b);
          copy_box(stage + (2 + j) * box_bytes, &args.a, full, tile.col + feature, position, example, of_a);
        }
        ring.next();
      }
    }
  }
}

// Computes the tile of one example, which has at least one step.
template <class E>
__device__ __forceinline__ void form_tile(float (&c)[64], HopperShared& shared, Ring& ring, int steps, int thread) {
  const int warpgroup = thread / 128;
  const bool speaks = thread % 128 == 0;
  for (int k = 0; k < steps; ++k) {
    barrier_wait(&shared.full[ring.stage], ring.parity);
    const unsigned char* const stage = shared.stages[ring.stage];
    const BoxPlace b = place_of(stage + warpgroup * box_bytes), a = place_of(stage + 2 * box_bytes);
    products_begin();
#pragma unroll
    for (int at = 0; at < box_positions; at += 16) E::multiply_boxes(c, further(b, at), further(a, at), (k | at) != 0);
    products_commit();
    if (k > 0) {
      products_wait<1>();
      if (speaks) barrier_arrive(&shared.empty[ring.before()]);
    }
    ring.next();
  }
  products_wait<0>();
  if (speaks) barrier_arrive(&shared.empty[ring.before()]);
}

// Adds the rows of a tied weight's lookups that lie in the tile.
__device__ __forceinline__ void add_rows(float (&c)[64], const HopperAdded& added, int n, const TilePlace& tile, int64_t O,
                                         int64_t K, const ThreadPlace& my) {
  const int64_t rows = (O + hopper_tile - 1) / hopper_tile, at = n * (rows + 1) + tile.row / hopper_tile;
  const int64_t end = added.bound[at + 1];
#pragma unroll 1
  for (int64_t p = added.bound[at]; p < end; ++p) {
    const int down = static_cast<int>(added.feature[p] - tile.row) - my.row();
    if (down != 0 && down != 8) continue;
    const float* const values = added.values + p * K + tile.col + my.col();
#pragma unroll
    for (int i = 0; i < 16; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float value = 8 * i + my.col() + j < tile.cols ? values[8 * i + j] : 0;
        c[4 * i + j] += down == 0 ? value : 0;
        c[4 * i + 2 + j] += down == 0 ? 0 : value;
      }
  }
}

// Fills with zeros past the edge of the weight. Each thread reads only what it has written itself.
__device__ inline void load_direction(const HopperResults& out, Float4* to, const TilePlace& tile, const ThreadPlace& my) {
  const float* u = out.direction + (tile.row + my.row()) * out.direction_row + (tile.col + my.col()) * out.direction_col;
  const int rows = tile.rows - my.row(), cols = tile.cols - my.col();
#pragma unroll 4
  for (int i = 0; i < 16; ++i, u += 8 * out.direction_col) {
    Float4 four;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int down = j / 2 * 8, right = j % 2;
      four.v[j] = down < rows && 8 * i + right < cols ? u[down * out.direction_row + right * out.direction_col] : 0;
    }
    to[i * hopper_consumers + my.thread] = four;
  }
}

__device__ __forceinline__ float of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Computes Σ g u and Σ |g u| over a thread's part of a tile.
__device__ __forceinline__ void multiply_direction(const float (&c)[64], const Float4* direction, const ThreadPlace& my, float& dot,
                                                   float& abs_dot) {
  dot = abs_dot = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const Float4 u = direction[i * hopper_consumers + my.thread];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float p = c[4 * i + j] * u.v[j];
      dot += p, abs_dot += p < 0 ? -p : p;
    }
  }
}

// Returns the sign as torch.sign does.
__device__ __forceinline__ float sign_of(float x) { return static_cast<float>((x > 0) - (x < 0)); }

// Writes two adjacent numbers, or adds them to the results of an earlier run of examples.
__device__ __forceinline__ void store_pair(float* to, float x, float y, bool begins, bool pair, bool second) {
  if (pair) {
    Float2 both = {{x, y}};
    if (!begins) {
      const Float2 before = *reinterpret_cast<const Float2*>(to);
      both = {{x + before.v[0], y + before.v[1]}};
    }
    *reinterpret_cast<Float2*>(to) = both;
    return;
  }
  to[0] = begins ? x : to[0] + x;
  if (second) to[1] = begins ? y : to[1] + y;
}

template <class E, Slab slab_type, Fold fold>
__global__ void __launch_bounds__(hopper_threads, 1) hopper_kernel(const __grid_constant__ HopperArgs args) {
  HopperShared& shared = *reinterpret_cast<HopperShared*>(dynamic_shared_of_boxes());
  const HopperOperands& x = args.operands;
  const HopperSchedule& s = args.schedule;
  const HopperResults& out = args.results;
  constexpr bool sums = fold == Fold::sums, weighted = fold == Fold::weighted;
  const int block = static_cast<int>(blockIdx.x), rest = block - s.whole;
  const bool split = rest >= 0;
  const int local = split ? s.whole + rest / s.parts : block, part = split ? rest % s.parts : 0, of = split ? s.parts : 1;
  const int from = static_cast<int>(static_cast<int64_t>(x.examples) * part / of);
  const int to = static_cast<int>(static_cast<int64_t>(x.examples) * (part + 1) / of);
  const TilePlace tile(s.first + local, x.O, x.K, s.group);

  if (threadIdx.x == 0) {
    for (int i = 0; i < hopper_stages; ++i) barrier_init(&shared.full[i], 1), barrier_init(&shared.empty[i], 2);
    barriers_made();
  }
  __syncthreads();
  if (threadIdx.x >= hopper_consumers) {
    give_registers<24>();
    if (threadIdx.x == hopper_consumers) copy_operands(args, shared, tile, from, to, stages_of<fold>(out));
    return;
  }
  take_registers<240>();

  const ThreadPlace my;
  Ring ring(0, stages_of<fold>(out));
  if (fold != Fold::none && out.direction) load_direction(out, shared.direction<fold>(), tile, my);
  float c[64], sum[64], size[64];
  for (int run = from; run < to; run += hopper_sum_run) {
    const int end = run + hopper_sum_run < to ? run + hopper_sum_run : to;
    if (sums || weighted) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sum[i] = size[i] = 0;
    }
    if (sums) {
#pragma unroll
      for (int i = 0; i < 16; ++i) shared.squares[i][my.thread] = {{0, 0, 0, 0}};
    }
    for (int n = run; n < end; ++n) {
      // These loads overlap with the computation of the tile.
      const float weight = weighted ? out.weights[n] : 0, abs_weight = weighted && out.abs_weights ? out.abs_weights[n] : 0;
      form_tile<E>(c, shared, ring, steps_of(x, n) * x.products, my.thread);
      if (weighted) {  // values outside the weight are not stored
#pragma unroll
        for (int e = 0; e < 64; ++e) sum[e] += weight * c[e];
        if (out.abs_weights) {
#pragma unroll
          for (int e = 0; e < 64; ++e) size[e] += abs_weight * (c[e] < 0 ? -c[e] : c[e]);
        }
        continue;
      }
      if (fold != Fold::scalars && args.added.bound) add_rows(c, args.added, n, tile, x.O, x.K, my);
      if (!tile.whole()) {
        // Outside the weight one operand is zero, but zero times infinity is NaN.
        const int rows = hidden(tile.rows) - my.row(), cols = hidden(tile.cols) - my.col();
#pragma unroll
        for (int e = 0; e < 64; ++e)
          if (e / 2 % 2 * 8 >= rows || e / 4 * 8 + e % 2 >= cols) c[e] = 0;
      }
      if (slab_type == Slab::bfloat16) {
        Word4* const slab = static_cast<Word4*>(out.slab) + (static_cast<int64_t>(n) * s.tiles + local) * 8 * hopper_consumers;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          Word4 packed;
#pragma unroll
          for (int j = 0; j < 4; ++j) packed.v[j] = round_to_bfloat16(c[8 * i + 2 * j], c[8 * i + 2 * j + 1]);
          slab[i * hopper_consumers + my.thread] = packed;
        }
      }
      if (slab_type == Slab::float32) {
        Float4* const slab = static_cast<Float4*>(out.slab) + (static_cast<int64_t>(n) * s.tiles + local) * 16 * hopper_consumers;
#pragma unroll
        for (int i = 0; i < 16; ++i)
          slab[i * hopper_consumers + my.thread] = {{c[4 * i], c[4 * i + 1], c[4 * i + 2], c[4 * i + 3]}};
      }
      if (fold == Fold::none) continue;
      const int64_t partials = static_cast<int64_t>(hidden(s.tiles)) * hopper_warps, field = x.examples * partials;
      float* scalars = out.scalars + n * partials + local * hopper_warps + my.warp;
      if (fold == Fold::scalars) {
        if (out.sq_norm) {
          float squared[2] = {0, 0};
#pragma unroll
          for (int e = 0; e < 64; ++e) squared[e % 2] += c[e] * c[e];
          const float squared_of_warp = of_warp(squared[0] + squared[1]);
          if (my.lane == 0) scalars[0] = squared_of_warp;
          scalars += field;
        }
        if (out.dot) {
          float dot, abs_dot;
          multiply_direction(c, shared.direction<fold>(), my, dot, abs_dot);
          dot = of_warp(dot);
          if (my.lane == 0) scalars[0] = dot;
        }
        continue;
      }
      float l1[2] = {0, 0}, squared[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        Float4 sq = shared.squares[i][my.thread];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float g = c[4 * i + j], magnitude = g < 0 ? -g : g;
          sum[4 * i + j] += g, size[4 * i + j] += magnitude, sq.v[j] += g * g;
          l1[j % 2] += magnitude, squared[j % 2] += g * g;
        }
        shared.squares[i][my.thread] = sq;
      }
      const float l1_of_warp = of_warp(l1[0] + l1[1]);
      const float squared_of_warp = of_warp(squared[0] + squared[1]);
      if (my.lane == 0) scalars[0] = l1_of_warp, scalars[field] = squared_of_warp;
      if (out.direction) {
        float dot, abs_dot;
        multiply_direction(c, shared.direction<fold>(), my, dot, abs_dot);
        dot = of_warp(dot), abs_dot = of_warp(abs_dot);
        if (my.lane == 0) scalars[2 * field] = dot, scalars[3 * field] = abs_dot;
      }
    }
    constexpr int matrices = matrices_of<fold>;
    if (matrices == 0) continue;
    if (weighted && out.abs_weights) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const Float4 u = shared.direction<fold>()[i * hopper_consumers + my.thread];
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[4 * i + j] += sign_of(u.v[j]) * size[4 * i + j];
      }
    }
    const bool begins = run == from;
    if (split && s.parts > 1) {
      constexpr int part_floats = matrices * tile_floats;
      Float4* work = reinterpret_cast<Float4*>(out.workspace + static_cast<int64_t>(hidden(rest)) * part_floats) + my.thread;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        Float4 sq;
        if (sums) sq = shared.squares[i][my.thread];
#pragma unroll
        for (int f = 0; f < matrices; ++f) {
          Float4 total = {{0, 0, 0, 0}};
          if (!begins) total = work[16 * f * hopper_consumers];
#pragma unroll
          for (int j = 0; j < 4; ++j) total.v[j] += f == 0 ? sum[4 * i + j] : f == 1 ? size[4 * i + j] : sq.v[j];
          work[16 * f * hopper_consumers] = total;
        }
        work = hidden(work + hopper_consumers);
      }
      continue;
    }
    const int rows = hidden(tile.rows) - my.row(), cols = hidden(tile.cols) - my.col();
    const bool pairs = x.K % 2 == 0;  // whether two adjacent numbers can be written at once
    int64_t at = hidden((tile.row + my.row()) * x.K + tile.col + my.col());
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      Float4 sq;
      if (sums) sq = shared.squares[i][my.thread];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (8 * h < rows && 8 * i < cols) {
          const int e = 4 * i + 2 * h;
          const int64_t to = at + 8 * h * x.K;
          store_pair(out.grad_sum + to, sum[e], sum[e + 1], begins, pairs, 8 * i + 1 < cols);
          if (!sums) continue;
          store_pair(out.abs_sum + to, size[e], size[e + 1], begins, pairs, 8 * i + 1 < cols);
          store_pair(out.sq_sum + to, sq.v[2 * h], sq.v[2 * h + 1], begins, pairs, 8 * i + 1 < cols);
        }
      at = hidden(at + 8);
    }
  }
}

// Finishes a launch: it adds the parts of split tiles, in order, and the partial scalars, in float64. Grid: (split tiles × matrices
// × 16 + blocks of scalars, 1). A block has as many threads as there are consumers, and a warp adds one scalar of one example.
template <Fold fold>
__global__ void __launch_bounds__(hopper_consumers) finish_kernel(const __grid_constant__ HopperArgs args) {
  const HopperSchedule& s = args.schedule;
  const HopperOperands& x = args.operands;
  const HopperResults& out = args.results;
  const ThreadPlace my;
  constexpr int matrices = matrices_of<fold>;
  const int split_blocks = s.parts > 1 ? (s.tiles - s.whole) * matrices * 16 : 0, block = static_cast<int>(blockIdx.x);
  if (block >= split_blocks) {
    const int64_t count = static_cast<int64_t>(s.tiles) * hopper_warps;
    const int64_t at = static_cast<int64_t>(block - split_blocks) * hopper_warps + my.warp;
    if (at >= args.scalars * static_cast<int64_t>(x.examples)) return;
    double total = 0;
    for (int64_t i = my.lane; i < count; i += 32) total += out.scalars[at * count + i];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) total += shuffle_xor(total, mask);
    const int64_t field = fold == Fold::sums ? at / x.examples : at >= x.examples || !out.sq_norm ? 2 : 1, n = at % x.examples;
    float* const to = (field == 0 ? out.l1 : field == 1 ? out.sq_norm : field == 2 ? out.dot : out.abs_dot) + n;
    if (my.lane == 0) *to = s.first ? static_cast<float>(*to + total) : static_cast<float>(total);
    return;
  }
  if (matrices == 0) return;
  constexpr int blocks = 16 * (matrices ? matrices : 1), part_floats = matrices * tile_floats;
  const int tile_of_split = block / blocks, field = block % blocks / 16, i = block % 16;
  const TilePlace tile(s.first + s.whole + tile_of_split, x.O, x.K, s.group);
  const float* const work = out.workspace + static_cast<int64_t>(tile_of_split) * s.parts * part_floats;
  Float4 total = {{0, 0, 0, 0}};
  for (int p = 0; p < s.parts; ++p) {
    const Float4* const parts = reinterpret_cast<const Float4*>(work + static_cast<int64_t>(p) * part_floats);
    const Float4 part = parts[(16 * field + i) * hopper_consumers + my.thread];
#pragma unroll
    for (int j = 0; j < 4; ++j) total.v[j] += part.v[j];
  }
  float* const sums = field == 0 ? out.grad_sum : field == 1 ? out.abs_sum : out.sq_sum;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int down = my.row() + j / 2 * 8, right = 8 * i + my.col() + j % 2;
    if (down < tile.rows && right < tile.cols) sums[(tile.row + down) * x.K + tile.col + right] = total.v[j];
  }
}

}  // namespace zsl
