// The CPU kernels' interface: raw pointers, sizes and strides; no torch. The binding checks, allocates and runs the workers.
//
// Letters, the same in the whole library: N examples, T positions, K input features, O output features; a (N, T, K) inputs,
// b (N, T, O) output gradients, g_i = b_iᵀ a_i (O, K) the gradient of example i, u a direction (O, K).
#pragma once

#include <cstddef>
#include <cstdint>

namespace zsl {

enum class DType : int { f32, bf16, f16, f64 };

// An (N, T, F) tensor of any strides, counted in elements. sn == 0 is an operand shared by all examples. Or (R, F) rows of which
// each example has a range (Shape::begin); sn is 0 then too.
struct Operand {
  const void* data;
  DType dtype;
  int64_t sn, st, sf;
};

// The (O, K) output is cut into tiles of tile_o × tile_k; a tile holds the sums while the examples pass by.
struct Shape {
  int64_t N, T, K, O;
  int64_t tile_o, tile_k;
  // ? (N + 1,): ragged; example n has rows [begin[n], begin[n + 1]) of every operand, and T is the most that one has.
  const int64_t* begin = nullptr;

  int64_t first(int64_t n) const { return begin ? begin[n] : 0; }                  // example n's first position in its operands ...
  int64_t length(int64_t n) const { return begin ? begin[n + 1] - begin[n] : T; }  // ... and how many it has
  int64_t tiles_o() const { return (O + tile_o - 1) / tile_o; }
  int64_t tiles_k() const { return (K + tile_k - 1) / tile_k; }
  int64_t tiles() const { return tiles_o() * tiles_k(); }
};

// Rows that are added to the gradients: the embedding's part of a tied weight. Example n's are [begin[n], begin[n + 1]); row p goes
// to output feature index[p]. An example's features ascend and are distinct.
struct AddedRows {
  const int64_t* begin = nullptr;  // ? (N + 1,)
  const int64_t* index = nullptr;  // (P,)
  const void* values = nullptr;    // (P, K) S, contiguous

  bool any(int64_t n) const { return begin && begin[n] < begin[n + 1]; }
};

// Sums and scalars are float, or double when the inputs are double ("S" below). A tensor that may be null is marked "?".
struct InterferenceArgs {
  Shape shape;
  Operand a, b;
  const void* u;                      // ? (O, K) S, contiguous
  void *grad_sum, *abs_sum, *sq_sum;  // (O, K) S, contiguous; none of them for sq_norm, dot and abs_dot alone
  bool gram;
  AddedRows added = {};
};

// One worker's share of the scalars; the binding adds the workers' in order.
struct InterferencePartials {
  double *l1, *sq_norm, *dot, *abs_dot;  // (N,)
  double* gram;                          // ? (N, N), blocks on and above the diagonal
};

struct GramArgs {
  Shape shape;  // N counts the examples of a, b
  int64_t M;    // examples of a2, b2, with as many positions; ragged rows have no second set
  Operand a, b, a2, b2;
  bool self;  // a2, b2 are a, b: only blocks on and above the diagonal are computed
};

// Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|
struct WeightedArgs {
  Shape shape;
  Operand a, b;
  const double* w;  // (N,)
  const double* v;  // ? (N,)
  const void* u;    // ? (O, K) S, with v
  void* out;        // (O, K) S
};

// da_i = b_i s_i and db_i = a_i s_iᵀ with s_i = c_grad + sign(g_i) (c_abs + c_l1_i) + 2 g_i (c_sq + c_sqn_i) + u c_dot_i
//   + |u| sign(g_i) c_absdot_i + Σ_m mix_im g2_m
struct BackwardArgs {
  Shape shape;
  Operand a, b;
  const void* u;                                  // ? (O, K) S
  const void *c_grad, *c_abs, *c_sq;              // ? (O, K) S
  const double *c_l1, *c_sqn, *c_dot, *c_absdot;  // ? (N,)
  const double* mix;                              // ? (N, M), with a2, b2
  int64_t M;
  Operand a2, b2;
  AddedRows added;  // with them a2, b2 are a, b
  void* d_added;    // ? (P, K) S, the derivative of their values
  void *da, *db;    // ? of a's and b's shapes, S, contiguous, zeroed by the caller
};

// Over coordinates j of contiguous S: 0 touched: Σ [A_j ≠ 0], 1 Σ |G_j|/A_j, 2 Σ √Q_j/A_j, 3 Σ G_j², 4 Σ Q_j, and with u
// 5 Σ |G_j u_j|, 6 Σ A_j |u_j|, 7 Σ √Q_j |u_j|, where G, A, Q are grad_sum, abs_sum, sq_sum and 0/0 counts as 0.
struct CoordinateArgs {
  DType dtype;
  const void *grad_sum, *abs_sum, *sq_sum;
  const void* u;  // ?
};

// Groups of positions: group r has those at order[starts[r]] … order[starts[r+1] - 1], flattened positions of (N, T, K) operands.
// Σ_p b_p (x_p − mean_p) rstd_p and Σ_p b_p over the positions p of each group.
struct PositionArgs {
  DType sums;  // S: f32 or f64
  int64_t T, K;
  int64_t block;            // features handled at a time
  const int64_t* starts;    // (groups + 1,)
  const int64_t* order;     // ? without it positions are in order
  Operand x, b;             // x only for scale; they may differ in dtype
  const void *mean, *rstd;  // ? (N·T,) S
  void *scale, *bias;       // ? (groups, K) S

  int64_t blocks() const { return (K + block - 1) / block; }
};

// Gradients that are few rows: row r of example i is the sum of b at those positions of group r that are i's; they lie side by
// side, examples ascending. A small dense gradient is one row, with one position for each example.
struct RowArgs {
  PositionArgs rows;                  // without x, mean, rstd, scale, bias; no group is empty, but for the one row of no examples
  const int64_t* examples;            // ? (N·T,) the example of each position; without it that of its place
  int64_t N, most_examples;           // of any row
  const void* u;                      // ? (rows, K) S
  void *grad_sum, *abs_sum, *sq_sum;  // (rows, K) S
  bool gram;
};

// One instruction set's kernels. "worker" functions handle tiles [begin, end) with a workspace of their own.
struct Kernels {
  const char* isa;

  size_t (*interference_workspace)(const InterferenceArgs&);
  void (*interference_worker)(const InterferenceArgs&, int64_t begin, int64_t end, void* workspace, const InterferencePartials&);

  size_t (*gram_workspace)(const GramArgs&);
  void (*gram_worker)(const GramArgs&, int64_t begin, int64_t end, void* workspace, double* gram);

  size_t (*weighted_workspace)(const WeightedArgs&);
  void (*weighted_worker)(const WeightedArgs&, int64_t begin, int64_t end, void* workspace);

  // Backward goes tile by tile: mix_worker forms g2 of examples [begin, end) of a2, b2 in `shared`, then example_worker
  // handles examples [begin, end) of a, b.
  size_t (*backward_shared)(const BackwardArgs&);
  size_t (*backward_workspace)(const BackwardArgs&);
  void (*backward_mix_worker)(const BackwardArgs&, int64_t tile, int64_t begin, int64_t end, void* workspace, void* shared);
  void (*backward_worker)(const BackwardArgs&, int64_t tile, int64_t begin, int64_t end, void* workspace, const void* shared);

  // Ghost: blocks of flattened (example, position) rows; see ghost.h. `diagonal`: only the norms.
  size_t (*ghost_workspace)(const GramArgs&);
  int64_t (*ghost_blocks)(const GramArgs&, bool diagonal);
  void (*ghost_worker)(const GramArgs&, bool diagonal, int64_t begin, int64_t end, void* workspace, double* out);

  void (*coordinates_worker)(const CoordinateArgs&, int64_t begin, int64_t end, double* out);

  // These handle items [begin, end): (group or row, block of features), the blocks of one group side by side.
  size_t (*scale_bias_workspace)(const PositionArgs&);
  void (*scale_bias_worker)(const PositionArgs&, int64_t begin, int64_t end, void* workspace);
  size_t (*row_interference_workspace)(const RowArgs&);
  void (*row_interference_worker)(const RowArgs&, int64_t begin, int64_t end, void* workspace, const InterferencePartials&);
};

const Kernels* kernels_generic();
const Kernels* kernels_neon();  // null where the compiler does not target 64-bit Arm
const Kernels* kernels_avx2();  // null where the compiler does not target x86-64
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();  // null, too, where the processor has no matrix unit or the system does not let the process use it
#ifdef ZSL_EMULATE_AMX
const Kernels* kernels_amx_emulated();  // the same kernels with loops for the tile instructions, for tests
#endif

}  // namespace zsl
