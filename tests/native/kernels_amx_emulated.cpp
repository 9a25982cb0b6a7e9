// The kernels for amx with loops for the tile instructions (amx_instructions.h) and vectors of AVX2, or of any processor: for tests
// on machines without a matrix unit. Their float kernels are those of avx2 or generic. ZSL_EMULATE_AMX is the bytes of a vector;
// with 32 and ZSL_TRAP_AMX the instructions stay, and amx_trap.cpp answers them.
#include <algorithm>
#include <cstring>

#include "../../csrc/cpu/kernels.h"

#ifdef ZSL_TRAP_AMX
#include <immintrin.h>
#endif

#if ZSL_EMULATE_AMX == 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,amx-tile,amx-bf16")
#endif
#endif

#ifndef ZSL_TRAP_AMX
#include "amx_instructions.h"
#endif

#define ZSL_ISA amx_emulated
#define ZSL_VEC_BYTES ZSL_EMULATE_AMX
#define ZSL_ROWS 6
#define ZSL_COL_VECS 2
#define ZSL_AMX
#include "../../csrc/cpu/ops.h"

#if ZSL_EMULATE_AMX == 32
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#ifdef ZSL_TRAP_AMX
void trap_amx_instructions();
#else
static void trap_amx_instructions() {}
#endif

const zsl::Kernels* zsl::kernels_amx_emulated() {
  trap_amx_instructions();
  return &zsl::amx_emulated::table;
}
