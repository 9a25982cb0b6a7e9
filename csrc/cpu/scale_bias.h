// scale_bias: sums rows of features over groups of positions, which gives the gradients of biases and of the scales of norms.
//
// It reads operands of any dtype and stride. Each row is read once, while the sums of its group stay in the L1 cache.

namespace zsl::ZSL_ISA {

// Calls body(first feature, count) for one vector of features after another. The last vector may be partial. After inlining, the
// count of the full vectors is a compile-time constant.
template <class S, class Body>
ZSL_INLINE void each_vector(int64_t count, Body body) {
  int64_t k = 0;
  for (; k + lanes<S> <= count; k += lanes<S>) body(k, static_cast<int64_t>(lanes<S>));
  if (k < count) body(k, count - k);
}

// Loads the first n lanes from memory and sets the others to zero.
template <class S>
ZSL_INLINE Vec<S> load(const S* p, int64_t n) {
  if (n == lanes<S>) return load(p);
  S filled[lanes<S>] = {};
  std::memcpy(filled, p, static_cast<size_t>(n) * sizeof(S));
  return load(static_cast<const S*>(filled));
}

template <class S>
ZSL_INLINE void store(S* p, Vec<S> v, int64_t n) {
  if (n == lanes<S>) return store(p, v);
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(S));
}

template <class In, class S>
void copy_row(const In* src, int64_t stride, int64_t count, S* dst) {
  if (stride == 1)
    for (int64_t k = 0; k < count; ++k) dst[k] = static_cast<S>(widen(src[k]));
  else
    for (int64_t k = 0; k < count; ++k) dst[k] = static_cast<S>(widen(src[k * stride]));
}

// Returns the offset of the first feature of position p. Positions are flattened: p is position p % T of example p / T.
ZSL_INLINE int64_t row_offset(const Operand& x, int64_t T, int64_t p) { return p / T * x.sn + p % T * x.st; }

template <class S>
ZSL_INLINE bool lies_in_place(const Operand& x) {
  return x.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32) && x.sf == 1;
}

// Returns a pointer to features [k0, k0+kn) of the row at `offset`. It points to the operand itself if the features are contiguous
// and of type S. Otherwise the features are converted into `copy`.
template <class S>
ZSL_INLINE const S* read_row(const Operand& x, int64_t offset, int64_t k0, int64_t kn, S* copy) {
  const int64_t at = offset + k0 * x.sf;
  switch (x.dtype) {
    case DType::f32:
      if constexpr (sizeof(S) == 4)
        if (x.sf == 1) return static_cast<const S*>(x.data) + at;
      copy_row(static_cast<const float*>(x.data) + at, x.sf, kn, copy);
      break;
    case DType::f64:
      if constexpr (sizeof(S) == 8)
        if (x.sf == 1) return static_cast<const S*>(x.data) + at;
      copy_row(static_cast<const double*>(x.data) + at, x.sf, kn, copy);
      break;
    case DType::bf16:
      copy_row(static_cast<const bf16*>(x.data) + at, x.sf, kn, copy);
      break;
    case DType::f16:
      copy_row(static_cast<const f16*>(x.data) + at, x.sf, kn, copy);
      break;
  }
  return copy;
}

// Prefetches a row. This is only a hint: the row may end before kn or may not exist.
ZSL_INLINE void prefetch_row(const Operand& x, int64_t offset, int64_t k0, int64_t kn) {
  const int64_t size = x.dtype == DType::f64 ? 8 : x.dtype == DType::f32 ? 4 : 2;
  const char* at = static_cast<const char*>(x.data) + (offset + k0 * x.sf) * size;
  for (int64_t byte = 0; x.sf == 1 && byte < kn * size; byte += 64) __builtin_prefetch(at + byte);
}

// Returns the i-th position in the concatenation of all groups.
ZSL_INLINE int64_t position(const PositionArgs& args, int64_t i) { return args.order ? args.order[i] : i; }

// Computes Σ_p b_p (x_p − mean_p) rstd_p (with Scale) and Σ_p b_p (with Bias) over a list of positions and one block of features.
template <class S, bool Scale, bool Bias>
class PositionSums {
 public:
  PositionSums(int64_t block, Arena& arena) {
    copies_ = arena.take<S>((Scale ? 2 : 1) * together * copied);
    run_scale_ = arena.take<S>(Scale ? block : 0);
    run_bias_ = arena.take<S>(Bias ? block : 0);
  }

  // Processes positions order[begin … end), or begin … end if there is no order. It overwrites scale and bias.
  void run(const PositionArgs& args, int64_t begin, int64_t end, int64_t k0, int64_t kn, S* scale, S* bias) {
    if (begin == end) {
      if constexpr (Scale) std::memset(scale, 0, static_cast<size_t>(kn) * sizeof(S));
      if constexpr (Bias) std::memset(bias, 0, static_cast<size_t>(kn) * sizeof(S));
    }
    for (int64_t r0 = begin; r0 < end; r0 += run_length) {
      const bool first = r0 == begin;
      add_run(args, r0, std::min(end, r0 + run_length), k0, kn, first ? scale : run_scale_, first ? bias : run_bias_);
      if (first) continue;
      if constexpr (Scale)
        each_vector<S>(kn, [&](int64_t k, int64_t n) { store(scale + k, load(scale + k, n) + load(run_scale_ + k, n), n); });
      if constexpr (Bias)
        each_vector<S>(kn, [&](int64_t k, int64_t n) { store(bias + k, load(bias + k, n) + load(run_bias_ + k, n), n); });
    }
  }

 private:
  // `together` is the number of rows read at a time. `run_length` is the number of positions that are summed before they are added
  // to the total. Rounding errors grow with the longest chain of additions, whose length is positions / run_length + run_length /
  // together.
  static constexpr int together = 4;
  static constexpr int64_t run_length = 64;
  // Number of features that are copied from a row at a time. The copies of all rows stay in the L1 cache.
  static constexpr int64_t copied = 256;

  void add_run(const PositionArgs& args, int64_t begin, int64_t end, int64_t k0, int64_t kn, S* scale, S* bias) {
    int64_t p = begin;
    for (; p + together <= end; p += together) add_rows<together>(args, p, p == begin, k0, kn, scale, bias);
    for (; p < end; ++p) add_rows<1>(args, p, p == begin, k0, kn, scale, bias);
  }

  template <int Rows>
  void add_rows(const PositionArgs& args, int64_t at, bool first, int64_t k0, int64_t kn, S* scale, S* bias) {
    int64_t b_at[Rows], x_at[Rows];
    Vec<S> mean[Rows], rstd[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const int64_t p = position(args, at + r);
      b_at[r] = row_offset(args.b, args.T, p);
      if constexpr (Scale) {
        x_at[r] = row_offset(args.x, args.T, p);
        mean[r] = Vec<S>{} + (args.mean ? static_cast<const S*>(args.mean)[p] : S(0));
        rstd[r] = Vec<S>{} + (args.rstd ? static_cast<const S*>(args.rstd)[p] : S(1));
      }
    }
    const bool in_place = lies_in_place<S>(args.b) && (!Scale || lies_in_place<S>(args.x));
    const int64_t step = in_place ? kn : copied;
    // Hardware prefetching does not continue from one row to the next, so the next rows are prefetched here.
    const int64_t b_ahead = args.order ? 0 : Rows * args.b.st, x_ahead = args.order ? 0 : Rows * args.x.st;
    const int64_t b_there = in_place ? b_ahead : 0, x_there = in_place ? x_ahead : 0;
    for (int64_t f0 = 0; f0 < kn; f0 += step) {
      const int64_t fn = std::min(step, kn - f0);
      const S *b[Rows], *x[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        b[r] = read_row<S>(args.b, b_at[r], k0 + f0, fn, copies_ + r * copied);
        if (!in_place) prefetch_row(args.b, b_at[r] + b_ahead, k0 + f0, fn);
        if constexpr (Scale) {
          x[r] = read_row<S>(args.x, x_at[r], k0 + f0, fn, copies_ + (together + r) * copied);
          if (!in_place) prefetch_row(args.x, x_at[r] + x_ahead, k0 + f0, fn);
        }
      }
      each_vector<S>(fn, [&](int64_t k, int64_t n) {
        Vec<S> g[Rows], scaled[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          g[r] = load(b[r] + k, n);
          __builtin_prefetch(b[r] + k + b_there);
          if constexpr (Scale) {
            scaled[r] = g[r] * ((load(x[r] + k, n) - mean[r]) * rstd[r]);
            __builtin_prefetch(x[r] + k + x_there);
          }
        }
        if constexpr (Scale) add_to(scale + f0 + k, tree<Rows>(scaled), first, n);
        if constexpr (Bias) add_to(bias + f0 + k, tree<Rows>(g), first, n);
      });
    }
  }

  template <int Rows>
  ZSL_INLINE static Vec<S> tree(const Vec<S>* v) {
    if constexpr (Rows == together)
      return (v[0] + v[1]) + (v[2] + v[3]);
    else
      return v[0];
  }

  ZSL_INLINE static void add_to(S* sum, Vec<S> v, bool first, int64_t n) { store(sum, first ? v : load(sum, n) + v, n); }

  S *copies_, *run_scale_, *run_bias_;
};

// An item is a pair (group, block of features). The blocks of one group are consecutive.
template <class S, bool Scale, bool Bias>
size_t scale_bias_run(const PositionArgs& args, int64_t begin, int64_t end, void* workspace) {
  Arena arena(workspace);
  PositionSums<S, Scale, Bias> sums(args.block, arena);
  if (!workspace) return arena.used();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / args.blocks(), k0 = item % args.blocks() * args.block, at = group * args.K + k0;
    sums.run(args, args.starts[group], args.starts[group + 1], k0, std::min(args.block, args.K - k0),
             Scale ? static_cast<S*>(args.scale) + at : nullptr, Bias ? static_cast<S*>(args.bias) + at : nullptr);
  }
  return arena.used();
}

template <class S>
size_t scale_bias_as(const PositionArgs& args, int64_t begin, int64_t end, void* workspace) {
  if (!args.scale) return scale_bias_run<S, false, true>(args, begin, end, workspace);
  return args.bias ? scale_bias_run<S, true, true>(args, begin, end, workspace)
                   : scale_bias_run<S, true, false>(args, begin, end, workspace);
}

}  // namespace zsl::ZSL_ISA
