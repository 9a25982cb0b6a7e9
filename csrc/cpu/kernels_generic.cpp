// The kernels for any processor: 16-byte vectors are SSE2 on x86-64 and NEON on Arm, and the compiler splits them elsewhere.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#define ZSL_ISA generic
#define ZSL_VEC_BYTES 16
#define ZSL_ROWS 6
#define ZSL_COL_VECS 2
#include "ops.h"

const zsl::Kernels* zsl::kernels_generic() { return &zsl::generic::table; }
