// One example's gradient g_i = b_iᵀ a_i over one tile of the output, register tile by register tile, handed to an epilogue.
//
// Inside a tile everything is kept in register-tile order: index = (column panel)·(row panels) + (row panel), ROWS × COLS values
// each. A column panel's register tiles thus lie one below the other, as [o][COLS]: they are a packed panel again.

namespace zsl::ZSL_ISA {

// Positions contracted at a time: a column panel of a chunk stays in the first-level cache, and no workspace grows with T.
inline constexpr int64_t chunk = 256;

// Sums over examples are sums of sums over so many: one chain of N float additions would err by √N.
inline constexpr int64_t sum_run = 64;

// A tile of the (O, K) output.
struct Rect {
  int64_t o0, on, k0, kn;
};

ZSL_INLINE Rect tile_rect(const Shape& s, int64_t tile) {
  const int64_t o0 = tile / s.tiles_k() * s.tile_o, k0 = tile % s.tiles_k() * s.tile_k;
  return {o0, std::min(s.tile_o, s.O - o0), k0, std::min(s.tile_k, s.K - k0)};
}

// Hands out aligned pieces of a worker's workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class E>
  E* take(int64_t count) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return reinterpret_cast<E*>(at);
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Runs blocks of register tiles for panels that a matrix unit multiplies (amx_tile.h).
template <class P, class Epilogue>
class BlockRunner;

template <class P>
class GradientTile {
 public:
  using R = RegisterTile<P>;
  using S = typename P::Sum;
  using Elem = typename P::Elem;

  GradientTile(const Shape& shape, Arena& arena, const AddedRows& added = {}) : shape_(shape), added_(added) {
    // group() gives no more examples than fit in a chunk.
    const int64_t examples = std::max<int64_t>(1, std::min<int64_t>(P::together, shape.N));
    const int64_t steps = std::min(chunk / P::depth, examples * steps_of<P>(std::min(chunk, shape.T)));
    rows_ = arena.take<Elem>(ceil_div(shape.tile_o, R::rows) * R::rows * steps * P::depth);
    cols_ = arena.take<Elem>(ceil_div(shape.tile_k, R::cols) * R::cols * steps * P::depth);
    carry_ = shape.T > chunk || added.begin ? arena.take<S>(size(shape)) : nullptr;
  }

  // Values of a full tile, its padding included.
  static int64_t size(const Shape& s) { return ceil_div(s.tile_o, R::rows) * ceil_div(s.tile_k, R::cols) * R::size; }
  static int64_t count(const Rect& rect) { return ceil_div(rect.on, R::rows) * ceil_div(rect.kn, R::cols); }

  // How many examples from n on run forms together.
  int64_t group(int64_t n) const {
    int64_t count = 1, steps = steps_of<P>(shape_.length(n));
    if (P::together == 1 || steps == 0 || added_.begin) return 1;
    for (; count < P::together && n + count < shape_.N && (n + count) % sum_run != 0; ++count) {
      const int64_t more = steps_of<P>(shape_.length(n + count));
      if (more == 0 || more > chunk / P::depth - steps) break;
      steps += more;
    }
    return count;
  }

  // `first` says that this is the worker's first example of this tile.
  template <class Epilogue>
  void run(const Operand& a, const Operand& b, int64_t n, bool first, const Rect& rect, Epilogue& epilogue) {
    run_group(a, b, n, 1, first, rect, &epilogue);
  }

  // The same for `count` examples from n on, at most group(n), each with an epilogue.
  template <class Epilogue>
  void run_group(const Operand& a, const Operand& b, int64_t n, int64_t count, bool first, const Rect& rect, Epilogue* epilogues) {
    const int64_t at = shape_.first(n), length = shape_.length(n);
    const bool shared = a.sn == 0 && !shape_.begin;
    find_added(n, rect);
    start_carry(rect);
    int64_t t0 = 0;
    do {  // once even without positions: the gradient is then zero, or the added rows alone
      const int64_t tn = std::min(chunk, length - t0);
      // Inputs shared by all examples are packed once for each tile.
      if (first || !shared || tn != length) pack_columns<P>(a, n, at + t0, tn, rect.k0, rect.kn, cols_);
      pack_rows<P>(b, n, at + t0, tn, rect.o0, rect.on, rows_);
      if constexpr (P::together == 1) {
        run_chunk(t0, tn, t0 + tn == length, rect, *epilogues);
      } else {
        parts_[0] = {rows_, cols_, steps_of<P>(tn)};
        for (int64_t e = 1; e < count; ++e) pack_beside(a, b, n, e, shared, rect);
        run_blocks(t0, t0 + tn == length, count, rect, epilogues);
      }
      t0 += tn;
    } while (t0 < length);
  }

  // Calls body(p, k, at, count) for the pieces of example n's added rows in the tile: columns [k, k + count) of row p, which in
  // register-tile order are at `at`.
  template <class Body>
  void each_added(int64_t n, const Rect& rect, Body body) {
    find_added(n, rect);
    each_piece(rect, body);
  }

 private:
  // An example's panels of a chunk.
  struct Part {
    Elem *rows, *cols;
    int64_t steps;
  };

  // Example n + e of the group that begins with n, after the one before.
  void pack_beside(const Operand& a, const Operand& b, int64_t n, int64_t e, bool shared, const Rect& rect) {
    const Part& before = parts_[e - 1];
    const int64_t at = shape_.first(n + e), length = shape_.length(n + e), depth = before.steps * P::depth;
    Elem* rows = before.rows + ceil_div(rect.on, R::rows) * R::rows * depth;
    Elem* cols = shared ? cols_ : before.cols + ceil_div(rect.kn, R::cols) * R::cols * depth;
    if (!shared) pack_columns<P>(a, n + e, at, length, rect.k0, rect.kn, cols);
    pack_rows<P>(b, n + e, at, length, rect.o0, rect.on, rows);
    parts_[e] = {rows, cols, steps_of<P>(length)};
  }

  // Which of example n's added rows lie in the tile: [added_first_, added_end_).
  void find_added(int64_t n, const Rect& rect) {
    if (!added_.begin) return;
    const int64_t *first = added_.index + added_.begin[n], *end = added_.index + added_.begin[n + 1];
    added_first_ = std::lower_bound(first, end, rect.o0) - added_.index;
    added_end_ = std::lower_bound(first, end, rect.o0 + rect.on) - added_.index;
  }

  // The carry += added rows.
  void add_rows(const Rect& rect) {
    each_piece(rect, [&](int64_t p, int64_t k, int64_t at, int64_t count) {
      const S* from = static_cast<const S*>(added_.values) + p * shape_.K + k;
      for (int64_t c = 0; c < count; ++c) carry_[at + c] += from[c];
    });
  }

  // In a column panel output feature o's row is the o-th, whatever register tile it is in.
  template <class Body>
  void each_piece(const Rect& rect, Body body) {
    const int64_t rows = ceil_div(rect.on, R::rows) * R::rows;
    for (int64_t p = added_first_; p < added_end_; ++p)
      for (int64_t k = 0; k < rect.kn; k += R::cols)
        body(p, rect.k0 + k, k * rows + (added_.index[p] - rect.o0) * R::cols, std::min<int64_t>(R::cols, rect.kn - k));
  }

  // The register tiles that added rows touch start from these, carried like the sums of a chunk before the first.
  void start_carry(const Rect& rect) {
    const int64_t row_panels = ceil_div(rect.on, R::rows);
    for (int64_t p = added_first_; p < added_end_; ++p)
      for (int64_t kp = 0; kp < ceil_div(rect.kn, R::cols); ++kp) {
        S* touched = carry_ + (kp * row_panels + (added_.index[p] - rect.o0) / R::rows) * R::size;
        std::memset(touched, 0, R::size * sizeof(S));
      }
    add_rows(rect);
  }

  template <class Epilogue>
  void run_chunk(int64_t t0, int64_t tn, bool last, const Rect& rect, Epilogue& epilogue) {
    const int64_t steps = steps_of<P>(tn), row_panels = ceil_div(rect.on, R::rows), col_panels = ceil_div(rect.kn, R::cols);
    Step<P> s;
    s.steps = steps;
    s.last = last;
    s.index = 0;
    for (int64_t kp = 0; kp < col_panels; ++kp) {
      s.col_panel = cols_ + kp * steps * R::cols * P::depth;
      s.cols = rect.kn - kp * R::cols;
      for (int64_t op = 0, p = added_first_; op < row_panels; ++op, ++s.index) {
        s.row_panel = rows_ + op * steps * R::rows * P::depth;
        s.rows = rect.on - op * R::rows;
        s.first = t0 == 0;
        for (; p < added_end_ && added_.index[p] < rect.o0 + (op + 1) * R::rows; ++p) s.first = false;
        s.carry = carry_ + s.index * R::size;
        run_register_tile<P>(s, epilogue);
      }
    }
  }

  // The same by blocks of register tiles that lie one above the other, each block for all examples of a group.
  template <class Epilogue>
  void run_blocks(int64_t t0, bool last, int64_t count, const Rect& rect, Epilogue* epilogues) {
    using Runner = BlockRunner<P, Epilogue>;
    const int64_t row_panels = ceil_div(rect.on, R::rows), col_panels = ceil_div(rect.kn, R::cols);
    Runner runner;
    for (int64_t kp = 0; kp < col_panels; ++kp)
      for (int64_t op = 0, p = added_first_; op < row_panels; op += Runner::height) {
        const int height = static_cast<int>(std::min<int64_t>(Runner::height, row_panels - op));
        Step<P> steps[Runner::height] = {};
        for (int64_t e = 0; e < count; ++e) {
          for (int i = 0; i < height; ++i) {
            Step<P>& s = steps[i];
            s.steps = parts_[e].steps;
            s.row_panel = parts_[e].rows + (op + i) * s.steps * R::rows * P::depth;
            s.col_panel = parts_[e].cols + kp * s.steps * R::cols * P::depth;
            s.rows = rect.on - (op + i) * R::rows, s.cols = rect.kn - kp * R::cols;
            s.index = kp * row_panels + op + i;
            s.carry = carry_ + s.index * R::size;
            s.first = t0 == 0, s.last = last;
            for (; p < added_end_ && added_.index[p] < rect.o0 + (op + i + 1) * R::rows; ++p) s.first = false;
          }
          runner.run(steps, height, epilogues[e]);
        }
      }
    runner.finish();
  }

  Shape shape_;
  AddedRows added_;
  int64_t added_first_ = 0, added_end_ = 0;
  Elem *rows_, *cols_;
  S* carry_;
  Part parts_[P::together];
};

// A tile of a contiguous (O, K) matrix, to and from register-tile order. Padding reads as zero and is not written back.
template <class P>
void gather_tile(const typename P::Sum* matrix, int64_t K, const Rect& rect, typename P::Sum* tile) {
  using R = RegisterTile<P>;
  const int64_t on = ceil_div(rect.on, R::rows) * R::rows;
  for (int64_t k = 0; k < rect.kn; k += R::cols)
    for (int64_t o = 0; o < on; ++o, tile += R::cols)
      for (int64_t c = 0; c < R::cols; ++c)
        tile[c] = o < rect.on && k + c < rect.kn ? matrix[(rect.o0 + o) * K + rect.k0 + k + c] : typename P::Sum(0);
}

template <class P>
void scatter_tile(const typename P::Sum* tile, typename P::Sum* matrix, int64_t K, const Rect& rect) {
  using R = RegisterTile<P>;
  const int64_t on = ceil_div(rect.on, R::rows) * R::rows;
  for (int64_t k = 0; k < rect.kn; k += R::cols) {
    const int64_t cols = std::min<int64_t>(R::cols, rect.kn - k);
    for (int64_t o = 0; o < on; ++o, tile += R::cols)
      if (o < rect.on)
        std::memcpy(matrix + (rect.o0 + o) * K + rect.k0 + k, tile, static_cast<size_t>(cols) * sizeof(typename P::Sum));
  }
}

// Σ_p x_i[p] y_j[p] for every pair of examples over one tile, as a StoreEpilogue left them. With `self`, only blocks that touch or
// lie above the diagonal. Sums are S in each lane over one tile and double from there on.
template <class P>
class TileGram {
 public:
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  // side² sums and their operands fill the registers.
  static constexpr int side = ZSL_ROWS * ZSL_COL_VECS >= 24 ? 4 : 3;

  // Examples are stored side by side in blocks of `side`. What fills up the last one, whatever it is, reaches only sums that no one
  // reads.
  static int64_t padded(int64_t examples) { return ceil_div(examples, side) * side; }

  TileGram(int64_t N, int64_t M, Arena& arena) : N_(N), M_(M) {
    // Sums are kept in vectors for a band of rows at a time, so that their memory does not grow with N·M.
    const int64_t row = padded(M) * lanes<S>, most = (int64_t{1} << 20) / std::max<int64_t>(row, 1) / side * side;
    band_ = std::min(padded(N), std::max<int64_t>(side, most));
    lanes_ = arena.take<S>(band_ * row);
  }

  void run(const S* x, const S* y, int64_t count, bool self, double* gram) {
    for (int64_t i0 = 0; i0 < N_; i0 += band_) {
      std::memset(lanes_, 0, static_cast<size_t>(band_ * padded(M_) * lanes<S>) * sizeof(S));
      for (int64_t p = 0; p < count; ++p)
        each_block(i0, self, [&](int64_t i, int64_t j, S* sums) {
          multiply(x + (p * padded(N_) + i) * R::size, y + (p * padded(M_) + j) * R::size, sums);
        });
      each_block(i0, self, [&](int64_t i, int64_t j, const S* sums) {
        for (int64_t r = i; r < std::min(i + side, N_); ++r)
          for (int64_t c = j; c < std::min(j + side, M_); ++c)
            gram[r * M_ + c] += sum_lanes<S>(load(sums + ((r - i) * side + c - j) * lanes<S>));
      });
    }
  }

 private:
  template <class Body>
  void each_block(int64_t i0, bool self, Body body) {
    S* sums = lanes_;
    for (int64_t i = i0; i < std::min(N_, i0 + band_); i += side)
      for (int64_t j = 0; j < M_; j += side, sums += side * side * lanes<S>)
        if (!self || j >= i) body(i, j, sums);
  }

  static void multiply(const S* x, const S* y, S* sums) {
    Vec<S> acc[side][side];
#pragma GCC unroll 4
    for (int r = 0; r < side; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < side; ++c) acc[r][c] = load(sums + (r * side + c) * lanes<S>);
    for (int64_t p = 0; p < R::size; p += lanes<S>) {
      Vec<S> yv[side];
#pragma GCC unroll 4
      for (int c = 0; c < side; ++c) yv[c] = load(y + c * R::size + p);
#pragma GCC unroll 4
      for (int r = 0; r < side; ++r) {
        const Vec<S> xv = load(x + r * R::size + p);
#pragma GCC unroll 4
        for (int c = 0; c < side; ++c) acc[r][c] += xv * yv[c];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < side; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < side; ++c) store(sums + (r * side + c) * lanes<S>, acc[r][c]);
  }

  int64_t N_, M_, band_;
  S* lanes_;
};

// Before example n of N: moves the sums on into the totals (`count` of each, apart), where there are any, once a run is over.
template <class S>
ZSL_INLINE void move_sums(int64_t n, S* sums, S* totals, int64_t count) {
  if (!totals || n == 0 || n % sum_run != 0) return;
  for (int64_t p = 0; p < count; p += lanes<S>) {
    store(totals + p, n == sum_run ? load(sums + p) : load(totals + p) + load(sums + p));
    store(sums + p, Vec<S>{});
  }
}

// After the last example: the totals' share, back into the sums.
template <class S>
void add_totals(S* sums, const S* totals, int64_t count) {
  for (int64_t p = 0; totals && p < count; p += lanes<S>) store(sums + p, load(totals + p) + load(sums + p));
}

// Keeps a tile of every example's gradient: stored[index][example][ROWS·COLS], the examples padded as TileGram wants them.
template <class P>
class StoredTiles {
 public:
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  StoredTiles(const Shape& shape, int64_t examples, Arena& arena)
      : examples_(TileGram<P>::padded(examples)), data_(arena.take<S>(GradientTile<P>::size(shape) * examples_)) {}

  S* at(int64_t index, int64_t example) const { return data_ + (index * examples_ + example) * R::size; }
  S* data() const { return data_; }

 private:
  int64_t examples_;
  S* data_;
};

template <class P>
struct StoreEpilogue {
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  const StoredTiles<P>* stored;
  int64_t example;

  ZSL_INLINE void operator()(const Step<P>& s, const typename R::Acc& acc) {
    S* out = stored->at(s.index, example);
#pragma GCC unroll 16
    for (int r = 0; r < R::rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < R::vecs; ++c) store(out + r * R::cols + c * lanes<S>, acc[r][c]);
  }
};

}  // namespace zsl::ZSL_ISA
