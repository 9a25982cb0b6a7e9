// What the row kernels are called with: gradients that are held, and those of scales and biases. Letters as in
// args.h.
#pragma once

#include "args.h"

namespace zsl {

constexpr int row_threads = 256, row_warps = row_threads / 32;
constexpr int dense_run = 64;  // examples that a warp adds, at most: the sums of several runs are added in float64

// The sums and the scalars of gradients g (N, P). A block has `columns = row_warps / lanes` pieces of the coordinates, each of
// which `lanes` warps share: they take the examples in turn. blockIdx.y is the block's part of the examples.
struct DenseArgs {
  Operand g;            // (N, 1, P)
  int64_t count;        // N
  int64_t coordinates;  // P
  int64_t padded;       // coordinates of a slab's row, P and zeros behind them; P without a slab
  int64_t part;         // examples of a block, dense_run × lanes at most
  int lanes;            // 1, 2, 4 or 8
  int held;             // examples of a warp, dense_run at most
  float* sums;          // (parts, 3, P) grad_sum, abs_sum, sq_sum, where there are several parts of the examples
  double* scalars;      // (blocks of coordinates, 2 or 4, N) l1, sq_norm, dot, abs_dot, where there are several such blocks
  float *grad_sum, *abs_sum, *sq_sum;   // (P,)
  float *l1, *sq_norm, *dot, *abs_dot;  // (N,)
  const float* direction;               // (P,) or null
  int64_t direction_stride;
  bool direction_vectors, sums_vectors;  // whether 16 bytes of them can be read, or written, at a time
  void* slab;  // (N, padded): the gradients as slab_gram.cuh reads them, of float16 ones in float32; null if it is not wanted
};

// scale_i = Σ_t b_it (x_it - mean_it) rstd_it and bias_i = Σ_t b_it. blockIdx.y is the block's part of an example's positions.
struct ScaleBiasArgs {
  Operand x, b;              // (N, T, K), or rows (R, K); x.data is null where the bias alone is wanted
  const float *mean, *rstd;  // (N, T) or (R,), or null
  int64_t mean_example, mean_position, rstd_example, rstd_position;  // strides
  const int64_t* begin;                // (N + 1,) ragged: example i has the rows order[begin[i]] to order[begin[i + 1] - 1]
  const int64_t* order;                // (R,), or null: the rows as they are
  int64_t count, positions, features;  // N, T, K
  int lanes;                           // threads that share a row, a power of two up to 32
  float *scale, *bias;                 // (parts, N, K) each; either may be null
  int64_t next_part;                   // numbers from a part's sums to those of the next one
};

// Rows of numbers that are added up in order, in float64, and rounded.
struct Partials {
  const void* from;  // (rows, width)
  bool wide;         // whether they are float64 numbers, else float32
  int64_t rows, width;
  int64_t blocks;  // of the launch, that add these
  int64_t each;    // numbers of a result: `width` of them are one result behind the other
  float* to[4];    // results
  int64_t side;    // of a symmetric matrix that is right on and above its diagonal alone; else 0
};

constexpr int partials_at_once = 3;
struct AddPartialsArgs {
  Partials of[partials_at_once];  // those that are not there have no blocks
};

}  // namespace zsl
