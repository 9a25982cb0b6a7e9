// Computes one tile of one example's gradient g_i = b_iᵀ a_i and passes each register tile to an epilogue.
//
// Values of a tile are stored in register-tile order: index = (column panel)·(row panels) + (row panel), with ROWS × COLS values
// per index. The register tiles of one column panel are therefore consecutive and form an [o][COLS] array, which is itself a packed
// panel.

namespace zsl::ZSL_ISA {

// Number of positions contracted at a time. A column panel of one chunk fits in the L1 cache, and the size of the workspace does
// not grow with T.
inline constexpr int64_t chunk = 256;

// Sums over examples are accumulated in runs of this many examples, and the runs are then added. The error of one chain of N float
// additions would grow with √N.
inline constexpr int64_t sum_run = 64;

// A tile of the (O, K) output.
struct Rect {
  int64_t o0, on, k0, kn;
};

ZSL_INLINE Rect tile_rect(const Shape& s, int64_t tile) {
  const int64_t o0 = tile / s.tiles_k() * s.tile_o, k0 = tile % s.tiles_k() * s.tile_k;
  return {o0, std::min(s.tile_o, s.O - o0), k0, std::min(s.tile_k, s.K - k0)};
}

// Allocates aligned parts of a worker's workspace. With a null base it only computes the required size.
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

// Runs blocks of register tiles for panels that are multiplied by a matrix unit (see amx_tile.h).
template <class P, class Epilogue>
class BlockRunner;

template <class P>
class GradientTile {
 public:
  using R = RegisterTile<P>;
  using S = typename P::Sum;
  using Elem = typename P::Elem;

  GradientTile(const Shape& shape, Arena& arena, const AddedRows& added = {}) : shape_(shape), added_(added) {
    // group() returns no more examples than fit in one chunk.
    const int64_t examples = std::max<int64_t>(1, std::min<int64_t>(P::together, shape.N));
    const int64_t steps = std::min(chunk / P::depth, examples * steps_of<P>(std::min(chunk, shape.T)));
    rows_ = arena.take<Elem>(ceil_div(shape.tile_o, R::rows) * R::rows * steps * P::depth);
    cols_ = arena.take<Elem>(ceil_div(shape.tile_k, R::cols) * R::cols * steps * P::depth);
    carry_ = shape.T > chunk || added.begin ? arena.take<S>(size(shape)) : nullptr;
  }

  // Number of values of a full tile, including padding.
  static int64_t size(const Shape& s) { return ceil_div(s.tile_o, R::rows) * ceil_div(s.tile_k, R::cols) * R::size; }
  static int64_t count(const Rect& rect) { return ceil_div(rect.on, R::rows) * ceil_div(rect.kn, R::cols); }

  // Returns how many examples, starting with n, run_group processes together.
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

  // `first` says that n is the worker's first example for this tile.
  template <class Epilogue>
  void run(const Operand& a, const Operand& b, int64_t n, bool first, const Rect& rect, Epilogue& epilogue) {
    run_group(a, b, n, 1, first, rect, &epilogue);
  }

  // Does the same for `count` examples starting with n. `count` is at most group(n), and each example has its own epilogue.
  template <class Epilogue>
  void run_group(const Operand& a, const Operand& b, int64_t n, int64_t count, bool first, const Rect& rect, Epilogue* epilogues) {
    const int64_t at = shape_.first(n), length = shape_.length(n);
    const bool shared = a.sn == 0 && !shape_.begin;
    find_added(n, rect);
    start_carry(rect);
    int64_t t0 = 0;
    do {  // runs once even without positions: the gradient is then zero, or only the added rows
      const int64_t tn = std::min(chunk, length - t0);
      // Inputs shared by all examples are packed once per tile.
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

  // Calls body(p, k, at, count) for each piece of example n's added rows in the tile. The piece is columns [k, k + count) of row p,
  // and `at` is its offset in register-tile order.
  template <class Body>
  void each_added(int64_t n, const Rect& rect, Body body) {
    find_added(n, rect);
    each_piece(rect, body);
  }

 private:
  // The panels of one example for one chunk.
  struct Part {
    Elem *rows, *cols;
    int64_t steps;
  };

  // Packs example n + e of the group that begins with n, behind the panels of the previous example.
  void pack_beside(const Operand& a, const Operand& b, int64_t n, int64_t e, bool shared, const Rect& rect) {
    const Part& before = parts_[e - 1];
    const int64_t at = shape_.first(n + e), length = shape_.length(n + e), depth = before.steps * P::depth;
    Elem* rows = before.rows + ceil_div(rect.on, R::rows) * R::rows * depth;
    Elem* cols = shared ? cols_ : before.cols + ceil_div(rect.kn, R::cols) * R::cols * depth;
    if (!shared) pack_columns<P>(a, n + e, at, length, rect.k0, rect.kn, cols);
    pack_rows<P>(b, n + e, at, length, rect.o0, rect.on, rows);
    parts_[e] = {rows, cols, steps_of<P>(length)};
  }

  // Finds the added rows of example n that lie in the tile: [added_first_, added_end_).
  void find_added(int64_t n, const Rect& rect) {
    if (!added_.begin) return;
    const int64_t *first = added_.index + added_.begin[n], *end = added_.index + added_.begin[n + 1];
    added_first_ = std::lower_bound(first, end, rect.o0) - added_.index;
    added_end_ = std::lower_bound(first, end, rect.o0 + rect.on) - added_.index;
  }

  // Adds the added rows to the carry.
  void add_rows(const Rect& rect) {
    each_piece(rect, [&](int64_t p, int64_t k, int64_t at, int64_t count) {
      const S* from = static_cast<const S*>(added_.values) + p * shape_.K + k;
      for (int64_t c = 0; c < count; ++c) carry_[at + c] += from[c];
    });
  }

  // In a column panel, the row of output feature o is the o-th row, regardless of its register tile.
  template <class Body>
  void each_piece(const Rect& rect, Body body) {
    const int64_t rows = ceil_div(rect.on, R::rows) * R::rows;
    for (int64_t p = added_first_; p < added_end_; ++p)
      for (int64_t k = 0; k < rect.kn; k += R::cols)
        body(p, rect.k0 + k, k * rows + (added_.index[p] - rect.o0) * R::cols, std::min<int64_t>(R::cols, rect.kn - k));
  }

  // Register tiles that contain added rows start from these rows. The carry holds them as if they were the sums of an earlier
  // chunk.
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

  // Does the same in blocks of vertically adjacent register tiles. It processes each block for all examples of a group.
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

// Copies a tile of a contiguous (O, K) matrix to and from register-tile order. Padding is read as zero and is not written back.
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

// Computes Σ_p x_i[p] y_j[p] over one tile for every pair of examples, from the layout that StoreEpilogue writes. With `self`, it
// computes only blocks that touch or lie above the diagonal. Each lane accumulates in S within one tile and in double across tiles.
template <class P>
class TileGram {
 public:
  using R = RegisterTile<P>;
  using S = typename P::Sum;

  // The side² accumulators and their operands fill the registers.
  static constexpr int side = ZSL_ROWS * ZSL_COL_VECS >= 24 ? 4 : 3;

  // Number of stored examples: they are stored in blocks of `side`. The padding of the last block may hold any values, because they
  // affect only sums that are never read.
  static int64_t padded(int64_t examples) { return ceil_div(examples, side) * side; }

  TileGram(int64_t N, int64_t M, Arena& arena) : N_(N), M_(M) {
    // The vectors of partial sums cover one band of rows at a time, so that their memory does not grow with N·M.
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

// Call before example n. At the end of each run it adds the `count` sums to the totals and zeroes them. It does nothing without
// totals.
template <class S>
ZSL_INLINE void move_sums(int64_t n, S* sums, S* totals, int64_t count) {
  if (!totals || n == 0 || n % sum_run != 0) return;
  for (int64_t p = 0; p < count; p += lanes<S>) {
    store(totals + p, n == sum_run ? load(sums + p) : load(totals + p) + load(sums + p));
    store(sums + p, Vec<S>{});
  }
}

// Call after the last example. It adds the totals to the sums.
template <class S>
void add_totals(S* sums, const S* totals, int64_t count) {
  for (int64_t p = 0; totals && p < count; p += lanes<S>) store(sums + p, load(totals + p) + load(sums + p));
}

// Stores one tile of every example's gradient as stored[index][example][ROWS·COLS], with the examples padded for TileGram.
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
