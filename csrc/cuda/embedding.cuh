// interference of an embedding: a tile is some of the touched rows by columns, formed by adding up the positions of each.
#pragma once

#include "fold.cuh"

namespace zsl {

__device__ __forceinline__ float widened(const void* data, Element element, int64_t at) {
  if (element == Element::float32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return element == Element::bfloat16 ? float_of(static_cast<uint32_t>(bits) << 16) : widen_float16(bits);
}

// Every held example's rows of the tile: zeros, and then a warp for each pair of a row and an example.
template <class Tile>
__device__ void form_rows(const EmbeddingArgs& args, const Held& held, const Place<Tile>& place, float* slots) {
  __syncthreads();  // the tiles before have been folded
  for (int at = threadIdx.x; at < held.total() * Tile::slot_floats; at += threads) slots[at] = 0;
  __syncthreads();
  const int64_t end = args.row_begin[least(place.O - place.row, Tile::rows) + place.row];
  for (int64_t q = args.row_begin[place.row] + threadIdx.x / warp_size; q < end; q += warps) {
    const int64_t example = args.pair_example[q];
    const int64_t from = example - held.first, from_second = example - held.second_first;
    const bool is_first = from >= 0 && from < held.count;
    if (!is_first && !(from_second >= 0 && from_second < held.second_count)) continue;
    const int64_t slot = is_first ? from : held.count + from_second;
    float* to = slots + slot * Tile::slot_floats + (args.pair_row[q] - place.row) * Tile::cols;
    for (int col = threadIdx.x % warp_size; col < Tile::cols && place.col + col < place.K; col += warp_size) {
      float total = 0, run = 0;
      for (int64_t p = args.place_begin[q]; p < args.place_begin[q + 1]; ++p) {
        const int64_t at = args.place[p];
        const int64_t row = at / args.positions * args.b.example + at % args.positions * args.b.position;
        run += widened(args.b.data, args.element, row + (place.col + col) * args.b.feature);
        if ((p - args.place_begin[q]) % sum_run == sum_run - 1) total += run, run = 0;
      }
      to[col] = total + run;
    }
  }
  __syncthreads();
}

template <class Tile>
__global__ void __launch_bounds__(threads, 1) embedding_kernel(const __grid_constant__ EmbeddingArgs args) {
  const auto form = [&](const Held& held, const Place<Tile>& place, float* slots, unsigned char*) {
    form_rows<Tile>(args, held, place, slots);
  };
  fold_tiles<Tile>(args.sizes, args.results, args.count, args.count, form, [&](int64_t row) { return args.rows[row]; });
}

}  // namespace zsl
