// The processor's matrix unit through torch's own brgemm, which runs on AMX where there is one and on AVX-512 BF16 elsewhere. Its
// header is internal to torch: this file is all that depends on it, and without it the library does without.
#include "matrix_unit.h"

#if defined(__x86_64__) && __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>

namespace zsl {
namespace {

void multiply(int64_t rows, int64_t cols, int64_t depth, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const uint16_t* a,
              const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(rows, cols, depth, ld_a, ld_b, ld_c, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

void release() { at::native::cpublas::brgemm_release(); }

constexpr MatrixUnit unit = {multiply, release};

}  // namespace

const MatrixUnit* find_matrix_unit() { return &unit; }

}  // namespace zsl
#else
const zsl::MatrixUnit* zsl::find_matrix_unit() { return nullptr; }
#endif
