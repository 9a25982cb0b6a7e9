// The kernels for NEON, which every 64-bit Arm processor has: 16-byte vectors as in the generic kernels, with fused multiply-adds,
// and a register tile for 32 registers in place of 16: 24 sums, four columns and a row's numbers.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__aarch64__)
#define ZSL_ISA neon
#define ZSL_VEC_BYTES 16
#define ZSL_ROWS 6
#define ZSL_COL_VECS 4
#include "ops.h"

const zsl::Kernels* zsl::kernels_neon() { return &zsl::neon::table; }
#else
const zsl::Kernels* zsl::kernels_neon() { return nullptr; }
#endif
