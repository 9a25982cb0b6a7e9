// The interface of the CPU kernels. It uses raw pointers, sizes and strides and does not depend on torch. The binding validates the
// arguments, allocates the outputs and runs the workers.
//
// The whole library uses the same letters: N is the number of examples, T of positions, K of input features and O of output
// features. a (N, T, K) holds the inputs and b (N, T, O) the output gradients. g_i = b_iᵀ a_i (O, K) is the gradient of example i,
// and u (O, K) is a direction.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zsl {

enum class DType : int { f32, bf16, f16, f64 };

// An (N, T, F) tensor with arbitrary strides, counted in elements. If sn == 0, all examples share the operand. With ragged rows the
// operand is an (R, F) matrix, each example owns a range of its rows (Shape::begin), and sn is also 0.
struct Operand {
  const void* data;
  DType dtype;
  int64_t sn, st, sf;
};

// The (O, K) output is divided into tiles of tile_o × tile_k. The sums of one tile stay in the workspace while the kernel loops
// over the examples.
struct Shape {
  int64_t N, T, K, O;
  int64_t tile_o, tile_k;
  // ? (N + 1,), for ragged rows: example n owns rows [begin[n], begin[n + 1]) of every operand, and T is the longest range.
  const int64_t* begin = nullptr;

  int64_t first(int64_t n) const { return begin ? begin[n] : 0; }                  // the first position of example n
  int64_t length(int64_t n) const { return begin ? begin[n + 1] - begin[n] : T; }  // the number of its positions
  int64_t tiles_o() const { return (O + tile_o - 1) / tile_o; }
  int64_t tiles_k() const { return (K + tile_k - 1) / tile_k; }
  int64_t tiles() const { return tiles_o() * tiles_k(); }
};

// Rows that are added to the gradients: the embedding's part of a tied weight. Example n owns rows [begin[n], begin[n + 1]). Row p
// is added to output feature index[p]. The features of one example are distinct and in ascending order.
struct AddedRows {
  const int64_t* begin = nullptr;  // ? (N + 1,)
  const int64_t* index = nullptr;  // (P,)
  const void* values = nullptr;    // (P, K) S, contiguous

  bool any(int64_t n) const { return begin && begin[n] < begin[n + 1]; }
};

// "S" below is the type of sums and scalars: double if the inputs are double, otherwise float. "?" marks a tensor that may be null.
struct InterferenceArgs {
  Shape shape;
  Operand a, b;
  const void* u;                      // ? (O, K) S, contiguous
  void *grad_sum, *abs_sum, *sq_sum;  // (O, K) S, contiguous; all null if only sq_norm, dot and abs_dot are computed
  bool gram;
  AddedRows added = {};
};

// One worker's share of the scalars. The binding adds the shares of all workers in a fixed order.
struct InterferencePartials {
  double *l1, *sq_norm, *dot, *abs_dot;  // (N,)
  double* gram;                          // ? (N, N); only blocks on and above the diagonal are written
};

struct GramArgs {
  Shape shape;  // N is the number of examples of a, b
  int64_t M;    // the number of examples of a2, b2, with the same T; ragged rows have no second set
  Operand a, b, a2, b2;
  bool self;  // a2, b2 are a, b; only blocks on and above the diagonal are computed
};

// Arguments of weighted_grad: Σ_i w_i g_i + sign(u) Σ_i v_i |g_i|.
struct WeightedArgs {
  Shape shape;
  Operand a, b;
  const double* w;  // (N,)
  const double* v;  // ? (N,)
  const void* u;    // ? (O, K) S, given together with v
  void* out;        // (O, K) S
};

// Arguments of the derivative: da_i = b_i s_i and db_i = a_i s_iᵀ, where
//
//   s_i = c_grad + sign(g_i) (c_abs + c_l1_i) + 2 g_i (c_sq + c_sqn_i) + u c_dot_i + |u| sign(g_i) c_absdot_i + Σ_m mix_im g2_m
struct BackwardArgs {
  Shape shape;
  Operand a, b;
  const void* u;                                  // ? (O, K) S
  const void *c_grad, *c_abs, *c_sq;              // ? (O, K) S
  const double *c_l1, *c_sqn, *c_dot, *c_absdot;  // ? (N,)
  const double* mix;                              // ? (N, M), given together with a2, b2
  int64_t M;
  Operand a2, b2;
  AddedRows added;  // if present, a2, b2 are a, b
  void* d_added;    // ? (P, K) S, the derivative with respect to added.values
  void *da, *db;    // ? shapes of a and b, S, contiguous; the caller zeroes them
};

// Arguments of coordinate_sums. G, A, Q are grad_sum, abs_sum, sq_sum, contiguous and of type S, and 0/0 counts as 0. The sums over
// coordinates j are:
//
//   0 Σ [A_j ≠ 0] (touched coordinates), 1 Σ |G_j|/A_j, 2 Σ √Q_j/A_j, 3 Σ G_j², 4 Σ Q_j
//
//   and with u: 5 Σ |G_j u_j|, 6 Σ A_j |u_j|, 7 Σ √Q_j |u_j|
struct CoordinateArgs {
  DType dtype;
  const void *grad_sum, *abs_sum, *sq_sum;
  const void* u;  // ?
};

// Groups of positions. Group r consists of the flattened positions order[starts[r]] … order[starts[r+1] - 1] of (N, T, K) operands.
// The kernel computes Σ_p b_p (x_p − mean_p) rstd_p and Σ_p b_p over the positions p of each group.
struct PositionArgs {
  DType sums;  // S: f32 or f64
  int64_t T, K;
  int64_t block;            // number of features processed at a time
  const int64_t* starts;    // (groups + 1,)
  const int64_t* order;     // ? null if the positions are in ascending order
  Operand x, b;             // x is only used for scale; x and b may have different dtypes
  const void *mean, *rstd;  // ? (N·T,) S
  void *scale, *bias;       // ? (groups, K) S

  int64_t blocks() const { return (K + block - 1) / block; }
};

// Gradients that consist of few rows. Row r of example i is the sum of b over those positions of group r that belong to example i.
// In each group the positions of one example are adjacent, and the examples are in ascending order. A small dense gradient is one
// row with one position per example.
struct RowArgs {
  PositionArgs rows;                  // without x, mean, rstd, scale, bias; only the single row of no examples is empty
  const int64_t* examples;            // ? (N·T,) the example of each position; if null, the position itself determines its example
  int64_t N, most_examples;           // most_examples: the largest number of examples of any row
  const void* u;                      // ? (rows, K) S
  void *grad_sum, *abs_sum, *sq_sum;  // (rows, K) S
  bool gram;
};

// The kernels of one instruction set. A "worker" function processes tiles [begin, end) in a workspace of its own.
struct Kernels {
  const char* isa;

  size_t (*interference_workspace)(const InterferenceArgs&);
  void (*interference_worker)(const InterferenceArgs&, int64_t begin, int64_t end, void* workspace, const InterferencePartials&);

  size_t (*gram_workspace)(const GramArgs&);
  void (*gram_worker)(const GramArgs&, int64_t begin, int64_t end, void* workspace, double* gram);

  size_t (*weighted_workspace)(const WeightedArgs&);
  void (*weighted_worker)(const WeightedArgs&, int64_t begin, int64_t end, void* workspace);

  // The derivative is computed tile by tile. For each tile, backward_mix_worker writes the gradients g2 of examples [begin, end) of
  // a2, b2 to `shared`. Then backward_worker processes examples [begin, end) of a, b.
  size_t (*backward_shared)(const BackwardArgs&);
  size_t (*backward_workspace)(const BackwardArgs&);
  void (*backward_mix_worker)(const BackwardArgs&, int64_t tile, int64_t begin, int64_t end, void* workspace, void* shared);
  void (*backward_worker)(const BackwardArgs&, int64_t tile, int64_t begin, int64_t end, void* workspace, const void* shared);

  // The ghost kernels process blocks of flattened (example, position) rows (see ghost.h). With `diagonal` they compute only the
  // norms.
  size_t (*ghost_workspace)(const GramArgs&);
  int64_t (*ghost_blocks)(const GramArgs&, bool diagonal);
  void (*ghost_worker)(const GramArgs&, bool diagonal, int64_t begin, int64_t end, void* workspace, double* out);

  void (*coordinates_worker)(const CoordinateArgs&, int64_t begin, int64_t end, double* out);

  // These functions process items [begin, end). An item is a pair (group or row, block of features). The blocks of one group are
  // consecutive.
  size_t (*scale_bias_workspace)(const PositionArgs&);
  void (*scale_bias_worker)(const PositionArgs&, int64_t begin, int64_t end, void* workspace);
  size_t (*row_interference_workspace)(const RowArgs&);
  void (*row_interference_worker)(const RowArgs&, int64_t begin, int64_t end, void* workspace, const InterferencePartials&);
};

const Kernels* kernels_generic();
const Kernels* kernels_neon();  // null if the compiler does not target 64-bit Arm
const Kernels* kernels_avx2();  // null if the compiler does not target x86-64
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();  // also null if the processor has no AMX or the system denies it to the process
#ifdef ZSL_EMULATE_AMX
const Kernels* kernels_amx_emulated();  // the AMX kernels with loops in place of the tile instructions, for tests
#endif

}  // namespace zsl
