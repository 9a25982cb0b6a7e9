// The kernels as a Python module of pointers, sizes, strides and a stream: no torch, and no device before a launch.
// A pointer of 0 is one that is not there.
#include <pybind11/pybind11.h>

#include <array>
#include <utility>

#include "cuda_kernels.h"
#if ZSL_HOPPER
#include "hopper_kernels.h"
#endif

namespace py = pybind11;

namespace zsl {
namespace {

using Pointer = uintptr_t;

template <class T>
T* to(Pointer p) {
  return reinterpret_cast<T*>(p);
}

// (pointer, strides of examples, positions and features)
using Strided = std::tuple<Pointer, int64_t, int64_t, int64_t>;

// 16 bytes can be copied at a time where the features are dense and every row begins at a multiple of 16.
Operand operand(const Strided& x, Element element) {
  const auto [data, example, position, feature] = x;
  const int64_t unit = element == Element::float32 ? 4 : 8;
  const bool vectors = feature == 1 && data % 16 == 0 && example % unit == 0 && position % unit == 0;
  return {to<const void>(data), example, position, feature, vectors};
}

Examples examples(const Strided& a, const Strided& b, int64_t count, int64_t positions, Pointer begin, Element element) {
  return {operand(a, element), operand(b, element), count, positions, to<const int64_t>(begin)};
}

// grad_sum, abs_sum, sq_sum, scalars, pairs; direction and its strides
using Out = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, int64_t, int64_t>;

Results results(const Out& x) {
  const auto [grad, abs, sq, scalars, pairs, direction, row, col] = x;
  return {
      to<float>(grad), to<float>(abs), to<float>(sq), to<double>(scalars), to<double>(pairs), to<const float>(direction), row, col};
}

// tile, blocks, pairs of groups, stream
using Launch = std::tuple<int, unsigned, unsigned, Pointer>;

Grid grid(const Launch& x) {
  const auto [tile, blocks, pairs, stream] = x;
  return {tile, blocks, pairs, stream};
}

// O, K, slots, group, exact
using Shape = std::tuple<int64_t, int64_t, int, int, bool>;

Sizes sizes(const Shape& x, bool cross) {
  const auto [O, K, slots, group, exact] = x;
  return {O, K, slots, group, cross, exact};
}

void gram(const Launch& launch, int element, const Shape& shape, const Strided& a, const Strided& b, int64_t N, int64_t T,
          Pointer begin, const std::tuple<Pointer, Pointer, Pointer>& added, const Out& out) {
  const Element e{element};
  const Examples x = examples(a, b, N, T, begin, e);
  const auto [added_begin, feature, values] = added;
  const Added rows = {to<const int64_t>(added_begin), to<const int64_t>(feature), to<const float>(values)};
  launch_gram(grid(launch), e, {{x, x}, rows, sizes(shape, false), results(out)});
}

void cross_gram(const Launch& launch, int element, const Shape& shape, const Strided& a, const Strided& b, int64_t N, int64_t T,
                const Strided& a2, const Strided& b2, int64_t M, int64_t T2, Pointer pairs) {
  const Element e{element};
  const Results out = {nullptr, nullptr, nullptr, nullptr, to<double>(pairs), nullptr, 0, 0};
  launch_gram(grid(launch), e, {{examples(a, b, N, T, 0, e), examples(a2, b2, M, T2, 0, e)}, {}, sizes(shape, true), out});
}

void embedding(const Launch& launch, int element, const Shape& shape, const Strided& b, int64_t N, int64_t T, Pointer row_begin,
               Pointer pair_row, Pointer pair_example, Pointer place_begin, Pointer place, Pointer rows, const Out& out) {
  const Element e{element};
  launch_embedding(grid(launch), {operand(b, e), e, N, T, to<const int64_t>(row_begin), to<const int64_t>(pair_row),
                                  to<const int64_t>(pair_example), to<const int64_t>(place_begin), to<const int64_t>(place),
                                  to<const int64_t>(rows), sizes(shape, false), results(out)});
}

#if ZSL_HOPPER
// pointer, parts, examples, positions, features, and the strides of the first three
using Mapped = std::tuple<Pointer, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>;

MappedTensor mapped(const Mapped& x) {
  const auto [data, parts, examples, positions, features, part, example, position] = x;
  return {to<const void>(data), parts, examples, positions, features, part, example, position};
}

// examples, steps, begin, products, O, K
using Operands = std::tuple<int, int, Pointer, int, int64_t, int64_t>;
// first tile, tiles, whole, parts, group
using Schedule = std::tuple<int, int, int, int, int>;
// grad_sum, abs_sum, sq_sum; l1, sq_norm, dot, abs_dot; partial scalars, workspace, slab; direction and its strides
using HopperOut =
    std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, int64_t, int64_t>;

void hopper(int element, int slab, bool sums, const Mapped& a, const Mapped& b, const Operands& operands, const Schedule& schedule,
            const HopperOut& out, const std::tuple<Pointer, Pointer, Pointer>& added, Pointer stream) {
  const auto [examples, steps, begin, products, O, K] = operands;
  const auto [first, tiles, whole, parts, group] = schedule;
  const auto [grad, abs, sq, l1, sq_norm, dot, abs_dot, scalars, workspace, held, direction, row, col] = out;
  const auto [bound, feature, values] = added;
  launch_hopper(
      Element{element}, slab, sums, mapped(a), mapped(b), {examples, steps, to<const int>(begin), products, O, K},
      {first, tiles, whole, parts, group},
      {to<float>(grad), to<float>(abs), to<float>(sq), to<float>(l1), to<float>(sq_norm), to<float>(dot), to<float>(abs_dot),
       to<float>(scalars), to<float>(workspace), to<void>(held), to<const float>(direction), row, col},
      {to<const int64_t>(bound), to<const int64_t>(feature), to<const float>(values)}, stream);
}

void pack(const Strided& from, int element, int64_t examples, int64_t positions, Pointer begin, Pointer first_step,
          int64_t features, int64_t pitch, int64_t part, bool with_low, Pointer target, unsigned blocks, Pointer stream) {
  const Element e{element};
  launch_pack({operand(from, e), e, examples, positions, to<const int64_t>(begin), to<const int>(first_step), features, pitch, part,
               with_low, to<void>(target)},
              blocks, stream);
}

void slab_gram(Pointer x, Pointer y, bool bfloat16, int64_t x_rows, int64_t y_rows, int64_t elements, Pointer pairs,
               unsigned blocks, Pointer stream) {
  launch_slab_gram({to<const void>(x), to<const void>(y), bfloat16, x_rows, y_rows, elements, to<double>(pairs)}, blocks, stream);
}
#endif

}  // namespace
}  // namespace zsl

PYBIND11_MODULE(ZSL_MODULE, m) {
  using namespace zsl;
  m.def("gram", &gram);
  m.def("cross_gram", &cross_gram);
  m.def("embedding", &embedding);
#if ZSL_HOPPER
  m.def("hopper", &hopper);
  m.def("pack", &pack);
  m.def("slab_gram", &slab_gram);
#endif
  m.def("shared_bytes", py::overload_cast<int, int, bool>(&shared_bytes),
        "Of a block: tile, examples held, whether it adds in runs.");
  m.def(
      "versions",
      [] {
        const Versions x = versions();
        return py::make_tuple(x.built, x.driver);
      },
      "Of CUDA: built with, and the driver's.");
  m.def("tiles", [] {
    py::list all;
    for (int i = 0; i < tile_count; ++i) {
      const TileNumbers x = tile_numbers(i);
      all.append(py::make_tuple(x.rows, x.cols, x.slots, x.together, x.stages, x.shares));
    }
    return all;
  });
}
