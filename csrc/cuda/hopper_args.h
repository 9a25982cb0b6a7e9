// The arguments of the kernels for compute capability 9.0. The letters are those of args.h.
#pragma once

#include <cstdint>

namespace zsl {

constexpr int hopper_tile = 128;                     // rows and columns of a tile of the weight
constexpr int hopper_consumers = 256;                // threads that multiply and fold: two warpgroups with 64 rows each
constexpr int hopper_threads = 384;                  // including the warpgroup that copies
constexpr int hopper_warps = hopper_consumers / 32;  // warps that write partial scalars
constexpr int hopper_stages = 5;
constexpr int tile_floats = hopper_tile * hopper_tile;

// What the kernel does with the tile of an example's gradient, apart from writing it to a slab.
enum class Fold : int {
  none,
  sums,      // Σ g, Σ |g|, Σ g² and the example's scalars
  scalars,   // sq_norm and dot, as far as requested
  weighted,  // Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|
};

// The number of (O, K) matrices that a fold writes.
template <Fold fold>
constexpr int matrices_of = fold == Fold::sums       ? 3
                            : fold == Fold::weighted ? 1
                                                     : 0;

// The bfloat16 parts of a float32 number: x = high + middle + low. `finite` is high if high is finite, otherwise zero.
enum Part : int { high, middle, low, finite, part_count };

// How blocks divide the work of a call. Each of the first `whole` tiles has one block, which processes all examples. Each of the
// other tiles is split into `parts` parts of the examples. A second kernel adds the sums of the parts.
struct HopperSchedule {
  int first;  // first tile of the launch
  int tiles;  // number of tiles of the launch
  int whole, parts;
  int group;  // rows of tiles that are processed at the same time
};

struct HopperOperands {
  int examples, steps;  // steps: the number of steps of 64 positions per example
  const int* begin;     // (N + 1,) for ragged rows: the first step of each example, which has at least one; otherwise null
  int products;         // number of products of parts: 1 for half precision, 3 or 6 for float32
  int64_t O, K;
};

struct HopperResults {
  float *grad_sum, *abs_sum, *sq_sum;   // (O, K); Fold::weighted also writes to the first
  float *l1, *sq_norm, *dot, *abs_dot;  // (N,); with Fold::scalars null if not requested
  float* scalars;                       // (requested scalars, N, tiles of the launch × warps): partial l1, sq_norm, dot, abs_dot
  float* workspace;                     // (split tiles × parts, matrices, tile_floats)
  void* slab;                           // (N, tiles of the launch, 128 × 128) gradients in the order of the threads, or null
  const float* direction;               // (O, K) or null
  int64_t direction_row, direction_col;
  const float *weights, *abs_weights;  // (N,) w and v of Fold::weighted; v may be null and requires a direction
};

// Rows that are added to the gradients of a tied weight.
struct HopperAdded {
  const int64_t* bound;    // (N, rows of tiles + 1): bounds of each row of tiles in `feature`; null if there are none
  const int64_t* feature;  // (P,)
  const float* values;     // (P, K)
};

}  // namespace zsl
