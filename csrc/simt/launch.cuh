// Launches of the kernels on a CPU: the blocks one after another.
#pragma once

#include "device.cuh"

namespace zsl {

template <class Args>
void launch(const char*, void (*kernel)(Args), unsigned blocks, unsigned pairs, unsigned threads, size_t shared_bytes, uintptr_t,
            const Args& args) {
  for (unsigned y = 0; y < pairs; ++y)
    for (unsigned x = 0; x < blocks; ++x)
      simt::Block::of(static_cast<int>(threads)).run([&] { kernel(args); }, {x, y, 0}, {blocks, pairs, 1}, shared_bytes);
}

}  // namespace zsl
