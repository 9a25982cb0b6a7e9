// The kernels for AVX-512.
//
// The instruction set is enabled only for the region below, after the standard headers. Otherwise their inline functions could be
// compiled for an instruction set that the processor does not have.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define ZSL_ISA avx512
#define ZSL_VEC_BYTES 64
#define ZSL_ROWS 12
#define ZSL_COL_VECS 2
#include "ops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const zsl::Kernels* zsl::kernels_avx512() { return &zsl::avx512::table; }
#else
const zsl::Kernels* zsl::kernels_avx512() { return nullptr; }
#endif
