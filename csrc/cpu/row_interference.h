// row_interference: computes the sums, scalars and Gram matrix of gradients that consist of few rows.
//
// Each row is a sum of some positions of b. An embedding's gradient has one row per token. A small dense gradient that is already
// in memory is one row with one position per example.

namespace zsl::ZSL_ISA {

// Computes Σ_k x_ik x_jk for every pair of examples that touch a row, over one block of features.
template <class S>
class RowGram {
 public:
  static constexpr int side = ZSL_ROWS * ZSL_COL_VECS >= 24 ? 4 : 3;  // side² accumulators and their operands fill the registers

  RowGram(int64_t examples, int64_t block, Arena& arena) {
    // The stride is one cache line longer than the block. Rows at a distance of a power of two would map to the same cache set.
    stride_ = ceil_div(block, lanes<S>) * lanes<S> + 64 / static_cast<int64_t>(sizeof(S));
    rows_ = arena.take<S>(ceil_div(examples, side) * side * stride_);
    examples_ = arena.take<int64_t>(examples);
  }

  // Returns where to write the row of the next example.
  S* next() const { return rows_ + count_ * stride_; }
  void push(int64_t example) { examples_[count_++] = example; }

  // Adds the products to the (N, N) gram and clears the list of rows. Examples arrive in ascending order, so the products lie on
  // and above the diagonal.
  void finish(int64_t features, int64_t N, double* gram) {
    const int64_t width = ceil_div(features, lanes<S>) * lanes<S>, padded = ceil_div(count_, side) * side;
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t from = i < count_ ? features : 0;
      std::memset(rows_ + i * stride_ + from, 0, static_cast<size_t>(width - from) * sizeof(S));
    }
    // A panel of columns stays in the L2 cache while all rows are processed.
    constexpr int64_t panel = 8 * side;
    for (int64_t j0 = 0; j0 < padded; j0 += panel)
      for (int64_t i = 0; i < std::min(padded, j0 + panel); i += side)
        for (int64_t j = std::max(i, j0); j < std::min(padded, j0 + panel); j += side) multiply(i, j, width, N, gram);
    count_ = 0;
  }

 private:
  void multiply(int64_t i, int64_t j, int64_t width, int64_t N, double* gram) const {
    double sums[side][side] = {};
    // A lane accumulates in S over 64 vectors and in double across them.
    for (int64_t k0 = 0; k0 < width; k0 += 64 * lanes<S>) {
      Vec<S> acc[side][side] = {};
      for (int64_t k = k0; k < std::min(width, k0 + 64 * lanes<S>); k += lanes<S>) {
        Vec<S> y[side];
#pragma GCC unroll 4
        for (int c = 0; c < side; ++c) y[c] = load(rows_ + (j + c) * stride_ + k);
#pragma GCC unroll 4
        for (int r = 0; r < side; ++r) {
          const Vec<S> x = load(rows_ + (i + r) * stride_ + k);
#pragma GCC unroll 4
          for (int c = 0; c < side; ++c) acc[r][c] += x * y[c];
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < side; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < side; ++c) sums[r][c] += sum_lanes<S>(acc[r][c]);
    }
    for (int64_t r = 0; r < std::min<int64_t>(side, count_ - i); ++r)
      for (int64_t c = i == j ? r : 0; c < std::min<int64_t>(side, count_ - j); ++c)
        gram[examples_[i + r] * N + examples_[j + c]] += sums[r][c];
  }

  S* rows_;
  int64_t* examples_;
  int64_t stride_, count_ = 0;
};

// Adds a block of one example's row to the row's sums and to the example's scalars. The first example of a run overwrites the sums.
template <class S, bool Direction>
ZSL_INLINE void fold_row(const S* g, const S* u, int64_t features, bool first, S* grad, S* abs, S* sq, int64_t example,
                         const InterferencePartials& out) {
  constexpr int64_t most = 64 * lanes<S>;  // number of features over which the lanes of the scalars accumulate in S
  for (int64_t k0 = 0; k0 < features; k0 += most) {
    Vec<S> l1 = {}, sq_norm = {}, dot = {}, abs_dot = {};
    each_vector<S>(std::min(most, features - k0), [&](int64_t j, int64_t n) {
      const int64_t k = k0 + j;
      const Vec<S> v = load(g + k, n), m = ZSL_ISA::abs<S>(v), v2 = v * v;
      store(grad + k, first ? v : load(grad + k, n) + v, n);
      store(abs + k, first ? m : load(abs + k, n) + m, n);
      store(sq + k, first ? v2 : load(sq + k, n) + v2, n);
      l1 += m;
      sq_norm += v2;
      if constexpr (Direction) {
        const Vec<S> p = v * load(u + k, n);
        dot += p;
        abs_dot += ZSL_ISA::abs<S>(p);
      }
    });
    out.l1[example] += sum_lanes<S>(l1);
    out.sq_norm[example] += sum_lanes<S>(sq_norm);
    if constexpr (Direction) out.dot[example] += sum_lanes<S>(dot), out.abs_dot[example] += sum_lanes<S>(abs_dot);
  }
}

// Sums over examples are accumulated in runs of this many examples, and the runs are then added, as in gradient_tile.h.
inline constexpr int64_t row_run = 64;

// Computes total += sum, or total = sum with `first`.
template <class S>
void add_run_to(S* total, const S* sum, int64_t features, bool first) {
  each_vector<S>(features, [&](int64_t k, int64_t n) {
    store(total + k, first ? load(sum + k, n) : load(total + k, n) + load(sum + k, n), n);
  });
}

// An item is a pair (row, block of features). The blocks of one row are consecutive.
template <class S, bool Direction, bool Gram>
size_t row_interference_run(const RowArgs& args, int64_t begin, int64_t end, void* workspace, const InterferencePartials* out) {
  const PositionArgs& rows = args.rows;
  Arena arena(workspace);
  PositionSums<S, false, true> sums(rows.block, arena);
  RowGram<S> gram(Gram ? args.most_examples : 0, rows.block, arena);
  S* buffer = arena.take<S>(rows.block);
  S* totals = args.most_examples > row_run ? arena.take<S>(3 * rows.block) : nullptr;
  if (!workspace) return arena.used();

  const auto example_of = [&](int64_t i) {
    const int64_t p = position(rows, i);
    return args.examples ? args.examples[p] : p / rows.T;
  };
  const int64_t stop = begin < end ? rows.starts[(end - 1) / rows.blocks() + 1] : 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / rows.blocks(), k0 = item % rows.blocks() * rows.block, kn = std::min(rows.block, rows.K - k0);
    const int64_t at = row * rows.K + k0, first = rows.starts[row], last = rows.starts[row + 1];
    S* const to[] = {static_cast<S*>(args.grad_sum) + at, static_cast<S*>(args.abs_sum) + at, static_cast<S*>(args.sq_sum) + at};
    int64_t folded = 0, runs = 0;  // the number of examples in this run and the number of runs before it
    for (int64_t i = first, next; i < last; i = next, ++folded) {
      if (folded == row_run) {
        for (int s = 0; s < 3; ++s) add_run_to(totals + s * rows.block, to[s], kn, runs == 0);
        folded = 0, ++runs;
      }
      const int64_t example = example_of(i);
      for (next = i + 1; next < last && example_of(next) == example;) ++next;
      // Rows can lie anywhere in memory, so the next row is prefetched while this one is processed.
      if (next < stop) prefetch_row(rows.b, row_offset(rows.b, rows.T, position(rows, next)), k0, kn);
      S* own = Gram ? gram.next() : buffer;
      const S* g = own;
      if (next - i > 1)
        sums.run(rows, i, next, k0, kn, nullptr, own);
      else
        g = read_row<S>(rows.b, row_offset(rows.b, rows.T, position(rows, i)), k0, kn, own);
      if constexpr (Gram) {
        if (g != own) std::memcpy(own, g, static_cast<size_t>(kn) * sizeof(S));
        gram.push(example);
      }
      fold_row<S, Direction>(g, Direction ? static_cast<const S*>(args.u) + at : nullptr, kn, folded == 0, to[0], to[1], to[2],
                             example, *out);
    }
    for (int s = 0; runs && s < 3; ++s) add_run_to(to[s], totals + s * rows.block, kn, false);
    if constexpr (Gram) gram.finish(kn, args.N, out->gram);
  }
  return arena.used();
}

template <class S>
size_t row_interference_as(const RowArgs& args, int64_t begin, int64_t end, void* ws, const InterferencePartials* out) {
  if (args.u)
    return args.gram ? row_interference_run<S, true, true>(args, begin, end, ws, out)
                     : row_interference_run<S, true, false>(args, begin, end, ws, out);
  return args.gram ? row_interference_run<S, false, true>(args, begin, end, ws, out)
                   : row_interference_run<S, false, false>(args, begin, end, ws, out);
}

}  // namespace zsl::ZSL_ISA
