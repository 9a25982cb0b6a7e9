// Launches of the kernels on a CPU: the blocks one after another. What no device would take is refused.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

namespace zsl {

inline int built_version() { return 0; }
inline int driver_version() { return 0; }

template <class Args>
void launch(const char* name, void (*kernel)(Args), unsigned blocks, unsigned pairs, unsigned threads, size_t shared_bytes,
            uintptr_t, const Args& args) {
  constexpr size_t most_shared = 232448;
  if (!pairs || pairs > 0x7fffffffu || !blocks || blocks > 65535 || shared_bytes > most_shared)
    throw std::runtime_error(std::string(name) + ": the grid or the shared memory is none that a device has");
  for (unsigned y = 0; y < blocks; ++y)
    for (unsigned x = 0; x < pairs; ++x)
      simt::Block::of(static_cast<int>(threads)).run([&] { kernel(args); }, {x, y, 0}, {pairs, blocks, 1}, shared_bytes);
}

}  // namespace zsl
