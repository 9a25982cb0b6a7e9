// The micro-kernel: it accumulates a register tile of ROWS × COLS sums over a whole contraction and passes it to an epilogue.
//
// The sums are still in registers when the epilogue reads them. Every matrix product of the library is this micro-kernel with a
// different epilogue.

namespace zsl::ZSL_ISA {

template <class P>
struct RegisterTile {
  using S = typename P::Sum;
  static constexpr int rows = ZSL_ROWS;
  static constexpr int vecs = ZSL_COL_VECS;
  static constexpr int cols = vecs * lanes<S>;
  static constexpr int size = rows * cols;
  using Acc = Vec<S>[rows][vecs];
};

// Computes acc[r][c] += Σ_step row_panel[step][r] · col_panel[step][c].
template <class P>
ZSL_INLINE void contract(const typename P::Elem* row_panel, const typename P::Elem* col_panel, int64_t steps,
                         typename RegisterTile<P>::Acc& acc) {
  using R = RegisterTile<P>;
  using S = typename P::Sum;
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (P::depth == 1) {
      Vec<S> c[R::vecs];
#pragma GCC unroll 8
      for (int v = 0; v < R::vecs; ++v) c[v] = load(col_panel + v * lanes<S>);
#pragma GCC unroll 16
      for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < R::vecs; ++v) acc[r][v] += c[v] * row_panel[r];
    } else {
#ifdef ZSL_NATIVE_BF16
      __m512bh c[R::vecs];
#pragma GCC unroll 8
      for (int v = 0; v < R::vecs; ++v) c[v] = (__m512bh)_mm512_loadu_si512(col_panel + v * 2 * lanes<S>);
#pragma GCC unroll 16
      for (int r = 0; r < R::rows; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, row_panel + 2 * r, sizeof pair);
        const __m512bh b = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
        for (int v = 0; v < R::vecs; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], c[v], b);
      }
#endif
    }
    row_panel += R::rows * P::depth;
    col_panel += R::cols * P::depth;
  }
}

// Zeroes the entries outside the output. They are products with the packed zeros, and 0·Inf would produce a NaN that reaches the
// scalars.
template <class P>
ZSL_INLINE void clear_padding(typename RegisterTile<P>::Acc& acc, int64_t rows, int64_t cols) {
  using R = RegisterTile<P>;
  using S = typename P::Sum;
  using Bits = typename VecTypes<S>::Bits;
#pragma GCC unroll 8
  for (int v = 0; v < R::vecs; ++v) {
    Bits keep;
    for (int l = 0; l < lanes<S>; ++l) keep[l] = v * lanes<S> + l < cols ? -1 : 0;
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r) acc[r][v] = r < rows ? (Vec<S>)((Bits)acc[r][v] & keep) : Vec<S>{};
  }
}

// The arguments of one micro-kernel call: what it contracts and where the result belongs.
template <class P>
struct Step {
  const typename P::Elem *row_panel, *col_panel;
  int64_t steps;
  int64_t rows, cols;      // number of the register tile's rows and columns that lie inside the output
  typename P::Sum* carry;  // partial sums of the previous chunks of the contraction, or null
  bool first, last;        // whether this is the first or last chunk of the contraction
  int64_t index;           // index of the register tile in its tile
};

template <class P, class Epilogue>
__attribute__((noinline)) void run_register_tile(const Step<P>& s, Epilogue& epilogue) {
  using R = RegisterTile<P>;
  using S = typename P::Sum;
  typename R::Acc acc = {};
  contract<P>(s.row_panel, s.col_panel, s.steps, acc);
  // The carry is added after the product, so that the sum of a chunk is one term. If one chain of additions ran through all
  // positions, a sum of ones would stop growing at 2^24.
  if (!s.first)
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < R::vecs; ++v) acc[r][v] += load(s.carry + r * R::cols + v * lanes<S>);
  if (!s.last) {
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < R::vecs; ++v) store(s.carry + r * R::cols + v * lanes<S>, acc[r][v]);
    return;
  }
  if (s.rows < R::rows || s.cols < R::cols) clear_padding<P>(acc, s.rows, s.cols);
  epilogue(s, acc);
}

// Output gradients are packed as row panels and inputs as column panels.
template <class P>
void pack_rows(const Operand& b, int64_t n, int64_t t0, int64_t tn, int64_t o0, int64_t on, typename P::Elem* dst) {
  pack<P, RegisterTile<P>::rows>(b, n, t0, tn, o0, on, dst);
}

template <class P>
void pack_columns(const Operand& a, int64_t n, int64_t t0, int64_t tn, int64_t k0, int64_t kn, typename P::Elem* dst) {
  pack<P, RegisterTile<P>::cols>(a, n, t0, tn, k0, kn, dst);
}

}  // namespace zsl::ZSL_ISA
