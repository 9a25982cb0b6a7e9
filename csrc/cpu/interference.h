// interference: computes all sums over examples, all per-example scalars and the Gram matrix in one pass over the gradients' tiles.

namespace zsl::ZSL_ISA {

// Adds a register tile of g_i to the tile's sums and to the example's scalars. The lanes of a scalar accumulate in S within one
// register tile and in double across register tiles.
template <class P, bool Sums, bool Direction, bool Store>
struct InterferenceEpilogue {
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  S *grad, *abs, *sq;            // the tile's sums
  const S* u;                    // the direction's tile
  const StoredTiles<P>* stored;  // the tiles from which the Gram matrix is computed
  int64_t example;
  Wide<S> l1, sq_norm, dot, abs_dot;

  ZSL_INLINE void operator()(const Step<P>& s, const typename R::Acc& acc) {
    Vec<S> l1_lanes = {}, sq_lanes = {}, dot_lanes = {}, abs_dot_lanes = {};
    const int64_t at = s.index * R::size;
    // These are local copies, because the compiler must assume that the stores could modify the epilogue's own pointers.
    S *const grad_at = Sums ? grad + at : nullptr, *const abs_at = Sums ? abs + at : nullptr,
             *const sq_at = Sums ? sq + at : nullptr;
    const S* const u_at = Direction ? u + at : nullptr;
    S* out = Store ? stored->at(s.index, example) : nullptr;
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < R::vecs; ++v) {
        const int64_t p = r * R::cols + v * lanes<S>;
        const Vec<S> g = acc[r][v], m = ZSL_ISA::abs<S>(g), g2 = g * g;
        sq_lanes += g2;
        if constexpr (Sums) {
          l1_lanes += m;
          store(grad_at + p, load(grad_at + p) + g);
          store(abs_at + p, load(abs_at + p) + m);
          store(sq_at + p, load(sq_at + p) + g2);
        }
        if constexpr (Direction) {
          const Vec<S> gu = g * load(u_at + p);
          dot_lanes += gu;
          abs_dot_lanes += ZSL_ISA::abs<S>(gu);
        }
        if constexpr (Store) store(out + p, g);
      }
    add_lanes<S>(sq_norm, sq_lanes);
    if constexpr (Sums) add_lanes<S>(l1, l1_lanes);
    if constexpr (Direction) add_lanes<S>(dot, dot_lanes), add_lanes<S>(abs_dot, abs_dot_lanes);
  }
};

// Returns what a zero gradient adds to a dot product: 0, or NaN if the direction is not finite.
template <class S>
double sum_zero_times(const S* u, int64_t count) {
  Vec<S> sum = {};
  for (int64_t p = 0; p < count; p += lanes<S>) sum += load(u + p) * S(0);
  return sum_lanes<S>(sum);
}

template <class P, bool Sums, bool Direction, bool Gram>
size_t interference_run(const InterferenceArgs& args, int64_t begin, int64_t end, void* workspace,
                        const InterferencePartials* out) {
  using S = typename P::Sum;
  using Tile = GradientTile<P>;
  const Shape& shape = args.shape;
  const int64_t size = Tile::size(shape);
  Arena arena(workspace);
  Tile tile(shape, arena, args.added);
  InterferenceEpilogue<P, Sums, Direction, Gram> epilogue = {}, epilogues[P::together];
  S* sums = Sums ? arena.take<S>(3 * size) : nullptr;
  S* totals = Sums && shape.N > sum_run ? arena.take<S>(3 * size) : nullptr;
  S* u = Direction ? arena.take<S>(size) : nullptr;
  StoredTiles<P> stored(shape, Gram ? shape.N : 0, arena);
  TileGram<P> tile_gram(Gram ? shape.N : 0, Gram ? shape.N : 0, arena);
  if (!workspace) return arena.used();

  epilogue.grad = sums, epilogue.abs = sums + size, epilogue.sq = sums + 2 * size;
  epilogue.u = u, epilogue.stored = &stored;
  for (int64_t index = begin; index < end; ++index) {
    const Rect rect = tile_rect(shape, index);
    if constexpr (Sums) std::memset(sums, 0, static_cast<size_t>(3 * size) * sizeof(S));
    if constexpr (Direction) gather_tile<P>(static_cast<const S*>(args.u), shape.K, rect, u);
    const double nothing = Direction && shape.begin ? sum_zero_times(u, Tile::count(rect) * Tile::R::size) : 0;
    for (int64_t n = 0, count; n < shape.N; n += count) {
      count = tile.group(n);
      if constexpr (Sums) move_sums(n, sums, totals, 3 * size);
      // An example without rows is skipped, except for the Gram matrix, which reads its zeros.
      if (!Gram && shape.begin && shape.length(n) == 0 && !args.added.any(n)) {
        if constexpr (Direction) out->dot[n] += nothing, out->abs_dot[n] += nothing;
        continue;
      }
      for (int64_t e = 0; e < count; ++e) epilogues[e] = epilogue, epilogues[e].example = n + e;
      tile.run_group(args.a, args.b, n, count, n == 0, rect, epilogues);
      for (int64_t e = 0; e < count; ++e) {
        const auto& found = epilogues[e];
        out->sq_norm[n + e] += total<S>(found.sq_norm);
        if constexpr (Sums) out->l1[n + e] += total<S>(found.l1);
        if constexpr (Direction) out->dot[n + e] += total<S>(found.dot), out->abs_dot[n + e] += total<S>(found.abs_dot);
      }
    }
    if constexpr (Gram) tile_gram.run(stored.data(), stored.data(), Tile::count(rect), true, out->gram);
    if constexpr (Sums) {
      add_totals(sums, totals, 3 * size);
      scatter_tile<P>(epilogue.grad, static_cast<S*>(args.grad_sum), shape.K, rect);
      scatter_tile<P>(epilogue.abs, static_cast<S*>(args.abs_sum), shape.K, rect);
      scatter_tile<P>(epilogue.sq, static_cast<S*>(args.sq_sum), shape.K, rect);
    }
  }
  return arena.used();
}

template <class P>
size_t interference_as(const InterferenceArgs& args, int64_t begin, int64_t end, void* ws, const InterferencePartials* out) {
  if (!args.grad_sum)
    return args.u ? interference_run<P, false, true, false>(args, begin, end, ws, out)
                  : interference_run<P, false, false, false>(args, begin, end, ws, out);
  if (args.u)
    return args.gram ? interference_run<P, true, true, true>(args, begin, end, ws, out)
                     : interference_run<P, true, true, false>(args, begin, end, ws, out);
  return args.gram ? interference_run<P, true, false, true>(args, begin, end, ws, out)
                   : interference_run<P, true, false, false>(args, begin, end, ws, out);
}

}  // namespace zsl::ZSL_ISA
