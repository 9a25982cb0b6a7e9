// interference and gram with the direct algorithm: the tiles of examples in shared memory, their sums, scalars and inner products.
#pragma once

#include "fold.cuh"
#include "product.cuh"

namespace zsl {

// Blocks process the tiles of the weight in a fixed order. Grid: (pairs of groups of examples, blocks), because only the first
// dimension may exceed 65535.
template <class E, class Tile>
__global__ void __launch_bounds__(threads, 1) gram_kernel(const __grid_constant__ ProductArgs args) {
  const auto form = [&](const Held& held, const Place<Tile>& place, float* slots, unsigned char* stages) {
    Product<E, Tile>(args, held, place, slots, stages).run();
  };
  const int64_t N = args.sets[0].count, M = args.sizes.cross ? args.sets[1].count : N;
  fold_tiles<Tile>(args.sizes, args.results, N, M, form);
}

}  // namespace zsl
