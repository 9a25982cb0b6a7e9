// Launches the product and embedding CUDA kernels with the tile and element type of the arguments.
#include "cuda_kernels.h"

#include <device.cuh>
#include <algorithm>
#include <launch.cuh>
#include <stdexcept>

#include "../cuda/embedding.cuh"
#include "../cuda/gram.cuh"

namespace zsl {
namespace {

// Calls f with the type of the given tile.
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

// Returns the shared memory of one block for N examples, in bytes.
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

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

template <class E>
void launch_embedding_as(const EmbeddingArgs& args, uintptr_t stream) {
  const int64_t groups = (args.K + 32 * E::numbers - 1) / (32 * E::numbers);
  const unsigned blocks = blocks_of((args.count + args.window - 1) / args.window * groups, embedding_warps);
  launch("embedding_kernel", args.b.vectors ? embedding_kernel<E, true> : embedding_kernel<E, false>, 1, blocks, embedding_threads,
         0, stream, args);
  launch("embedding_join_kernel", embedding_join_kernel<E::numbers>, 1, blocks, embedding_threads, 0, stream, args);
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

void launch_embedding_keys(const EmbeddingOrderArgs& args, uintptr_t stream) {
  launch("embedding_keys_kernel", embedding_keys_kernel, 1, blocks_of(args.count, order_threads), order_threads, 0, stream, args);
}

void launch_embedding_places(const EmbeddingOrderArgs& args, uintptr_t stream) {
  constexpr size_t held = sizeof(int64_t) * order_threads / 32;
  const unsigned blocks = blocks_of(args.count, args.chunk);
  if (args.counts) launch("embedding_count_kernel", embedding_count_kernel, 1, blocks, order_threads, held, stream, args);
  launch("embedding_places_kernel", embedding_places_kernel, 1, blocks, order_threads, held, stream, args);
}

void launch_embedding_sums(const EmbeddingArgs& args, uintptr_t stream) {
  switch (args.element) {
    case Element::float32:
      return launch_embedding_as<PlainFloat32>(args, stream);
    case Element::bfloat16:
      return launch_embedding_as<PlainBfloat16>(args, stream);
    case Element::float16:
      return launch_embedding_as<PlainFloat16>(args, stream);
  }
}

void launch_embedding_clear(const EmbeddingClearArgs& args, uintptr_t stream) {
  const unsigned blocks = std::min(blocks_of(args.count, 4 * order_threads), 4096u);
  launch("embedding_clear_kernel", embedding_clear_kernel, 1, blocks, order_threads, 0, stream, args);
}

void launch_embedding_finish(const EmbeddingFinishArgs& args, unsigned filling, uintptr_t stream) {
  launch("embedding_finish_kernel", embedding_finish_kernel, 1, static_cast<unsigned>(args.num_examples) + filling, finish_threads,
         sizeof(double) * finish_threads / 32 * 4, stream, args);
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
