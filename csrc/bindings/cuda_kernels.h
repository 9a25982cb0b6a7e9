// The kernels' launches, by tile and element: what csrc/bindings/cuda_module.cpp calls.
#pragma once

#include "../cuda/args.h"
#include "../cuda/embedding_args.h"

namespace zsl {

constexpr int tile_count = 4;

struct Grid {
  int tile;         // 0 to 3: 8, 16, 32 or 64 examples held
  unsigned blocks;  // that share the tiles
  unsigned pairs;   // of groups of examples
  uintptr_t stream;
};

void launch_gram(const Grid& grid, Element element, const ProductArgs& args);

// Of an embedding: the keys that are to be sorted; places in that order, in two launches or, of one chunk, in one; the sums and the
// pairs' scalars, in two launches; zeros for a slab; and the examples' scalars, with `filling` blocks for rows that nobody touched.
void launch_embedding_keys(const EmbeddingOrderArgs& args, uintptr_t stream);
void launch_embedding_places(const EmbeddingOrderArgs& args, uintptr_t stream);
void launch_embedding_sums(const EmbeddingArgs& args, uintptr_t stream);
void launch_embedding_clear(const EmbeddingClearArgs& args, uintptr_t stream);
void launch_embedding_finish(const EmbeddingFinishArgs& args, unsigned filling, uintptr_t stream);

// rows, columns, examples held, examples formed at a time, stages and the Gram's shares of a tile.
struct TileNumbers {
  int rows, cols, slots, together, stages, shares;
};
TileNumbers tile_numbers(int tile);
size_t shared_bytes(int tile, int held, bool runs);

// The versions of CUDA (13.0: 13000) that the kernels were built with and that the machine's driver has; 0 if it has none.
struct Versions {
  int built, driver;
};
Versions versions();

}  // namespace zsl
