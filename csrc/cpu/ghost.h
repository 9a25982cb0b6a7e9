// gram and sq_norm with the ghost algorithm, which never forms a gradient: ⟨g_i, g_m⟩ = Σ_ts (a_it·a2_ms)(b_it·b2_ms).
//
// The kernel processes blocks of flattened (example, position) rows. It keeps a block of input products in the workspace and
// multiplies it by the block of output products in registers. Then it adds the result to the examples that own the rows.

namespace zsl::ZSL_ISA {

// Stores the block in the workspace. With Multiply, it multiplies the block that is there.
template <class P, bool Multiply>
struct GhostEpilogue {
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  S* block;

  ZSL_INLINE void operator()(const Step<P>& s, const typename R::Acc& acc) {
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < R::vecs; ++c) {
        S* at = block + s.index * R::size + r * R::cols + c * lanes<S>;
        store(at, Multiply ? load(at) * acc[r][c] : acc[r][c]);
      }
  }
};

template <class S>
class GhostBlock {
 public:
  using P = Dense<S>;
  using R = RegisterTile<P>;
  static constexpr int64_t side = 96;  // rows of a block: a multiple of the sides of every register tile

  explicit GhostBlock(Arena& arena) {
    static_assert(side % R::rows == 0 && side % R::cols == 0);
    rows_ = arena.take<S>(side * chunk);
    cols_ = arena.take<S>(side * chunk);
    carry_ = arena.take<S>(side * side);
    block_ = arena.take<S>(side * side);
  }

  // Computes block(r, c) = (a_r·a2_c)(b_r·b2_c).
  void run(const GramArgs& g, int64_t r0, int64_t rn, int64_t c0, int64_t cn) {
    GhostEpilogue<P, false> keep = {block_};
    GhostEpilogue<P, true> multiply = {block_};
    contract_features(g.a, g.a2, g.shape.T, g.shape.K, r0, rn, c0, cn, keep);
    contract_features(g.b, g.b2, g.shape.T, g.shape.O, r0, rn, c0, cn, multiply);
    row_panels_ = ceil_div(rn, R::rows);
  }

  S at(int64_t r, int64_t c) const {
    const int64_t index = c / R::cols * row_panels_ + r / R::rows;
    return block_[index * R::size + r % R::rows * R::cols + c % R::cols];
  }

 private:
  template <class Epilogue>
  void contract_features(const Operand& x, const Operand& y, int64_t T, int64_t F, int64_t r0, int64_t rn, int64_t c0, int64_t cn,
                         Epilogue& epilogue) {
    const int64_t row_panels = ceil_div(rn, R::rows), col_panels = ceil_div(cn, R::cols);
    for (int64_t f0 = 0; f0 < F; f0 += chunk) {
      const int64_t fn = std::min(chunk, F - f0);
      pack_transposed<S, R::rows>(x, T, r0, rn, f0, fn, rows_);
      pack_transposed<S, R::cols>(y, T, c0, cn, f0, fn, cols_);
      Step<P> s;
      s.steps = fn, s.first = f0 == 0, s.last = f0 + fn == F, s.index = 0;
      for (int64_t cp = 0; cp < col_panels; ++cp)
        for (int64_t rp = 0; rp < row_panels; ++rp, ++s.index) {
          s.col_panel = cols_ + cp * fn * R::cols, s.row_panel = rows_ + rp * fn * R::rows;
          s.rows = rn - rp * R::rows, s.cols = cn - cp * R::cols;
          s.carry = carry_ + s.index * R::size;
          run_register_tile<P>(s, epilogue);
        }
    }
  }

  S *rows_, *cols_, *carry_, *block_;
  int64_t row_panels_ = 0;
};

// Calls body(block number, first row, first column) for each required block. By default these are all blocks. If the two sets are
// the same, they are only the blocks on and above the diagonal. With `diagonal`, they are only those of the latter in which an
// example meets itself.
template <class Body>
int64_t each_ghost_block(const GramArgs& g, bool diagonal, Body body) {
  const int64_t side = GhostBlock<float>::side, T = g.shape.T, rows = g.shape.N * T, cols = g.M * T;
  int64_t number = 0;
  for (int64_t r = 0; r < rows; r += side)
    for (int64_t c = g.self ? r : 0; c < cols; c += side) {
      if (diagonal && c / T > (std::min(r + side, rows) - 1) / T) break;
      body(number++, r, c);
    }
  return number;
}

inline int64_t ghost_blocks(const GramArgs& g, bool diagonal) {
  return each_ghost_block(g, diagonal, [](int64_t, int64_t, int64_t) {});
}

// out has shape (N, M), and only its upper triangle is valid if the two sets are the same. With `diagonal` its shape is (N,).
template <class S>
size_t ghost_as(const GramArgs& g, bool diagonal, int64_t begin, int64_t end, void* workspace, double* out) {
  Arena arena(workspace);
  GhostBlock<S> block(arena);
  if (!workspace) return arena.used();

  const int64_t side = GhostBlock<S>::side, T = g.shape.T;
  each_ghost_block(g, diagonal, [&](int64_t number, int64_t r0, int64_t c0) {
    if (number < begin || number >= end) return;
    const int64_t rn = std::min(side, g.shape.N * T - r0), cn = std::min(side, g.M * T - c0);
    block.run(g, r0, rn, c0, cn);
    for (int64_t r = 0; r < rn; ++r)
      for (int64_t c = 0; c < cn;) {
        const int64_t i = (r0 + r) / T, m = (c0 + c) / T, stop = std::min(cn, (m + 1) * T - c0);
        double sum = 0;
        for (; c < stop; ++c) sum += block.at(r, c);
        // A block above the diagonal also stands for its mirror image below the diagonal, where an example meets itself.
        if (g.self && i == m && c0 > r0) sum *= 2;
        if (!diagonal)
          out[i * g.M + m] += sum;
        else if (i == m)
          out[i] += sum;
      }
  });
  return arena.used();
}

}  // namespace zsl::ZSL_ISA
