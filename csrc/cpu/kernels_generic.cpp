// The kernels for any processor. The 16-byte vectors are SSE2 on x86-64 and NEON on Arm. On other processors the compiler splits
// them.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#define ZSL_ISA generic
#define ZSL_VEC_BYTES 16
#define ZSL_ROWS 6
#define ZSL_COL_VECS 2
#include "ops.h"

const zsl::Kernels* zsl::kernels_generic() { return &zsl::generic::table; }
