// weighted_grad: computes Σ_i w_i g_i, and with v and u also adds sign(u) Σ_i v_i |g_i|.
//
// With both terms the result is the derivative of dot and abs_dot with respect to u.

namespace zsl::ZSL_ISA {

template <class P, bool Abs>
struct WeightedEpilogue {
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  S* sum;
  S* abs_sum;
  S w, v;

  ZSL_INLINE void operator()(const Step<P>& s, const typename R::Acc& acc) {
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < R::vecs; ++c) {
        const int64_t p = s.index * R::size + r * R::cols + c * lanes<S>;
        store(sum + p, load(sum + p) + acc[r][c] * w);
        if constexpr (Abs) store(abs_sum + p, load(abs_sum + p) + ZSL_ISA::abs<S>(acc[r][c]) * v);
      }
  }
};

template <class P, bool Abs>
size_t weighted_run(const WeightedArgs& args, int64_t begin, int64_t end, void* workspace) {
  using S = typename P::Sum;
  using Tile = GradientTile<P>;
  const Shape& shape = args.shape;
  const int64_t size = Tile::size(shape);
  Arena arena(workspace);
  Tile tile(shape, arena);
  const int64_t count = (Abs ? 2 : 1) * size;
  S* sums = arena.take<S>(count);
  S* totals = shape.N > sum_run ? arena.take<S>(count) : nullptr;
  S* u = Abs ? arena.take<S>(size) : nullptr;
  if (!workspace) return arena.used();

  WeightedEpilogue<P, Abs> epilogues[P::together];
  for (int64_t index = begin; index < end; ++index) {
    const Rect rect = tile_rect(shape, index);
    std::memset(sums, 0, static_cast<size_t>(count) * sizeof(S));
    for (int64_t n = 0, examples; n < shape.N; n += examples) {
      examples = tile.group(n);
      move_sums(n, sums, totals, count);
      if (shape.begin && shape.length(n) == 0) continue;
      for (int64_t e = 0; e < examples; ++e)
        epilogues[e] = {sums, sums + size, static_cast<S>(args.w[n + e]), Abs ? static_cast<S>(args.v[n + e]) : S(0)};
      tile.run_group(args.a, args.b, n, examples, n == 0, rect, epilogues);
    }
    add_totals(sums, totals, count);
    if constexpr (Abs) {
      gather_tile<P>(static_cast<const S*>(args.u), shape.K, rect, u);
      for (int64_t p = 0; p < Tile::count(rect) * Tile::R::size; p += lanes<S>)
        store(sums + p, load(sums + p) + times_sign<S>(load(u + p), load(sums + size + p)));
    }
    scatter_tile<P>(sums, static_cast<S*>(args.out), shape.K, rect);
  }
  return arena.used();
}

template <class P>
size_t weighted_as(const WeightedArgs& args, int64_t begin, int64_t end, void* ws) {
  return args.v ? weighted_run<P, true>(args, begin, end, ws) : weighted_run<P, false>(args, begin, end, ws);
}

}  // namespace zsl::ZSL_ISA
