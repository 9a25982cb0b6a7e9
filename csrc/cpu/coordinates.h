// coordinate_sums: reduces the three sums to the values that the interference metrics need, in one pass.
//
// The sums are large and the arithmetic is short, so the kernel should cost no more than reading each sum once.

namespace zsl::ZSL_ISA {

template <class S>
ZSL_INLINE Vec<S> sqrt(Vec<S> v) {
  Vec<S> root;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<S>; ++i) {
    if constexpr (sizeof(S) == 4)
      root[i] = __builtin_sqrtf(v[i]);
    else
      root[i] = __builtin_sqrt(v[i]);
  }
  return root;
}

// Adds the sums over coordinates [begin, end) to out. CoordinateArgs defines the order of out. Within one block the lanes
// accumulate in S. Across blocks they accumulate in double.
template <class S, bool Direction>
void coordinates_as(const CoordinateArgs& args, int64_t begin, int64_t end, double* out) {
  using Bits = typename VecTypes<S>::Bits;
  constexpr int64_t block = 64 * lanes<S>;
  const S *grad = static_cast<const S*>(args.grad_sum), *abs_sum = static_cast<const S*>(args.abs_sum);
  const S *sq = static_cast<const S*>(args.sq_sum), *u = static_cast<const S*>(args.u);
  // A partial vector is read from a zero-padded copy. The padding counts as untouched coordinates, so that it adds nothing.
  S tail[4][lanes<S>] = {};
  for (int64_t b0 = begin; b0 < end; b0 += block) {
    Vec<S> touched = {}, ratio = {}, null_ratio = {}, grad_sq = {}, sq_total = {}, p_sum = {}, p_abs = {}, p_null = {};
    const int64_t stop = std::min(end, b0 + block);
    for (int64_t j = b0; j < stop; j += lanes<S>) {
      const S *g_at = grad + j, *a_at = abs_sum + j, *s_at = sq + j, *u_at = Direction ? u + j : nullptr;
      if (stop - j < lanes<S>) {
        const size_t bytes = static_cast<size_t>(stop - j) * sizeof(S);
        std::memcpy(tail[0], g_at, bytes), std::memcpy(tail[1], a_at, bytes), std::memcpy(tail[2], s_at, bytes);
        if constexpr (Direction) std::memcpy(tail[3], u_at, bytes);
        g_at = tail[0], a_at = tail[1], s_at = tail[2], u_at = tail[3];
      }
      const Vec<S> g = load(g_at), a = load(a_at), s = load(s_at), root = ZSL_ISA::sqrt<S>(s), size = ZSL_ISA::abs<S>(g);
      const Bits is_touched = (Bits)(a != Vec<S>{});
      const Vec<S> one = Vec<S>{} + S(1), safe = is_touched ? a : one;
      touched += is_touched ? one : Vec<S>{};
      ratio += size / safe;
      null_ratio += root / safe;
      grad_sq += g * g;
      sq_total += s;
      if constexpr (Direction) {
        const Vec<S> step = ZSL_ISA::abs<S>(load(u_at));
        p_sum += size * step;
        p_abs += a * step;
        p_null += root * step;
      }
    }
    const Vec<S> totals[] = {touched, ratio, null_ratio, grad_sq, sq_total, p_sum, p_abs, p_null};
    for (int i = 0; i < 8; ++i) out[i] += sum_lanes<S>(totals[i]);
  }
}

}  // namespace zsl::ZSL_ISA
