// Creates tensor maps with the driver library. tests/native/simt/hopper_launch.cuh does the same for CPU threads.
#pragma once

#include <hopper_device.cuh>
#include <launch.cuh>

namespace zsl {

// Describes a (parts, examples, positions, features) tensor of two-byte numbers. Strides are in bytes, in the order positions,
// examples, parts.
inline TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3], bool bfloat16) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                   const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status), "tensor_map");
    if (!found) throw std::runtime_error("tensor_map: the driver has no cuTensorMapEncodeTiled; expected one of CUDA 12 or newer");
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint32_t box[4] = {box_features, box_positions, 1, 1}, every[4] = {1, 1, 1, 1};
  const cuuint64_t extents[4] = {sizes[0], sizes[1], sizes[2], sizes[3]}, apart[3] = {strides[0], strides[1], strides[2]};
  CUtensorMap map;
  const CUresult result = encode(&map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                                 const_cast<void*>(data), extents, apart, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor_map: cuTensorMapEncodeTiled says " + std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace zsl
