// What the kernels are called with: pointers, sizes, strides. Plain C++, shared by the kernels, their launches and the module.
// Letters: N examples, T positions, K input features, O output features; a (N, T, K), b (N, T, O), g_i = b_iᵀ a_i (O, K).
#pragma once

#include <cstddef>
#include <cstdint>

namespace zsl {

enum class Element : int { float32, bfloat16, float16 };

// An operand (N, T, features), or ragged rows (R, features). Strides count elements and may be anything, 0 too.
struct Operand {
  const void* data;
  int64_t example, position, feature;  // strides
  bool vectors;                        // whether 16 bytes can be copied at a time
};

// Examples: the rows of a and b that each has.
struct Examples {
  Operand a, b;
  int64_t count;         // N
  int64_t positions;     // T, where every example has as many
  const int64_t* begin;  // (N + 1,) ragged: example i has the rows [begin[i], begin[i + 1]); else null
};

// Rows added to the gradients of a tied weight, at most one for each example and row of the weight.
struct Added {
  const int64_t* begin;    // (N + 1,): example i has [begin[i], begin[i + 1]); null if there are none
  const int64_t* feature;  // (P,) the weight's row of each, ascending for each example
  const float* values;     // (P, K)
};

// What every form writes. The sums are null where the Gram alone is wanted, and `pairs` where it is not.
struct Results {
  float *grad_sum, *abs_sum, *sq_sum;  // (O, K)
  double* scalars;                     // (blocks, 4, N): partial l1, sq_norm, dot, abs_dot
  double* pairs;                       // (blocks × shares, N, M): partial Gram; one set's above the diagonal alone
  const float* direction;              // (O, K) or null
  int64_t direction_row, direction_col;
};

// The weight's size, and how many examples' tiles are held at a time.
struct Sizes {
  int64_t O, K;
  int slots;   // tiles held
  int group;   // examples of either side of a block's part of the Gram: blockIdx.x goes through the pairs of groups
  bool cross;  // the Gram of the first set with the second one
  bool exact;  // float32 products are those of float32, else of tf32
};

struct ProductArgs {
  Examples sets[2];
  Added added;
  Sizes sizes;
  Results results;
};

}  // namespace zsl
