// gram with the direct algorithm: for each tile of the output it forms every g_i and g2_m, multiplies them pairwise and discards
// them.
//
// The second set of examples may be the first set itself.

namespace zsl::ZSL_ISA {

template <class P>
size_t gram_as(const GramArgs& args, int64_t begin, int64_t end, void* workspace, double* gram) {
  const Shape& shape = args.shape;
  Arena arena(workspace);
  GradientTile<P> tile(shape, arena);
  TileGram<P> tile_gram(shape.N, args.M, arena);
  StoredTiles<P> stored(shape, shape.N, arena), stored2(shape, args.self ? 0 : args.M, arena);
  if (!workspace) return arena.used();

  StoreEpilogue<P> epilogue = {&stored, 0}, epilogue2 = {&stored2, 0};
  for (int64_t index = begin; index < end; ++index) {
    const Rect rect = tile_rect(shape, index);
    for (int64_t n = 0; n < shape.N; ++n) epilogue.example = n, tile.run(args.a, args.b, n, n == 0, rect, epilogue);
    for (int64_t m = 0; !args.self && m < args.M; ++m)
      epilogue2.example = m, tile.run(args.a2, args.b2, m, m == 0, rect, epilogue2);
    tile_gram.run(stored.data(), args.self ? stored.data() : stored2.data(), GradientTile<P>::count(rect), args.self, gram);
  }
  return arena.used();
}

}  // namespace zsl::ZSL_ISA
