#include "cuda_kernels.h"

#include <device.cuh>
#include <launch.cuh>
#include <stdexcept>

#include "../cuda/embedding.cuh"
#include "../cuda/gram.cuh"

namespace zsl {
namespace {

// Calls f with the type of a tile.
template <class F>
auto with_tile(int tile, F f) {
  switch (tile) {
    case 0:
      return f(Tile8());
    case 1:
      return f(Tile16());
    case 2:
      return f(Tile32());
    case 3:
      return f(Tile64());
  }
  throw std::invalid_argument("tile: expected 0 to 3, got " + std::to_string(tile));
}

// Of a block, for N examples.
template <class Tile>
size_t needed_bytes(const Sizes& sizes, const Results& out, int64_t N) {
  return Tile::shared_bytes(sizes.slots, out.grad_sum && N > sizes.slots);
}

template <class E>
void launch_gram_as(const Grid& grid, const ProductArgs& args) {
  with_tile(grid.tile, [&](auto tile) {
    using Tile = decltype(tile);
    launch("gram_kernel", gram_kernel<E, Tile>, grid.blocks, grid.pairs, threads,
           needed_bytes<Tile>(args.sizes, args.results, args.sets[0].count), grid.stream, args);
  });
}

}  // namespace

void launch_gram(const Grid& grid, Element element, const ProductArgs& args) {
  switch (element) {
    case Element::float32:
      return launch_gram_as<Float32>(grid, args);
    case Element::bfloat16:
      return launch_gram_as<Bfloat16>(grid, args);
    case Element::float16:
      return launch_gram_as<Float16>(grid, args);
  }
}

void launch_embedding(const Grid& grid, const EmbeddingArgs& args) {
  with_tile(grid.tile, [&](auto tile) {
    using Tile = decltype(tile);
    launch("embedding_kernel", embedding_kernel<Tile>, grid.blocks, grid.pairs, threads,
           needed_bytes<Tile>(args.sizes, args.results, args.count), grid.stream, args);
  });
}

TileNumbers tile_numbers(int tile) {
  return with_tile(tile, [](auto x) {
    using T = decltype(x);
    return TileNumbers{T::rows, T::cols, T::slots, T::together, T::stages, T::shares};
  });
}

size_t shared_bytes(int tile, int held, bool runs) {
  return with_tile(tile, [&](auto x) { return decltype(x)::shared_bytes(held, runs); });
}

Versions versions() { return {built_version(), driver_version()}; }

}  // namespace zsl
