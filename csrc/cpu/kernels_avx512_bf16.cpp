// The kernels for AVX-512 with the bf16 dot product (AVX512-BF16).
//
// The instruction set is enabled only for the region below, after the standard headers. Otherwise their inline functions could be
// compiled for an instruction set that the processor does not have.
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

#define ZSL_ISA avx512_bf16
#define ZSL_VEC_BYTES 64
#define ZSL_ROWS 12
#define ZSL_COL_VECS 2
#define ZSL_NATIVE_BF16
#include "ops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const zsl::Kernels* zsl::kernels_avx512_bf16() { return &zsl::avx512_bf16::table; }
#else
const zsl::Kernels* zsl::kernels_avx512_bf16() { return nullptr; }
#endif
