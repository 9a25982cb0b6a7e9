// The arguments of the row kernels, for gradients that are already in memory and for gradients of scales and biases.
//
// The letters are those of args.h.
#pragma once

#include "args.h"

namespace zsl {

constexpr int row_threads = 256, row_warps = row_threads / 32;
constexpr int dense_run = 64;  // maximum number of examples that a warp sums; the sums of several runs are added in float64

// Arguments for the sums and scalars of gradients g (N, P). A block processes `columns = row_warps / lanes` pieces of the
// coordinates. `lanes` warps share each piece and take the examples in turn. blockIdx.y is the block's part of the examples.
struct DenseArgs {
  Operand g;            // (N, 1, P)
  int64_t count;        // N
  int64_t coordinates;  // P
  int64_t padded;       // coordinates per row of a slab: P, then zeros; P without a slab
  int64_t part;         // examples per block, at most dense_run × lanes
  int lanes;            // 1, 2, 4 or 8
  int held;             // examples per warp, at most dense_run
  float* sums;          // (parts, 3, P) grad_sum, abs_sum, sq_sum, if there are several parts of the examples
  double* scalars;      // (blocks of coordinates, 2 or 4, N) l1, sq_norm, dot, abs_dot, if there are several such blocks
  float *grad_sum, *abs_sum, *sq_sum;   // (P,)
  float *l1, *sq_norm, *dot, *abs_dot;  // (N,)
  const float* direction;               // (P,) or null
  int64_t direction_stride;
  bool direction_vectors, sums_vectors;  // whether they can be read or written 16 bytes at a time
  void* slab;  // (N, padded): the gradients in the layout of slab_gram.cuh, float16 ones as float32; null if not requested
};

// Computes scale_i = Σ_t b_it (x_it - mean_it) rstd_it and bias_i = Σ_t b_it. blockIdx.y is the block's part of an example's
// positions.
struct ScaleBiasArgs {
  Operand x, b;              // (N, T, K), or rows (R, K); x.data is null if only the bias is requested
  const float *mean, *rstd;  // (N, T) or (R,), or null
  int64_t mean_example, mean_position, rstd_example, rstd_position;  // strides
  const int64_t* begin;                // (N + 1,) for ragged rows: example i owns rows order[begin[i]] to order[begin[i + 1] - 1]
  const int64_t* order;                // (R,), or null if the rows are in order
  int64_t count, positions, features;  // N, T, K
  int lanes;                           // threads that share a row, a power of two up to 32
  float *scale, *bias;                 // (parts, N, K) each; either may be null
  int64_t next_part;                   // distance in elements from one part's sums to the next
};

// Rows of numbers that are summed in order, in float64, and then rounded.
struct Partials {
  const void* from;  // (rows, width)
  bool wide;         // whether the numbers are float64; otherwise float32
  int64_t rows, width;
  int64_t blocks;  // blocks of the launch that add these rows
  int64_t each;    // elements per result: the `width` elements are split into consecutive results
  float* to[4];    // results
  int64_t side;    // side of a symmetric matrix that is valid only on and above the diagonal; otherwise 0
};

constexpr int partials_at_once = 3;
struct AddPartialsArgs {
  Partials of[partials_at_once];  // unused entries have no blocks
};

}  // namespace zsl
