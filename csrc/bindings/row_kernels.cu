// Launches the row kernels and the Gram matrix of slabs with the element types of the arguments.
#include "row_kernels.h"

#include <device.cuh>
#include <launch.cuh>
#include <stdexcept>

#include "../cuda/add_partials.cuh"
#include "../cuda/dense.cuh"
#include "../cuda/scale_bias.cuh"
#include "../cuda/slab_gram.cuh"

namespace zsl {
namespace {

// Calls f with the number type of an element type.
template <class F>
void with_numbers(Element element, F f) {
  switch (element) {
    case Element::float32:
      return f(Float32Numbers());
    case Element::bfloat16:
      return f(Bfloat16Numbers());
    case Element::float16:
      return f(Float16Numbers());
  }
  throw std::invalid_argument("element: expected 0 to 2, got " + std::to_string(static_cast<int>(element)));
}

template <class E, bool along>
void launch_dense_as(const DenseArgs& args, unsigned blocks, unsigned parts, uintptr_t stream) {
  launch("dense_kernel", dense_kernel<E, along>, parts, blocks, row_threads, dense_shared_bytes<E, along>(args.held, args.lanes),
         stream, args);
}

template <class X, class B, bool scaled>
void launch_scale_bias_as(const ScaleBiasArgs& args, unsigned parts, uintptr_t stream) {
  const int64_t piece = int64_t{args.lanes} * scale_columns<X, B>;
  const int64_t blocks = args.count * ((args.features + piece - 1) / piece);
  launch("scale_bias_kernel", scale_bias_kernel<X, B, scaled>, parts, static_cast<unsigned>(blocks), row_threads,
         scale_shared_bytes<X, B, scaled>, stream, args);
}

template <class E, int octets, bool two>
void launch_octets(const SlabGramArgs& args, unsigned blocks, uintptr_t stream) {
  constexpr int64_t side = 8 * octets;
  const int64_t down = (args.x_rows + side - 1) / side, across = (args.y_rows + side - 1) / side;
  const int64_t pairs = args.upper ? across * (across + 1) / 2 : down * across;
  launch("slab_gram_kernel", slab_gram_kernel<E, octets, two>, blocks, static_cast<unsigned>(pairs), slab_threads,
         sizeof(float) * slab_warps * side * side, stream, args);
}

template <class E>
void launch_slab_gram_as(SlabGramArgs args, unsigned blocks, uintptr_t stream) {
  if (args.upper && args.x_rows <= 8) return launch_octets<E, 1, false>(args, blocks, stream);
  if (args.upper && args.x_rows <= 16) return launch_octets<E, 2, false>(args, blocks, stream);
  if (args.upper && args.x_rows <= slab_group) return launch_octets<E, 4, false>(args, blocks, stream);
  if (args.upper) args.y = args.x;
  launch_octets<E, E::octets_of_two, true>(args, blocks, stream);
}

}  // namespace

void launch_dense(Element element, const DenseArgs& args, unsigned blocks, unsigned parts, uintptr_t stream) {
  with_numbers(element, [&](auto e) {
    using E = decltype(e);
    if (args.direction)
      launch_dense_as<E, true>(args, blocks, parts, stream);
    else
      launch_dense_as<E, false>(args, blocks, parts, stream);
  });
}

void launch_scale_bias(Element x_element, Element b_element, const ScaleBiasArgs& args, unsigned parts, uintptr_t stream) {
  with_numbers(b_element, [&](auto b) {
    using B = decltype(b);
    if (!args.x.data) return launch_scale_bias_as<B, B, false>(args, parts, stream);
    with_numbers(x_element, [&](auto x) { launch_scale_bias_as<decltype(x), B, true>(args, parts, stream); });
  });
}

void launch_add_partials(AddPartialsArgs args, uintptr_t stream) {
  int64_t blocks = 0;
  for (Partials& x : args.of) blocks += x.blocks = (x.width + 31) / 32;
  launch("add_partials_kernel", add_partials_kernel, 1, static_cast<unsigned>(blocks), row_threads, sizeof(double) * row_threads,
         stream, args);
}

void launch_slab_gram(const SlabGram& x, unsigned blocks, uintptr_t stream) {
  const SlabGramArgs args = {x.x, x.y, x.x_rows, x.y_rows, x.elements, x.pairs, x.y == nullptr, x.add};
  if (x.bfloat16)
    launch_slab_gram_as<SlabBfloat16>(args, blocks, stream);
  else
    launch_slab_gram_as<SlabFloat32>(args, blocks, stream);
}

}  // namespace zsl
