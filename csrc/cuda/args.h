// The arguments of the product kernels: pointers, sizes and strides, as plain C++ that the kernels, launches and module share.
//
// The letters are: N examples, T positions, K input features, O output features; a (N, T, K), b (N, T, O), and the gradient g_i =
// b_iᵀ a_i (O, K).
#pragma once

#include <cstddef>
#include <cstdint>

namespace zsl {

enum class Element : int { float32, bfloat16, float16 };

// An operand (N, T, features), or ragged rows (R, features). Strides count elements and may have any value, including 0.
struct Operand {
  const void* data;
  int64_t example, position, feature;  // strides
  bool vectors;                        // whether 16 bytes can be copied at a time
};

// A set of examples: their rows of a and b.
struct Examples {
  Operand a, b;
  int64_t count;         // N
  int64_t positions;     // T, if all examples have the same number of positions
  const int64_t* begin;  // (N + 1,) for ragged rows: example i owns rows [begin[i], begin[i + 1]); otherwise null
};

// Rows that are added to the gradients of a tied weight. There is at most one for each pair of an example and a row of the weight.
struct Added {
  const int64_t* begin;    // (N + 1,): example i owns [begin[i], begin[i + 1]); null if there are none
  const int64_t* feature;  // (P,) the row of the weight to which each is added, ascending within an example
  const float* values;     // (P, K)
};

// The outputs. The sums are null if only the Gram matrix is computed, and `pairs` is null if it is not computed.
struct Results {
  float *grad_sum, *abs_sum, *sq_sum;  // (O, K)
  double* scalars;                     // (blocks, 4, N): partial l1, sq_norm, dot, abs_dot
  double* pairs;                       // (blocks × shares, N, M): partial Gram matrices; for one set only above the diagonal
  const float* direction;              // (O, K) or null
  int64_t direction_row, direction_col;
};

// The size of the weight, and the number of examples whose tiles are held at a time.
struct Sizes {
  int64_t O, K;
  int slots;   // number of tiles held
  int group;   // examples per side of a block's part of the Gram matrix; blockIdx.x enumerates pairs of groups
  bool cross;  // whether to compute the Gram matrix between the first set and the second set
  bool exact;  // whether products have float32 precision; otherwise tf32
};

struct ProductArgs {
  Examples sets[2];
  Added added;
  Sizes sizes;
  Results results;
};

}  // namespace zsl
