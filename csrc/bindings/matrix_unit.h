#pragma once

#include "../cpu/kernels.h"

namespace zsl {

// What kernels_amx multiplies with, or null where this build has none.
const MatrixUnit* find_matrix_unit();

}  // namespace zsl
