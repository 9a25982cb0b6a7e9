// The derivative of every op with respect to a and b.
//
// For each tile it recomputes g_i, converts it to s_i in registers, and multiplies s_i by b_i and a_i. Each example's da_i and db_i
// belong to one worker, so the tiles are accumulated without a race.

namespace zsl::ZSL_ISA {

// Computes s_i from g_i, without the mixed gradients. BackwardArgs gives the formula.
template <class P>
struct BackwardEpilogue {
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  S* s;                                // the tile of s_i
  const S *u, *c_grad, *c_abs, *c_sq;  // tiles; zeros if absent
  S l1, sqn, dot, abs_dot;             // example i's coefficients
  bool signs, sizes, squares, along;   // which terms are present: an absent term must not turn Inf into NaN

  ZSL_INLINE void operator()(const Step<P>& step, const typename R::Acc& acc) {
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < R::vecs; ++v) {
        const int64_t p = step.index * R::size + r * R::cols + v * lanes<S>;
        const Vec<S> g = acc[r][v];
        Vec<S> sum = load(c_grad + p);
        if (signs) sum += times_sign<S>(g, load(c_abs + p) + l1);
        if (sizes) sum += times_sign<S>(g, ZSL_ISA::abs<S>(load(u + p)) * abs_dot);
        if (squares) sum += 2 * g * (load(c_sq + p) + sqn);
        if (along) sum += load(u + p) * dot;
        store(s + p, sum);
      }
  }
};

// Adds a register tile to c, where c points into a row-major matrix.
template <class P>
struct AddEpilogue {
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  S* c;
  int64_t ld;

  ZSL_INLINE void operator()(const Step<P>& s, const typename R::Acc& acc) {
    if (s.rows >= R::rows && s.cols >= R::cols) {
#pragma GCC unroll 16
      for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < R::vecs; ++v) store(c + r * ld + v * lanes<S>, load(c + r * ld + v * lanes<S>) + acc[r][v]);
    } else {
      S tile[R::size];
      std::memcpy(tile, acc, sizeof tile);
      for (int64_t r = 0; r < std::min<int64_t>(R::rows, s.rows); ++r)
        for (int64_t k = 0; k < std::min<int64_t>(R::cols, s.cols); ++k) c[r * ld + k] += tile[r * R::cols + k];
    }
  }
};

// Computes c (row-major) += x_n[:, f0:f0+steps] · panels for the rows of example n. The panels are packed columns with `length`
// rows, and their first `steps` rows are contracted with those features. c points to the first column of a complete da or db.
template <class S>
void multiply_rows(const Operand& x, const Shape& shape, int64_t n, int64_t f0, int64_t steps, const S* panels, int64_t length,
                   int64_t cols, S* packed, S* c, int64_t ld) {
  using P = Dense<S>;
  using R = RegisterTile<P>;
  Step<P> s;
  s.steps = steps, s.first = s.last = true, s.carry = nullptr, s.index = 0;
  constexpr int64_t block = chunk / R::rows * R::rows;
  // Ragged rows are addressed as the rows of one long example.
  const int64_t T = shape.begin ? shape.begin[shape.N] : shape.T, row0 = shape.begin ? shape.begin[n] : n * T;
  const int64_t rows = shape.length(n);
  for (int64_t t0 = 0; t0 < rows; t0 += block) {
    const int64_t tn = std::min(block, rows - t0);
    pack_transposed<S, R::rows>(x, T, row0 + t0, tn, f0, steps, packed);
    for (int64_t k = 0; k < cols; k += R::cols)
      for (int64_t t = 0; t < tn; t += R::rows) {
        AddEpilogue<P> add = {c + (row0 + t0 + t) * ld + k, ld};
        s.row_panel = packed + t * steps, s.col_panel = panels + k * length;
        s.rows = tn - t, s.cols = cols - k;
        run_register_tile<P>(s, add);
      }
  }
}

template <class S>
size_t backward_mix_as(const BackwardArgs& args, int64_t index, int64_t begin, int64_t end, void* workspace, void* shared) {
  using P = Dense<S>;
  Arena arena(workspace), shared_arena(shared);
  GradientTile<P> tile(args.shape, arena, args.added);
  StoredTiles<P> stored(args.shape, args.M, shared_arena);
  if (!workspace) return arena.used();

  StoreEpilogue<P> epilogue = {&stored, 0};
  for (int64_t m = begin; m < end; ++m)
    epilogue.example = m, tile.run(args.a2, args.b2, m, m == begin, tile_rect(args.shape, index), epilogue);
  return arena.used();
}

template <class S>
size_t backward_shared_as(const BackwardArgs& args) {
  Arena arena(nullptr);
  if (args.mix) StoredTiles<Dense<S>>(args.shape, args.M, arena);
  return arena.used();
}

// Packs the transposed tile sᵀ as columns: [panel of COLS outputs][k][COLS].
template <class P>
void transpose_tile(const typename P::Sum* s, const Rect& rect, typename P::Sum* out) {
  using R = RegisterTile<P>;
  const int64_t rows = ceil_div(rect.on, R::rows) * R::rows;
  for (int64_t o0 = 0; o0 < rect.on; o0 += R::cols)
    for (int64_t k = 0; k < rect.kn; ++k, out += R::cols) {
      const typename P::Sum* column = s + k / R::cols * rows * R::cols + k % R::cols;
      for (int64_t c = 0; c < R::cols; ++c) out[c] = o0 + c < rect.on ? column[(o0 + c) * R::cols] : typename P::Sum(0);
    }
}

template <class S>
size_t backward_as(const BackwardArgs& args, int64_t index, int64_t begin, int64_t end, void* workspace, const void* shared) {
  using P = Dense<S>;
  using R = RegisterTile<P>;
  using Tile = GradientTile<P>;
  const Shape& shape = args.shape;
  const int64_t size = Tile::size(shape);
  Arena arena(workspace), shared_arena(const_cast<void*>(shared));
  Tile tile(shape, arena, args.added);
  S* s = arena.take<S>(size);
  S* u = arena.take<S>(size);
  S* c_grad = arena.take<S>(size);
  S* c_abs = arena.take<S>(size);
  S* c_sq = arena.take<S>(size);
  S* transposed = arena.take<S>(ceil_div(shape.tile_o, R::cols) * R::cols * shape.tile_k);
  S* packed = arena.take<S>(chunk * std::max(shape.tile_o, shape.tile_k));
  if (!workspace) return arena.used();

  const StoredTiles<P> mixed(shape, args.mix ? args.M : 0, shared_arena);
  const Rect rect = tile_rect(shape, index);
  const int64_t used = Tile::count(rect) * R::size;
  const auto gather = [&](const void* matrix, S* to) {
    if (matrix)
      gather_tile<P>(static_cast<const S*>(matrix), shape.K, rect, to);
    else
      std::memset(to, 0, static_cast<size_t>(used) * sizeof(S));
  };
  gather(args.u, u), gather(args.c_grad, c_grad), gather(args.c_abs, c_abs), gather(args.c_sq, c_sq);
  const bool needs_gradient = args.c_abs || args.c_sq || args.c_l1 || args.c_sqn || args.c_absdot || !args.mix;
  const auto coefficient = [](const double* c, int64_t n) { return c ? static_cast<S>(c[n]) : S(0); };

  for (int64_t n = begin; n < end; ++n) {
    if (shape.length(n) == 0 && !args.added.any(n)) continue;
    BackwardEpilogue<P> epilogue = {s,
                                    u,
                                    c_grad,
                                    c_abs,
                                    c_sq,
                                    coefficient(args.c_l1, n),
                                    coefficient(args.c_sqn, n),
                                    coefficient(args.c_dot, n),
                                    coefficient(args.c_absdot, n),
                                    args.c_abs || args.c_l1,
                                    args.c_absdot != nullptr,
                                    args.c_sq || args.c_sqn,
                                    args.c_dot != nullptr};
    if (needs_gradient)
      tile.run(args.a, args.b, n, n == begin, rect, epilogue);
    else
      for (int64_t p = 0; p < used; p += lanes<S>)
        store(s + p, epilogue.along ? load(c_grad + p) + load(u + p) * epilogue.dot : load(c_grad + p));
    if (args.mix)
      for (int64_t i = 0; i < used / R::size; ++i)
        for (int64_t m = 0; m < args.M; ++m) {
          const S weight = static_cast<S>(args.mix[n * args.M + m]);
          const S* g2 = mixed.at(i, m);
          for (int64_t p = 0; p < R::size; p += lanes<S>)
            store(s + i * R::size + p, load(s + i * R::size + p) + load(g2 + p) * weight);
        }
    if (args.d_added)
      tile.each_added(n, rect, [&](int64_t p, int64_t k, int64_t at, int64_t count) {
        std::memcpy(static_cast<S*>(args.d_added) + p * shape.K + k, s + at, static_cast<size_t>(count) * sizeof(S));
      });
    if (args.da)
      multiply_rows<S>(args.b, shape, n, rect.o0, rect.on, s, ceil_div(rect.on, R::rows) * R::rows, rect.kn, packed,
                       static_cast<S*>(args.da) + rect.k0, shape.K);
    if (args.db) {
      transpose_tile<P>(s, rect, transposed);
      multiply_rows<S>(args.a, shape, n, rect.k0, rect.kn, transposed, rect.kn, rect.on, packed, static_cast<S*>(args.db) + rect.o0,
                       shape.O);
    }
  }
  return arena.used();
}

}  // namespace zsl::ZSL_ISA
