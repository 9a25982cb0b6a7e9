// The kernels for amx: those of avx512_bf16 with the bf16 product on the matrix unit. The instruction set is enabled for this
// region alone, after the standard headers, so that no inline function of theirs is compiled for a processor that the program may
// not run on.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#define ZSL_ISA amx
#define ZSL_VEC_BYTES 64
#define ZSL_ROWS 12
#define ZSL_COL_VECS 2
#define ZSL_NATIVE_BF16
#define ZSL_MATRIX_UNIT
#include "ops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const zsl::Kernels* zsl::kernels_amx() { return &zsl::amx::table; }
#else
const zsl::Kernels* zsl::kernels_amx() { return nullptr; }
#endif
