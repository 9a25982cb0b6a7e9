// Declares the launch functions of the product and embedding CUDA kernels, which csrc/bindings/cuda_module.cpp calls.
#pragma once

#include "../cuda/args.h"
#include "../cuda/embedding_args.h"

namespace zsl {

constexpr int tile_count = 4;

struct Grid {
  int tile;         // 0 to 3 for tiles that hold 8, 16, 32 or 64 examples
  unsigned blocks;  // blocks that share the tiles
  unsigned pairs;   // number of pairs of example groups
  uintptr_t stream;
};

void launch_gram(const Grid& grid, Element element, const ProductArgs& args);

// The launches of an embedding's kernels, in order:
//
// - keys: writes the keys to be sorted.
// - places: writes the places in sorted order, in two launches, or in one if there is only one chunk.
// - sums: computes the sums and the scalars of each pair, in two launches.
// - clear: zeroes a slab.
// - finish: computes the examples' scalars. `filling` blocks fill the rows that no example touches.
void launch_embedding_keys(const EmbeddingOrderArgs& args, uintptr_t stream);
void launch_embedding_places(const EmbeddingOrderArgs& args, uintptr_t stream);
void launch_embedding_sums(const EmbeddingArgs& args, uintptr_t stream);
void launch_embedding_clear(const EmbeddingClearArgs& args, uintptr_t stream);
void launch_embedding_finish(const EmbeddingFinishArgs& args, unsigned filling, uintptr_t stream);

// Properties of a tile: rows, columns, examples held in memory, examples computed at a time, pipeline stages, and the number of
// shares of its Gram matrix.
struct TileNumbers {
  int rows, cols, slots, together, stages, shares;
};
TileNumbers tile_numbers(int tile);
size_t shared_bytes(int tile, int held, bool runs);

// The CUDA versions (13000 means 13.0) with which the kernels were built and which the installed driver supports. The latter is 0
// if there is no driver.
struct Versions {
  int built, driver;
};
Versions versions();

}  // namespace zsl
