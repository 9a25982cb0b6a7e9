// The bf16 product on the processor's matrix unit (AMX).
//
// This file is included if ZSL_AMX is defined, after the tile instructions. These come from <immintrin.h>, or from loops with the
// same effect (tests/native/amx_instructions.h).
//
// The unit has eight tiles of 16 rows of 64 bytes. tdpbf16ps multiplies a tile of 16 rows × 32 positions by a tile of 16 pairs of
// positions × 16 columns and adds the product to a 16 × 16 tile of float sums. A block of the gradient is 32 × 32. Tiles 0 to 3
// hold its sums, tiles 4 and 5 its rows, and tiles 6 and 7 its columns, so that four loads feed four products. A tile load occupies
// the load ports for 8 cycles and a product occupies the unit for 16 cycles, so the unit is the bottleneck. With fewer sums the
// loads would count more: 2 × 1 tiles take 24 cycles of loads for 32 of products, and 1 × 1 tiles take 16 for 16.
//
// One instruction adds the products of even and of odd positions in two separate chains that start at zero. It then adds the two
// chains, and adds the result to the sums. All additions round to nearest. Subnormal operands and sums are treated as zero,
// regardless of the thread's floating-point state. vdpbf16ps (kernels_avx512_bf16.cpp) also does this. The kernels that widen bf16
// to float do not.

namespace zsl::ZSL_ISA {

// Panels of whole tiles. One step contracts 32 positions, and positions past the end are zeros. For each step, a row panel holds 16
// features × 32 positions, and a column panel holds two tiles of 16 pairs of positions × 16 features.
//
// Short examples are processed in a group whose positions fit in one chunk. Each block is multiplied and folded for all examples of
// the group before the next block. The block's sums are then read from the L2 cache once per group.
struct Bf16Tiles {
  using Elem = uint16_t;
  using Sum = float;
  static constexpr int depth = 32;
  static constexpr int together = 8;
};

template <>
struct RegisterTile<Bf16Tiles> {
  static constexpr int rows = 16;
  static constexpr int cols = 32;
  static constexpr int vecs = cols / lanes<float>;
  static constexpr int size = rows * cols;
  using Acc = Vec<float>[rows][vecs];
};

struct TileLayout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileLayout whole_tiles = {};

// Configures the unit with eight whole tiles while a worker runs. Each thread has its own configuration.
struct TileUnit {
  TileUnit() { _tile_loadconfig(&whole_tiles); }
  ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
};

// A square of 32 positions × 32 features. Position t is at `at` + t · stride. `at` points into the operand if the operand has 32
// positions and features left and the features are contiguous. Otherwise it points to a zero-padded copy.
struct Square {
  static constexpr int side = 32;
  const uint16_t* at;
  int64_t stride;
  alignas(64) uint16_t copy[side][side];

  Square(const Operand& x, const uint16_t* from, int64_t positions, int64_t features) : at(from), stride(x.st) {
    if (x.sf == 1 && positions >= side && features >= side) {
      // Prefetch the same features for the next step. Rows are about a page apart, and hardware prefetching stops at page
      // boundaries.
      for (int64_t t = side; t < 2 * side; ++t) __builtin_prefetch(from + t * stride);
      return;
    }
    std::memset(copy, 0, sizeof copy);
    positions = std::min<int64_t>(positions, side), features = std::min<int64_t>(features, side);
    for (int64_t t = 0; t < positions; ++t)
      for (int64_t f = 0; f < features; ++f) copy[t][f] = from[t * x.st + f * x.sf];
    at = copy[0], stride = side;
  }
};

typedef uint16_t Halves __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(64), aligned(4), may_alias));

// Transposes 16 rows of 16 pairs. It exchanges pairs, then pairs of pairs, then quarters of vectors.
ZSL_INLINE void transpose(Pairs (&x)[16]) {
  Pairs y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Pairs &low = y[i + j], &high = y[i + j + 2];
      x[i + 2 * j] = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      x[i + 2 * j + 1] = __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 16; j += 8) {
      y[i + j] = __builtin_shufflevector(x[i + j], x[i + j + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      y[i + j + 4] = __builtin_shufflevector(x[i + j], x[i + j + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Pairs &low = y[i + 4 * j], &high = y[i + 4 * j + 8];
      x[i + 8 * j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      x[i + 8 * j + 4] = __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
  }
}

// Packs the features of a square as rows of positions, with 16 features per tile.
ZSL_INLINE void pack_square_rows(const Square& square, uint16_t* upper, uint16_t* lower) {
  // Interleaving two positions within the quarters of a vector yields the first or the second four of every eight features.
#pragma GCC unroll 2
  for (int second = 0; second < 2; ++second) {
    Pairs x[16];
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p) {
      const Halves even = *reinterpret_cast<const Halves*>(square.at + 2 * p * square.stride);
      const Halves odd = *reinterpret_cast<const Halves*>(square.at + (2 * p + 1) * square.stride);
      x[p] = (Pairs)(second ? __builtin_shufflevector(even, odd, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20, 52,
                                                      21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63)
                            : __builtin_shufflevector(even, odd, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48,
                                                      17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59));
    }
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const int feature = i / 4 * 8 + second * 4 + i % 4;
      uint16_t* tile = feature < 16 ? upper : lower;
      if (tile) *reinterpret_cast<Pairs*>(tile + feature % 16 * 32) = x[i];
    }
  }
}

// Packs the pairs of positions of a square into one tile for the first 16 features and one tile for the other 16.
ZSL_INLINE void pack_square_columns(const Square& square, uint16_t* tiles) {
#pragma GCC unroll 4
  for (int p = 0; p < 16; ++p) {
    const Halves even = *reinterpret_cast<const Halves*>(square.at + 2 * p * square.stride);
    const Halves odd = *reinterpret_cast<const Halves*>(square.at + (2 * p + 1) * square.stride);
    *reinterpret_cast<Halves*>(tiles + p * 32) =
        __builtin_shufflevector(even, odd, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12,
                                44, 13, 45, 14, 46, 15, 47);
    *reinterpret_cast<Halves*>(tiles + 512 + p * 32) =
        __builtin_shufflevector(even, odd, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58,
                                27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
  }
}

// Calls body(square, step, feature) for the squares of positions [t0, t0+tn) and features [f0, f0+fn) of example n.
template <class Body>
ZSL_INLINE void each_square(const Operand& x, int64_t n, int64_t t0, int64_t tn, int64_t f0, int64_t fn, Body body) {
  const uint16_t* base = static_cast<const uint16_t*>(x.data) + n * x.sn + t0 * x.st + f0 * x.sf;
  for (int64_t t = 0; t < tn; t += Square::side)
    for (int64_t f = 0; f < fn; f += Square::side) body(Square(x, base + t * x.st + f * x.sf, tn - t, fn - f), t / Square::side, f);
}

template <>
inline void pack_rows<Bf16Tiles>(const Operand& x, int64_t n, int64_t t0, int64_t tn, int64_t f0, int64_t fn, uint16_t* dst) {
  const int64_t panel = steps_of<Bf16Tiles>(tn) * 512;
  each_square(x, n, t0, tn, f0, fn, [&](const Square& square, int64_t step, int64_t f) {
    uint16_t* upper = dst + f / 16 * panel + step * 512;
    pack_square_rows(square, upper, f + 16 < fn ? upper + panel : nullptr);
  });
}

template <>
inline void pack_columns<Bf16Tiles>(const Operand& x, int64_t n, int64_t t0, int64_t tn, int64_t f0, int64_t fn, uint16_t* dst) {
  const int64_t panel = steps_of<Bf16Tiles>(tn) * 1024;
  each_square(x, n, t0, tn, f0, fn, [&](const Square& square, int64_t step, int64_t f) {
    pack_square_columns(square, dst + f / 32 * panel + step * 1024);
  });
}

// Runs blocks of one or two vertically adjacent register tiles. The results reach the epilogue no later than finish().
//
// For each block, run() issues half of the block's products, folds the first register tile of the previous block, issues the other
// half of the products, and folds the second register tile. The processor executes the folds while the unit multiplies.
template <class Epilogue>
class BlockRunner<Bf16Tiles, Epilogue> {
 public:
  using R = RegisterTile<Bf16Tiles>;
  static constexpr int height = 2;

  // `count` is the number of register tiles in the block.
  void run(const Step<Bf16Tiles>* steps, int count, Epilogue& epilogue) {
    const Step<Bf16Tiles>& s = steps[0];
    const int64_t half = s.steps / 2;
    typename R::Acc* out = blocks_[1 - pending_];
    count == 2 ? start<2>(steps) : start<1>(steps);
    count == 2 ? multiply<2>(s, 0, half) : multiply<1>(s, 0, half);
    fold(0);
    count == 2 ? multiply<2>(s, half, s.steps) : multiply<1>(s, half, s.steps);
    fold(1);
    // Between chunks the tiles themselves hold the sums. An instruction adds 32 positions as one term, so a chain of additions does
    // not stop growing.
    float* to[2];
    for (int i = 0; i < count; ++i) to[i] = s.last ? reinterpret_cast<float*>(out[i]) : steps[i].carry;
    _tile_stored(0, to[0], 128);
    _tile_stored(1, to[0] + 16, 128);
    if (count == 2) {
      _tile_stored(2, to[1], 128);
      _tile_stored(3, to[1] + 16, 128);
    }
    pending_ = 1 - pending_, count_ = s.last ? count : 0, epilogue_ = &epilogue;
    for (int i = 0; i < count_; ++i) steps_[i] = steps[i];
  }

  void finish() {
    fold(0), fold(1);
    count_ = 0;
  }

 private:
  template <int Count>
  static void start(const Step<Bf16Tiles>* s) {
    // The instructions' definitions do not say that they read memory. This barrier makes the compiler finish storing the packed
    // panels.
    __asm__ volatile("" ::: "memory");
    if (s[0].first) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, s[0].carry, 128);
      _tile_loadd(1, s[0].carry + 16, 128);
    }
    if constexpr (Count == 1) return;
    if (s[Count - 1].first) {
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(2, s[Count - 1].carry, 128);
      _tile_loadd(3, s[Count - 1].carry + 16, 128);
    }
  }

  template <int Count>
  static void multiply(const Step<Bf16Tiles>& s, int64_t begin, int64_t end) {
    const uint16_t *rows = s.row_panel + begin * 512, *cols = s.col_panel + begin * 1024;
    const int64_t below = s.steps * 512;  // the row panel of the second register tile
    for (int64_t step = begin; step < end; ++step, rows += 512, cols += 1024) {
      _tile_loadd(4, rows, 64);
      _tile_loadd(6, cols, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, cols + 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (Count == 2) {
        _tile_loadd(5, rows + below, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  __attribute__((noinline)) void fold(int i) {
    if (i >= count_) return;
    const Step<Bf16Tiles> s = steps_[i];
    typename R::Acc& acc = blocks_[pending_][i];
    if (s.rows < R::rows || s.cols < R::cols) clear_padding<Bf16Tiles>(acc, s.rows, s.cols);
    // Use a local copy of the epilogue. Stores of sums cannot modify it, so the compiler need not reload its pointers after each
    // store.
    Epilogue epilogue = *epilogue_;
    epilogue(s, acc);
    *epilogue_ = epilogue;
  }

  typename R::Acc blocks_[2][2];  // one buffer for the block being multiplied, one for the block being folded
  Step<Bf16Tiles> steps_[2];
  Epilogue* epilogue_ = nullptr;
  int pending_ = 0, count_ = 0;
};

}  // namespace zsl::ZSL_ISA
