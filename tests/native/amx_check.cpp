// Checks the loops of amx_instructions.h by the rules of the instructions, and, on a processor that has these, against them bit by
// bit.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Layout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Sums of m × n, rows of m × k pairs, columns of k pairs × n.
  Layout(int m, int k, int n) {
    rows[0] = rows[1] = static_cast<uint8_t>(m), rows[2] = static_cast<uint8_t>(k);
    row_bytes[0] = row_bytes[2] = static_cast<uint16_t>(4 * n), row_bytes[1] = static_cast<uint16_t>(4 * k);
  }
};

using Pairs = uint32_t[16][16];
using Sums = float[16][16];

// A macro, since the instructions' names mean the loops below the header that defines these.
#define MULTIPLY(layout, a, b, c) \
  _tile_loadconfig(&(layout));    \
  _tile_loadd(0, c, 64);          \
  _tile_loadd(1, a, 64);          \
  _tile_loadd(2, b, 64);          \
  _tile_dpbf16ps(0, 1, 2);        \
  _tile_stored(0, c, 64);         \
  _tile_release()

#if defined(__x86_64__)
// The processor's: the names are not replaced yet.
__attribute__((target("amx-tile,amx-bf16"))) void multiply_by_processor(const Layout& layout, const Pairs& a, const Pairs& b,
                                                                        Sums& c) {
  __asm__ volatile("" ::: "memory");  // the instructions' definitions do not say that they read memory
  MULTIPLY(layout, a, b, c);
}
#else
void multiply_by_processor(const Layout&, const Pairs&, const Pairs&, Sums&) {}
#endif

}  // namespace

#include "amx_instructions.h"

namespace {

void multiply_by_loops(const Layout& layout, const Pairs& a, const Pairs& b, Sums& c) { MULTIPLY(layout, a, b, c); }

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

uint32_t pair(float even, float odd) { return bits_of(even) >> 16 | (bits_of(odd) & 0xffff0000u); }

// One row of pairs by one column of them.
float product(const float (&even)[3], const float (&odd)[3], float sum, float factor = 1) {
  Pairs a = {}, b = {};
  Sums c = {};
  for (int k = 0; k < 3; ++k) a[0][k] = pair(even[k], odd[k]), b[k][0] = pair(factor, factor);
  c[0][0] = sum;
  multiply_by_loops(Layout(16, 16, 16), a, b, c);
  return c[0][0];
}

void expect(const char* rule, float found, float want) {
  if (bits_of(found) == bits_of(want)) return;
  std::fprintf(stderr, "MISMATCH tdpbf16ps, %s: got %a, expected %a\n", rule, static_cast<double>(found),
               static_cast<double>(want));
  std::exit(1);
}

void check_rules() {
  // 2^24 takes in no one; 2^24 - 1 does. One chain through all would be 4, two chains are 1 and what is lost.
  expect("even and odd positions are chains of their own", product({0x1p24f, 1, 1}, {-0x1p24f, 1, 1}, 0), 2);
  expect("their sum is added at once", product({1, 1, 0}, {1, 0, 0}, 0x1p24f), 0x1p24f + 4);
  expect("ties go to the even neighbour", product({1, 0, 0}, {0, 0, 0}, 0x1p24f), 0x1p24f);
  expect("a subnormal operand is zero", product({0x1p-127f, 0, 0}, {0, 0, 0}, 0, 0x1p10f), 0);
  expect("a subnormal product is zero", product({0x1p-100f, 0, 0}, {0, 0, 0}, 0, 0x1p-40f), 0);
  expect("a subnormal sum is zero", product({0x1p-126f, 0, 0}, {-0x1.8p-126f, 0, 0}, 0), 0.0f);
  expect("a subnormal number in the sums is zero", product({1, 0, 0}, {0, 0, 0}, 0x1p-127f, 0x1p-126f), 0x1p-126f);
  expect("what is tiny but normal stays", product({0x1p-126f, 0, 0}, {0, 0, 0}, 0), 0x1p-126f);
}

uint32_t draw() {
  static uint64_t state = 7;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

// Numbers about 2^center, or any bits at all.
uint32_t draw_half(int kind) {
  const uint32_t any = draw();
  if (kind == 0) return any & 0xffff;
  const uint32_t center = kind == 1 ? 127 : 64;  // products of the second kind are about the smallest normal number
  return (any & 0x807f) | (center - 4 + (any >> 16) % 8) << 7;
}

}  // namespace

// Without a processor that has the instructions only the rules. Returns how many tiles were compared.
int check_amx_instructions() {
  check_rules();
  if (!zsl::kernels_amx()) return 0;
  constexpr int sizes[][3] = {{16, 16, 16}, {16, 1, 16}, {3, 5, 7}, {1, 16, 2}, {16, 7, 1}};
  int compared = 0;
  for (int i = 0; i < 300; ++i) {
    const auto& [m, k, n] = sizes[i % 5];
    Pairs a, b;
    Sums c[2];
    for (int r = 0; r < 16; ++r)
      for (int q = 0; q < 16; ++q) {
        a[r][q] = draw_half(i % 3) | draw_half(i % 3) << 16, b[r][q] = draw_half(i % 3) | draw_half(i % 3) << 16;
        const uint32_t start = i % 2 ? draw_half(i % 3) << 16 : 0;
        std::memcpy(&c[0][r][q], &start, 4), std::memcpy(&c[1][r][q], &start, 4);
      }
    multiply_by_processor(Layout(m, k, n), a, b, c[0]);
    multiply_by_loops(Layout(m, k, n), a, b, c[1]);
    for (int r = 0; r < 16; ++r)
      for (int q = 0; q < 16; ++q)
        if (!(c[0][r][q] != c[0][r][q] && c[1][r][q] != c[1][r][q])) expect("the processor's", c[1][r][q], c[0][r][q]);
    ++compared;
  }
  return compared;
}
