// Launches kernels on a device. tests/native/simt/launch.cuh does the same for CPU threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace zsl {

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

inline int built_version() { return CUDART_VERSION; }

// Queries the driver library, if there is one, and does not touch a device.
inline int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// The caller must make the stream's device current.
template <class Args>
void launch(const char* name, void (*kernel)(Args), unsigned blocks, unsigned pairs, unsigned threads, size_t shared_bytes,
            uintptr_t stream, const Args& args) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
  kernel<<<dim3(pairs, blocks), threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError(), name);
}

}  // namespace zsl
