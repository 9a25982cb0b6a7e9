// What the kernels of embeddings are called with. Letters: N examples, P positions of all of them, V rows of the weight, K
// features.
#pragma once

#include "args.h"

namespace zsl {

constexpr int embedding_vector = 16;  // bytes of a row of b that a thread has

// A position in the order of rows, then examples. 16 bytes, which are read at once.
struct alignas(16) EmbeddingPlace {
  int64_t offset;   // of its row of b, in elements
  int32_t segment;  // 2 × the number of its touched row, plus 1 where a pair begins; -1 if the position is skipped
  int32_t slot;     // its number in the caller's order
};

// How positions are put in order. A pair is a row of the weight and an example that touches it; its key is row × N + example.
struct EmbeddingOrderArgs {
  const int64_t* ids;       // (P,) ids that are not in [0, V) are skipped
  const int64_t* examples;  // (P,) the example of each, and those not in [0, N) are skipped; or null: p is of example p / positions
  int64_t count;            // P
  int64_t positions;        // T: p is position p % T of b's example p / T
  int64_t num_examples;     // N
  int64_t num_rows;         // V
  int64_t padding;          // the row whose positions are skipped, or -1
  int64_t example, position;  // strides of b
  int64_t chunk;              // positions of a block
  int64_t* keys;              // (P,)
  const int64_t* sorted;      // (P,) the same in order
  const int64_t* order;       // (P,) the position of each
  int64_t* counts;            // (blocks,) rows that begin in each block's chunk; null where there is one block
  EmbeddingPlace* places;     // (P,)
  int64_t* rows;              // the touched rows: at most min(V, P)
  int64_t* touched;           // (1,) how many there are
};

// The sums. A window is `window` neighbouring places; a warp adds up one for a group of columns.
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
  bool direction_rows;                 // whether it is float32 with dense rows, which begin at multiples of 16 bytes
  float *grad_sum, *abs_sum, *sq_sum;  // (rows, K)
  float* scalars;                      // (groups, P, 2 or 4): a pair's l1, sq_norm, dot, abs_dot at its first position, else zeros
  float* pieces;                       // (windows, 8, K): what crosses the window's bounds
  int32_t* open;                       // (windows,) the slot of the pair that crosses the window's end; see embedding.cuh
  // Of a Gram: the gradients of rows [first_row, first_row + slab_rows) go to the slab, and only windows that have some are read.
  float* slab;              // (N, slab_rows, K) or null
  const int64_t* examples;  // (P,) or null: as above
  int64_t positions;
  int64_t first_row, slab_rows;
};

// Zeros for a slab, where it has been written to or will be.
struct EmbeddingClearArgs {
  float* slab;
  int64_t count;  // numbers
  int64_t first_row, slab_rows;
  const int64_t* touched;
};

// The examples' scalars, and what the rows that nobody touched hold.
struct EmbeddingFinishArgs {
  const float* scalars;  // (groups, P, fields)
  int64_t count;         // P
  int groups, fields;
  int64_t num_examples, positions;
  const int64_t* begin;  // (N + 1,) example i has the slots member[begin[i]] to member[begin[i + 1] - 1]; or null: regular
  const int64_t* member;
  float* results[4];  // (N,) each
  int64_t* rows;      // (most_rows,): -1 from `touched` on, where the sums are zero; most_rows is 0 where all are touched
  float *grad_sum, *abs_sum, *sq_sum;
  int64_t most_rows, K;
  const int64_t* touched;
};

}  // namespace zsl
