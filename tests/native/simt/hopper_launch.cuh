// The maps of tensors for threads of a CPU. What the driver would refuse is refused.
#pragma once

#include <hopper_device.cuh>

#include "launch.cuh"

namespace zsl {

inline TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3], bool) {
  TensorMap map = {static_cast<const unsigned char*>(data), {}, {}};
  bool valid = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int d = 0; d < 4; ++d) map.sizes[d] = sizes[d], valid = valid && sizes[d] > 0 && sizes[d] <= uint64_t{1} << 32;
  for (int d = 0; d < 3; ++d)
    map.strides[d] = strides[d], valid = valid && strides[d] > 0 && strides[d] % 16 == 0 && strides[d] < uint64_t{1} << 40;
  if (!valid) throw std::runtime_error("tensor_map: an address, a size or a stride is none that the driver takes");
  return map;
}

}  // namespace zsl
