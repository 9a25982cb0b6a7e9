// The tile instructions as loops, by their definitions in Intel's manual: what the kernels of csrc/cpu/amx_tile.h use of AMX, so
// that they can be run and sanitized on a processor without it. What a processor would answer with a fault ends the program.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace zsl::amx_instructions {

struct Tile {
  uint8_t bytes[16][64];
  int rows, row_bytes;
};

struct Unit {
  bool configured = false;
  Tile tiles[8];
};

// Each thread has its own.
inline thread_local Unit unit;

inline void fault_if(bool wrong, const char* what) {
  if (!wrong) return;
  std::fprintf(stderr, "AMX fault: %s\n", what);
  std::abort();
}

inline Tile& tile(int number) {
  fault_if(!unit.configured, "a tile is used without a configuration");
  Tile& found = unit.tiles[number];
  fault_if(found.rows == 0 || found.row_bytes == 0, "a tile is used that is not configured");
  return found;
}

// Palette 1: byte 0 is the palette, byte 1 the row to start with, from byte 16 the bytes of a row of each tile, from byte 48 its
// rows.
inline void load_config(const void* from) {
  uint8_t bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  fault_if(bytes[0] != 1, "a palette that is not 1");
  for (int i = 2; i < 64; ++i)
    fault_if(bytes[i] != 0 && !(i >= 16 && i < 32) && !(i >= 48 && i < 56), "a reserved byte of the configuration is not zero");
  for (int i = 0; i < 8; ++i) {
    Tile& t = unit.tiles[i];
    t.row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, t.rows = bytes[48 + i];
    fault_if(t.row_bytes > 64 || t.rows > 16 || (t.row_bytes == 0) != (t.rows == 0), "a tile of more than 16 rows of 64 bytes");
    std::memset(t.bytes, 0, sizeof t.bytes);
  }
  unit.configured = true;
}

inline void release() { unit.configured = false; }

inline void zero(int number) { std::memset(tile(number).bytes, 0, sizeof(Tile::bytes)); }

inline void load(int number, const void* from, int64_t stride) {
  Tile& t = tile(number);
  std::memset(t.bytes, 0, sizeof t.bytes);
  for (int r = 0; r < t.rows; ++r) std::memcpy(t.bytes[r], static_cast<const char*>(from) + r * stride, t.row_bytes);
}

inline void store(int number, void* to, int64_t stride) {
  const Tile& t = tile(number);
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, t.bytes[r], t.row_bytes);
}

// Subnormal numbers are zeros of their sign, on the way in and out.
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The bfloat16 in the lower or the upper half of a pair.
inline float number_in(uint32_t pair, bool upper) {
  const uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}

// sums += rows · columns. The products of each half of the pairs are a chain of fused multiply-adds of their own, from zero; then
// the two are added, and that to the sum. Rounding is to nearest even, the program's own.
inline void multiply(int sums, int rows, int columns) {
  Tile &c = tile(sums), &a = tile(rows), &b = tile(columns);
  fault_if(sums == rows || sums == columns || rows == columns, "one tile in two places");
  fault_if(a.rows != c.rows || b.row_bytes != c.row_bytes || b.rows != a.row_bytes / 4, "tiles whose sizes do not fit");
  fault_if(a.row_bytes % 4 != 0 || b.row_bytes % 4 != 0, "a tile whose rows are not whole pairs");
  const int depth = a.row_bytes / 4, width = c.row_bytes / 4;
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {}, total[16];
    uint32_t left[16], right[16];
    std::memcpy(left, a.bytes[m], sizeof left);
    for (int k = 0; k < depth; ++k) {
      std::memcpy(right, b.bytes[k], sizeof right);
      const float first = number_in(left[k], false), second = number_in(left[k], true);
      for (int n = 0; n < 16; ++n) {
        even[n] = flush(std::fma(first, number_in(right[n], false), even[n]));
        odd[n] = flush(std::fma(second, number_in(right[n], true), odd[n]));
      }
    }
    std::memcpy(total, c.bytes[m], sizeof total);
    for (int n = 0; n < width; ++n) total[n] = flush(flush(total[n]) + flush(even[n] + odd[n]));
    std::memcpy(c.bytes[m], total, 4 * static_cast<size_t>(width));
  }
}

}  // namespace zsl::amx_instructions

// The names of <immintrin.h>, which may have defined them.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) zsl::amx_instructions::load_config(from)
#define _tile_release() zsl::amx_instructions::release()
#define _tile_zero(number) zsl::amx_instructions::zero(number)
#define _tile_loadd(number, from, stride) zsl::amx_instructions::load(number, from, stride)
#define _tile_stored(number, to, stride) zsl::amx_instructions::store(number, to, stride)
#define _tile_dpbf16ps(sums, rows, columns) zsl::amx_instructions::multiply(sums, rows, columns)
