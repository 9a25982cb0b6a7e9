// The kernels for NEON, which every 64-bit Arm processor has.
//
// The vectors have 16 bytes, as in the generic kernels, but NEON adds fused multiply-adds and 32 registers in place of 16. The
// register tile uses them for 24 sums, four vectors of columns and one row's values.
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
