// The arguments of the embedding kernels.
//
// The letters are: N examples, P positions in all examples together, V rows of the weight, K features.
#pragma once

#include "args.h"

namespace zsl {

constexpr int embedding_vector = 16;  // bytes of a row of b that one thread loads

// A position in the order of rows, then examples. It has 16 bytes, which are read with one load.
struct alignas(16) EmbeddingPlace {
  int64_t offset;   // offset of its row of b, in elements
  int32_t segment;  // 2 × the index of its touched row, plus 1 if a pair begins here; -1 if the position is skipped
  int32_t slot;     // its index in the caller's order
};

// Arguments for sorting the positions. A pair is a row of the weight and an example that touches it. Its key is row × N + example.
struct EmbeddingOrderArgs {
  const int64_t* ids;         // (P,) ids outside [0, V) are skipped
  const int64_t* examples;    // (P,) the example of each; outside [0, N): skipped; null: p belongs to example p / positions
  int64_t count;              // P
  int64_t positions;          // T: position p is position p % T of example p / T of b
  int64_t num_examples;       // N
  int64_t num_rows;           // V
  int64_t padding;            // the row whose positions are skipped, or -1
  int64_t example, position;  // strides of b
  int64_t chunk;              // positions per block
  int64_t* keys;              // (P,)
  const int64_t* sorted;      // (P,) the sorted keys
  const int64_t* order;       // (P,) the position of each sorted key
  int64_t* counts;            // (blocks,) the number of rows that begin in each block's chunk; null if there is one block
  EmbeddingPlace* places;     // (P,)
  int64_t* rows;              // the touched rows, at most min(V, P)
  int64_t* touched;           // (1,) the number of touched rows
};

// Arguments of the sums. A window is `window` adjacent places. One warp sums one window for one group of columns.
struct EmbeddingArgs {
  Operand b;
  Element element;
  const EmbeddingPlace* places;  // (P,)
  int64_t count;                 // P
  int64_t K;
  int64_t window;
  const int64_t* rows;    // touched rows
  const void* direction;  // (V, K) or null
  int direction_type;     // an Element, or 3 for float64
  int64_t direction_row, direction_col;
  bool direction_rows;                 // whether it is float32 with contiguous rows that begin at multiples of 16 bytes
  float *grad_sum, *abs_sum, *sq_sum;  // (rows, K)
  float* scalars;                      // (groups, P, 2 or 4): a pair's l1, sq_norm, dot, abs_dot at its first position, otherwise 0
  float* pieces;                       // (windows, 8, K): partial results that cross the window's boundaries
  int32_t* open;                       // (windows,) the slot of the pair that crosses the window's end; see embedding.cuh
  // For a Gram matrix: the gradients of rows [first_row, first_row + slab_rows) are written to the slab, and only windows with such
  // rows are read.
  float* slab;              // (N, slab_rows, K) or null
  const int64_t* examples;  // (P,) or null, as above
  int64_t positions;
  int64_t first_row, slab_rows;
};

// Arguments for zeroing a slab that has been written to or will be.
struct EmbeddingClearArgs {
  float* slab;
  int64_t count;  // number of elements
  int64_t first_row, slab_rows;
  const int64_t* touched;
};

// Arguments for adding the examples' scalars and for filling the rows that no example touches.
struct EmbeddingFinishArgs {
  const float* scalars;  // (groups, P, fields)
  int64_t count;         // P
  int groups, fields;
  int64_t num_examples, positions;
  const int64_t* begin;  // (N + 1,) example i owns slots member[begin[i]] to member[begin[i + 1] - 1]; null if regular
  const int64_t* member;
  float* results[4];  // (N,) each
  int64_t* rows;      // (most_rows,) from `touched` on: -1, and the sums are zero; most_rows is 0 if all are touched
  float *grad_sum, *abs_sum, *sq_sum;
  int64_t most_rows, K;
  const int64_t* touched;
};

}  // namespace zsl
