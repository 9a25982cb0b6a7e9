// Binds the CUDA kernels as a Python module that takes pointers, sizes, strides and a stream.
//
// The module does not depend on torch and does not touch a device before a launch. A pointer of 0 means that the tensor is absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_kernels.h"
#include "row_kernels.h"
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

// 16 bytes can be copied at a time if the features are contiguous and the address of every row is a multiple of 16.
Operand operand(const Strided& x, Element element) {
  const auto [data, example, position, feature] = x;
  const int64_t unit = element == Element::float32 ? 4 : 8;
  const bool vectors = feature == 1 && data % 16 == 0 && example % unit == 0 && position % unit == 0;
  return {to<const void>(data), example, position, feature, vectors};
}

Examples examples(const Strided& a, const Strided& b, int64_t count, int64_t positions, Pointer begin, Element element) {
  return {operand(a, element), operand(b, element), count, positions, to<const int64_t>(begin)};
}

// (grad_sum, abs_sum, sq_sum, scalars, pairs; direction and its strides)
using Out = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, int64_t, int64_t>;

Results results(const Out& x) {
  const auto [grad, abs, sq, scalars, pairs, direction, row, col] = x;
  return {
      to<float>(grad), to<float>(abs), to<float>(sq), to<double>(scalars), to<double>(pairs), to<const float>(direction), row, col};
}

// (tile, blocks, pairs of groups, stream)
using Launch = std::tuple<int, unsigned, unsigned, Pointer>;

Grid grid(const Launch& x) {
  const auto [tile, blocks, pairs, stream] = x;
  return {tile, blocks, pairs, stream};
}

// (O, K, slots, group, exact)
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

// (ids, example ids; P, T, N, V; the row to skip)
using Positions = std::tuple<Pointer, Pointer, int64_t, int64_t, int64_t, int64_t, int64_t>;

EmbeddingOrderArgs order_args(const Positions& x) {
  const auto [ids, examples, count, positions, num_examples, num_rows, padding] = x;
  EmbeddingOrderArgs args = {};
  args.ids = to<const int64_t>(ids), args.examples = to<const int64_t>(examples);
  args.count = count, args.positions = positions, args.num_examples = num_examples, args.num_rows = num_rows;
  args.padding = padding;
  return args;
}

void embedding_keys(const Positions& positions, Pointer keys, Pointer stream) {
  EmbeddingOrderArgs args = order_args(positions);
  args.keys = to<int64_t>(keys);
  launch_embedding_keys(args, stream);
}

void embedding_places(const Positions& positions, const Strided& b, int64_t chunk, Pointer sorted, Pointer order, Pointer counts,
                      Pointer places, Pointer rows, Pointer touched, Pointer stream) {
  EmbeddingOrderArgs args = order_args(positions);
  args.example = std::get<1>(b), args.position = std::get<2>(b), args.chunk = chunk;
  args.sorted = to<const int64_t>(sorted), args.order = to<const int64_t>(order), args.counts = to<int64_t>(counts);
  args.places = to<EmbeddingPlace>(places), args.rows = to<int64_t>(rows), args.touched = to<int64_t>(touched);
  launch_embedding_places(args, stream);
}

// (places, touched rows, pieces, open pairs, scalars; grad_sum, abs_sum, sq_sum)
using Sums = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer>;
// (pointer, element type or 3 for float64, strides)
using Direction = std::tuple<Pointer, int, int64_t, int64_t>;
// (pointer, first row, number of rows)
using Slab = std::tuple<Pointer, int64_t, int64_t>;

void embedding(const Positions& positions, int element, const Strided& b, int64_t K, int64_t window, const Sums& sums,
               const Direction& direction, const Slab& slab, Pointer stream) {
  const Element e{element};
  const EmbeddingOrderArgs of = order_args(positions);
  const auto [places, rows, pieces, open, scalars, grad, abs, sq] = sums;
  const auto [u, type, u_row, u_col] = direction;
  const auto [held, first, count] = slab;
  launch_embedding_sums({operand(b, e),
                         e,
                         to<const EmbeddingPlace>(places),
                         of.count,
                         K,
                         window,
                         to<const int64_t>(rows),
                         to<const void>(u),
                         type,
                         u_row,
                         u_col,
                         type == 0 && u_col == 1 && u_row % 4 == 0 && u % 16 == 0,
                         to<float>(grad),
                         to<float>(abs),
                         to<float>(sq),
                         to<float>(scalars),
                         to<float>(pieces),
                         to<int32_t>(open),
                         to<float>(held),
                         of.examples,
                         of.positions,
                         first,
                         count},
                        stream);
}

void embedding_clear(const Slab& slab, int64_t count, Pointer touched, Pointer stream) {
  const auto [held, first, rows] = slab;
  launch_embedding_clear({to<float>(held), count, first, rows, to<const int64_t>(touched)}, stream);
}

// (scalars, groups of columns, fields; begin, members; l1, sq_norm, dot, abs_dot)
using Scalars = std::tuple<Pointer, int, int, Pointer, Pointer, std::tuple<Pointer, Pointer, Pointer, Pointer>>;
// (touched rows, grad_sum, abs_sum, sq_sum; their number of rows, K, blocks that fill them)
using Filled = std::tuple<Pointer, Pointer, Pointer, Pointer, int64_t, int64_t, unsigned>;

void embedding_finish(const Positions& positions, const Scalars& scalars, const Filled& filled, Pointer touched, Pointer stream) {
  const EmbeddingOrderArgs of = order_args(positions);
  const auto [partial, groups, fields, begin, member, results] = scalars;
  const auto [rows, grad, abs, sq, most, K, blocks] = filled;
  const auto [l1, sq_norm, dot, abs_dot] = results;
  const EmbeddingFinishArgs args = {to<const float>(partial),
                                    of.count,
                                    groups,
                                    fields,
                                    of.num_examples,
                                    of.positions,
                                    to<const int64_t>(begin),
                                    to<const int64_t>(member),
                                    {to<float>(l1), to<float>(sq_norm), to<float>(dot), to<float>(abs_dot)},
                                    to<int64_t>(rows),
                                    to<float>(grad),
                                    to<float>(abs),
                                    to<float>(sq),
                                    most,
                                    K,
                                    to<const int64_t>(touched)};
  launch_embedding_finish(args, blocks, stream);
}

void slab_gram(Pointer x, Pointer y, bool bfloat16, int64_t x_rows, int64_t y_rows, int64_t elements, Pointer pairs, bool add,
               unsigned blocks, Pointer stream) {
  launch_slab_gram({to<const void>(x), to<const void>(y), bfloat16, x_rows, y_rows, elements, to<double>(pairs), add}, blocks,
                   stream);
}

bool aligned(std::initializer_list<Pointer> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](Pointer p) { return p % 16 == 0; });
}

// (pointer, stride) of a direction
using Along = std::tuple<Pointer, int64_t>;
// (grad_sum, abs_sum, sq_sum; l1, sq_norm, dot, abs_dot)
using DenseOut = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer>;
// (blocks of coordinates, parts of the examples, examples of a part, warps that share coordinates; padded coordinates)
using DenseLaunch = std::tuple<unsigned, unsigned, int64_t, int, int64_t>;

// (partial sums, partial scalars; slab)
using DenseWork = std::tuple<Pointer, Pointer, Pointer>;

void dense(const DenseLaunch& shape, int element, const Strided& g, int64_t N, int64_t P, const Along& direction,
           const DenseOut& out, const DenseWork& work, Pointer stream) {
  const Element e{element};
  const auto [blocks, parts, part, lanes, padded] = shape;
  const auto [u, u_stride] = direction;
  const auto [grad, abs, sq, l1, sq_norm, dot, abs_dot] = out;
  const auto [sums, scalars, slab] = work;
  const bool vectors = parts > 1 ? sums % 16 == 0 && P % 4 == 0 : aligned({grad, abs, sq});
  launch_dense(e,
               {operand(g, e),
                N,
                P,
                padded,
                part,
                lanes,
                static_cast<int>((part + lanes - 1) / lanes),
                to<float>(sums),
                to<double>(scalars),
                to<float>(grad),
                to<float>(abs),
                to<float>(sq),
                to<float>(l1),
                to<float>(sq_norm),
                to<float>(dot),
                to<float>(abs_dot),
                to<const float>(u),
                u_stride,
                u_stride == 1 && u % 16 == 0,
                vectors,
                to<void>(slab)},
               blocks, parts, stream);
}

// (pointer, strides of examples and positions)
using Statistic = std::tuple<Pointer, int64_t, int64_t>;

void scale_bias(unsigned parts, int lanes, int x_element, int b_element, const Strided& x, const Strided& b, const Statistic& mean,
                const Statistic& rstd, int64_t N, int64_t T, int64_t K, Pointer begin, Pointer order, Pointer scale, Pointer bias,
                int64_t next_part, Pointer stream) {
  const Element of_x{x_element}, of_b{b_element};
  const auto [means, mean_example, mean_position] = mean;
  const auto [rstds, rstd_example, rstd_position] = rstd;
  launch_scale_bias(of_x, of_b,
                    {operand(x, of_x), operand(b, of_b), to<const float>(means), to<const float>(rstds), mean_example,
                     mean_position, rstd_example, rstd_position, to<const int64_t>(begin), to<const int64_t>(order), N, T, K, lanes,
                     to<float>(scale), to<float>(bias), next_part},
                    parts, stream);
}

// (numbers to add, whether they are float64, rows, numbers per row, numbers per result, results, side of a symmetric matrix)
using Adding = std::tuple<Pointer, bool, int64_t, int64_t, int64_t, std::vector<Pointer>, int64_t>;

void add_partials(const std::vector<Adding>& all, Pointer stream) {
  AddPartialsArgs args = {};
  if (all.size() > partials_at_once)
    throw std::invalid_argument("add_partials: expected at most " + std::to_string(partials_at_once) + " sets, got " +
                                std::to_string(all.size()));
  for (size_t i = 0; i < all.size(); ++i) {
    const auto& [from, wide, rows, width, each, results, side] = all[i];
    Partials& x = args.of[i];
    if (results.size() > std::size(x.to) || each * static_cast<int64_t>(results.size()) < width)
      throw std::invalid_argument("add_partials: expected results for all numbers of a row, got too few or too many results");
    x.from = to<const void>(from), x.wide = wide, x.rows = rows, x.width = width, x.each = each, x.side = side;
    std::transform(results.begin(), results.end(), x.to, to<float>);
  }
  launch_add_partials(args, stream);
}

#if ZSL_HOPPER
// (pointer, parts, examples, positions, features, strides of the first three)
using Mapped = std::tuple<Pointer, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>;

MappedTensor mapped(const Mapped& x) {
  const auto [data, parts, examples, positions, features, part, example, position] = x;
  return {to<const void>(data), parts, examples, positions, features, part, example, position};
}

// (examples, steps, begin, products, O, K)
using Operands = std::tuple<int, int, Pointer, int, int64_t, int64_t>;
// (first tile, tiles, whole, parts, group)
using Schedule = std::tuple<int, int, int, int, int>;
// (grad_sum, abs_sum, sq_sum; l1, sq_norm, dot, abs_dot; partial scalars, workspace, slab; direction and its strides; weights,
// weights of magnitudes)
using HopperOut = std::tuple<Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer, Pointer,
                             int64_t, int64_t, Pointer, Pointer>;

void hopper(int element, int slab, int fold, const Mapped& a, const Mapped& b, const Operands& operands, const Schedule& schedule,
            const HopperOut& out, const std::tuple<Pointer, Pointer, Pointer>& added, Pointer stream) {
  const auto [examples, steps, begin, products, O, K] = operands;
  const auto [first, tiles, whole, parts, group] = schedule;
  const auto [grad, abs, sq, l1, sq_norm, dot, abs_dot, scalars, workspace, held, direction, row, col, weights, abs_weights] = out;
  const auto [bound, feature, values] = added;
  launch_hopper(Element{element}, slab, Fold{fold}, mapped(a), mapped(b), {examples, steps, to<const int>(begin), products, O, K},
                {first, tiles, whole, parts, group},
                {to<float>(grad), to<float>(abs), to<float>(sq), to<float>(l1), to<float>(sq_norm), to<float>(dot),
                 to<float>(abs_dot), to<float>(scalars), to<float>(workspace), to<void>(held), to<const float>(direction), row, col,
                 to<const float>(weights), to<const float>(abs_weights)},
                {to<const int64_t>(bound), to<const int64_t>(feature), to<const float>(values)}, stream);
}

void pack(const Strided& from, int element, int64_t examples, int64_t positions, Pointer begin, Pointer first_step,
          int64_t features, int64_t pitch, int64_t part, bool with_low, Pointer target, unsigned blocks, Pointer stream) {
  const Element e{element};
  launch_pack({operand(from, e), e, examples, positions, to<const int64_t>(begin), to<const int>(first_step), features, pitch, part,
               with_low, to<void>(target)},
              blocks, stream);
}
#endif

// Reads the arguments of a launch from flat numbers. The elements of nested tuples follow one another, and the length of a list
// precedes its elements. This allows recorded.cpp to repeat a recorded call without Python.
template <class T>
struct Taken {
  static T from(const int64_t*& x) { return static_cast<T>(*x++); }
};
template <class... Ts>
struct Taken<std::tuple<Ts...>> {
  static std::tuple<Ts...> from(const int64_t*& x) { return std::tuple<Ts...>{Taken<Ts>::from(x)...}; }  // braces: in order
};
template <class T>
struct Taken<std::vector<T>> {
  static std::vector<T> from(const int64_t*& x) {
    std::vector<T> all(static_cast<size_t>(*x++));
    for (T& one : all) one = Taken<T>::from(x);
    return all;
  }
};

template <auto function>
struct Flat;
template <class... Ts, void (*function)(Ts...)>
struct Flat<function> {
  static void run(const int64_t* numbers) {
    std::apply(function, std::tuple<std::decay_t<Ts>...>{Taken<std::decay_t<Ts>>::from(numbers)...});
  }
};

template <auto function>
void launch(py::module_& m, py::dict& flat, const char* name) {
  m.def(name, function);
  flat[name] = py::capsule(reinterpret_cast<void*>(&Flat<function>::run), "zsl_kernels.launch");
}

}  // namespace
}  // namespace zsl

PYBIND11_MODULE(ZSL_MODULE, m) {
  using namespace zsl;
  py::dict flat;
  launch<&gram>(m, flat, "gram");
  launch<&cross_gram>(m, flat, "cross_gram");
  launch<&embedding_keys>(m, flat, "embedding_keys");
  launch<&embedding_places>(m, flat, "embedding_places");
  launch<&embedding>(m, flat, "embedding");
  launch<&slab_gram>(m, flat, "slab_gram");
  launch<&dense>(m, flat, "dense");
  launch<&scale_bias>(m, flat, "scale_bias");
  launch<&add_partials>(m, flat, "add_partials");
  launch<&embedding_clear>(m, flat, "embedding_clear");
  launch<&embedding_finish>(m, flat, "embedding_finish");
#if ZSL_HOPPER
  launch<&hopper>(m, flat, "hopper");
  launch<&pack>(m, flat, "pack");
#endif
  m.attr("flat") = flat;
  m.def("shared_bytes", py::overload_cast<int, int, bool>(&shared_bytes),
        "Return the shared memory of a block in bytes: tile, stored examples, whether it adds in runs.");
  m.def(
      "versions",
      [] {
        const Versions x = versions();
        return py::make_tuple(x.built, x.driver);
      },
      "Return the CUDA versions of the build and of the driver.");
  m.def("tiles", [] {
    py::list all;
    for (int i = 0; i < tile_count; ++i) {
      const TileNumbers x = tile_numbers(i);
      all.append(py::make_tuple(x.rows, x.cols, x.slots, x.together, x.stages, x.shares));
    }
    return all;
  });
}
