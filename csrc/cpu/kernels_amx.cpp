// The kernels for amx: those of avx512 with the bf16 product on the matrix unit. The instruction set is enabled for this region
// alone, after the standard headers, so that no inline function of theirs is compiled for a processor that the program may not run
// on. fp16 is widened to float, as everywhere: the unit's fp16 product (AMX-FP16) is not known to g++ 12, and AVX512-FP16 has no
// product with float sums.
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

// Whether the processor has the unit, the system saves its registers, and this process may use it: Linux reserves the memory to
// save them in for a process that asks. It answers the same for all threads, and so does the processor.
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
