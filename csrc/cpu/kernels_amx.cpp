// The kernels for AMX: the AVX-512 kernels, with the bf16 product on the matrix unit.
//
// The instruction set is enabled only for the region below, after the standard headers. Otherwise their inline functions could be
// compiled for an instruction set that the processor does not have. fp16 is widened to float, as in the other kernels: g++ 12 does
// not support the unit's fp16 product (AMX-FP16), and AVX512-FP16 has no product with float sums.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")
#endif

#define ZSL_ISA amx
#define ZSL_VEC_BYTES 64
#define ZSL_ROWS 12
#define ZSL_COL_VECS 2
#define ZSL_AMX
#include "ops.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {

// Checks that the processor has AMX, that the system saves the AMX registers, and that this process may use them. Linux reserves
// the memory for saving them only after a process requests it. The result is the same for all threads.
bool may_use_tiles() {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tiles = 1u << 17 | 1u << 18;  // XTILECFG, XTILEDATA
  if ((low & tiles) != tiles) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if ((d & amx) != amx) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace

const zsl::Kernels* zsl::kernels_amx() {
  static const bool may = may_use_tiles();
  return may ? &zsl::amx::table : nullptr;
}
#else
const zsl::Kernels* zsl::kernels_amx() { return nullptr; }
#endif
