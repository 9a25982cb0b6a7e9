// What the kernels of compute capability 9.0 are called with. Letters as in args.h.
#pragma once

#include <cstdint>

namespace zsl {

constexpr int hopper_tile = 128;                     // rows and columns of a tile of the weight
constexpr int hopper_consumers = 256;                // threads that multiply and fold: two warpgroups, each with 64 rows
constexpr int hopper_threads = 384;                  // with the warpgroup that copies
constexpr int hopper_warps = hopper_consumers / 32;  // that leave partial scalars
constexpr int hopper_stages = 5;
constexpr int tile_floats = hopper_tile * hopper_tile;

// What becomes of the tile of an example's gradient, beside what a slab keeps.
enum class Fold : int {
  none,
  sums,      // Σ g, Σ |g|, Σ g², and the example's scalars
  scalars,   // those of sq_norm and dot that are asked for
  weighted,  // Σ_i w_i g_i, and sign(u) Σ_i v_i |g_i|
};

// Matrices (O, K) that it makes.
template <Fold fold>
constexpr int matrices_of = fold == Fold::sums       ? 3
                            : fold == Fold::weighted ? 1
                                                     : 0;

// The parts of float32 numbers, each bfloat16: x = high + middle + low. `finite` is high where that is finite, else zero.
enum Part : int { high, middle, low, finite, part_count };

// How a call goes over blocks. The first `whole` tiles have a block each, which goes through all examples. Those behind them are
// split into `parts` of the examples, whose sums are added by a second kernel.
struct HopperSchedule {
  int first;  // tile of the launch
  int tiles;  // of the launch
  int whole, parts;
  int group;  // rows of tiles that are in work at one time
};

struct HopperOperands {
  int examples, steps;  // steps of 64 positions of an example
  const int* begin;     // (N + 1,) ragged: the first step of each example, which has one at least; else null
  int products;         // of parts: 1 of half precision, 3 or 6 of float32
  int64_t O, K;
};

struct HopperResults {
  float *grad_sum, *abs_sum, *sq_sum;   // (O, K); the first is that of Fold::weighted too
  float *l1, *sq_norm, *dot, *abs_dot;  // (N,); of Fold::scalars null where not asked for
  float* scalars;                       // (those asked for, N, tiles of the launch × warps): partial l1, sq_norm, dot, abs_dot
  float* workspace;                     // (split tiles × parts, matrices, tile_floats)
  void* slab;                           // (N, tiles of the launch, 128 × 128) gradients in the threads' order, or null
  const float* direction;               // (O, K) or null
  int64_t direction_row, direction_col;
  const float *weights, *abs_weights;  // (N,) w and v of Fold::weighted; v null if there is none, else with a direction
};

// Rows added to the gradients of a tied weight.
struct HopperAdded {
  const int64_t* bound;    // (N, rows of tiles + 1): where each row of tiles has its part of `feature`; null if there are none
  const int64_t* feature;  // (P,)
  const float* values;     // (P, K)
};

}  // namespace zsl
