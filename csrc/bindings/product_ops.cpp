// Binds the CPU kernels of inputs and output gradients as private torch ops (zsl_cpu::*): validation, allocation and workers.
//
// The public ops are in zsl_kernels/ops. zsl_kernels/planning chooses among the private ops, and zsl_kernels/backends/cpu.py calls
// them.
//
// The work is split into as many contiguous ranges as there are threads. Partial scalars are added in the order of the ranges, so
// results are bitwise reproducible for the same inputs and number of threads.
#include <ATen/DimVector.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"
#include "workers.h"

namespace zsl {
namespace {

// Returns the kernels of the instruction sets that this processor supports, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512 && kernels_amx()) found.push_back(kernels_amx());
  if (avx512_bf16) found.push_back(kernels_avx512_bf16());
  if (avx512) found.push_back(kernels_avx512());
  if (avx2) found.push_back(kernels_avx2());
#endif
  if (kernels_neon()) found.push_back(kernels_neon());
  found.push_back(kernels_generic());
#ifdef ZSL_EMULATE_AMX
  found.push_back(kernels_amx_emulated());
#endif
  return found;
}

const Kernels* find_isa(const std::string& isa) {
  std::string names;
  for (const Kernels* k : supported()) {
    if (isa == k->isa) return k;
    names += std::string(names.empty() ? "" : ", ") + k->isa;
  }
  TORCH_CHECK(false, "ZSL_CPU_ISA: expected one of ", names, " on this processor, got '", isa, "'");
}

}  // namespace

const Kernels*& active() {
  static const Kernels* kernels = [] {
    const char* wanted = std::getenv("ZSL_CPU_ISA");
    return wanted && *wanted ? find_isa(wanted) : supported().front();
  }();
  return kernels;
}

namespace {

// Returns the examples' offsets into `rows` rows after validation, because the kernels access memory at these offsets. With `some`,
// the offsets may cover only some of the rows.
const int64_t* offsets_of(const Tensor& begin, int64_t rows, bool some = false) {
  TORCH_CHECK(
      begin.dim() == 1 && begin.size(0) > 0 && begin.scalar_type() == at::kLong && begin.is_contiguous() && begin.device().is_cpu(),
      "begin: expected offsets as a contiguous (N + 1,) int64 tensor on the CPU, got ", begin.scalar_type(), " ", begin.sizes());
  const int64_t *first = begin.const_data_ptr<int64_t>(), *end = first + begin.size(0);
  TORCH_CHECK(*first == 0 && (end[-1] == rows || (some && end[-1] < rows)) && std::is_sorted(first, end),
              "begin: expected offsets that ascend from 0 to ", rows, ", got ", *first, " to ", end[-1]);
  return first;
}

Shape shape_of(const Tensor& a, const Tensor& b, const OptionalTensor& begin, int64_t tile_o, int64_t tile_k) {
  const int64_t dims = begin ? 2 : 3;
  TORCH_CHECK(a.dim() == dims && b.dim() == dims && a.sizes().slice(0, dims - 1) == b.sizes().slice(0, dims - 1),
              begin ? "a, b: expected shapes (R, K) and (R, O), got " : "a, b: expected shapes (N, T, K) and (N, T, O), got ",
              a.sizes(), " and ", b.sizes());
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a, b: expected the same dtype, got ", a.scalar_type(), " and ", b.scalar_type());
  TORCH_CHECK(a.device().is_cpu() && b.device().is_cpu(), "a, b: expected CPU tensors, got tensors on ", a.device(), " and ",
              b.device());
  TORCH_CHECK(tile_o > 0 && tile_k > 0, "tile_o, tile_k: expected positive sizes, got ", tile_o, " x ", tile_k);
  check_elements("a", a.sizes()), check_elements("b", b.sizes()), check_elements("a, b: the weight", {b.size(-1), a.size(-1)});
  Shape shape = {a.size(0),
                 a.size(1),
                 a.size(-1),
                 b.size(-1),
                 std::min(tile_o, std::max<int64_t>(b.size(-1), 1)),
                 std::min(tile_k, std::max<int64_t>(a.size(-1), 1))};
  if (begin) {
    shape.begin = offsets_of(*begin, a.size(0));
    shape.N = begin->size(0) - 1, shape.T = 0;
    for (int64_t n = 0; n < shape.N; ++n) shape.T = std::max(shape.T, shape.length(n));
  }
  return shape;
}

AddedRows added_rows(const OptionalTensor& begin, const OptionalTensor& index, const OptionalTensor& values, const Shape& shape,
                     const at::TensorOptions& options) {
  if (!begin) return {};
  TORCH_CHECK(
      index && values && values->dim() == 2 && values->size(1) == shape.K && values->is_contiguous() &&
          values->scalar_type() == options.dtype().toScalarType() && index->dim() == 1 && index->size(0) == values->size(0) &&
          index->scalar_type() == at::kLong && index->is_contiguous() && begin->size(0) == shape.N + 1,
      "added_begin, added_index, added_values: expected offsets (N + 1,), int64 features (P,) and contiguous values (P, K) in "
      "the dtype of the sums");
  const AddedRows added = {offsets_of(*begin, index->size(0), true), index->const_data_ptr<int64_t>(), values->const_data_ptr()};
  for (int64_t n = 0; n < shape.N; ++n)
    for (int64_t p = added.begin[n]; p < added.begin[n + 1]; ++p)
      TORCH_CHECK(added.index[p] >= 0 && added.index[p] < shape.O && (p == added.begin[n] || added.index[p - 1] < added.index[p]),
                  "added_index: expected ascending features below ", shape.O, " for each example, got ", added.index[p]);
  return added;
}

// The workers' partial sums, a (workers, …) tensor in double, and their sum in S.
struct Partials {
  Tensor each, total;
  int64_t workers, size;

  Partials(int64_t workers, std::initializer_list<int64_t> sizes) : workers(workers), size(c10::multiply_integers(sizes)) {
    at::DimVector all = {workers};
    all.append(sizes.begin(), sizes.end());
    each = fresh(all, at::kDouble);
    std::fill_n(data(), workers * size, 0.0);
  }
  double* data() const { return each.mutable_data_ptr<double>(); }

  Tensor sum(const Tensor& a) const { return each.sum(0).to(sum_options(a).dtype()); }

  // Returns the sum of one row of a (workers, rows, …) tensor as a separate tensor. For up to four workers both methods of adding
  // give the same bits.
  Tensor sum_row(int64_t row, int64_t rows, const Tensor& a) {
    if (workers > 4) {
      if (!total.defined()) total = sum(a);
      return total[row].clone();
    }
    return add_up(data() + row * (size / rows), workers, size, size / rows, sum_options(a));
  }
};

Tensor mirror_upper(const Tensor& gram) { return gram.triu().add(gram.triu(1).transpose(0, 1)); }

}  // namespace

// A result that was not requested is undefined, which is None in Python.
Sums interference(const Tensor& a, const Tensor& b, const OptionalTensor& direction, bool gram, int64_t tile_o, int64_t tile_k,
                  const OptionalTensor& begin, const OptionalTensor& added_begin, const OptionalTensor& added_index,
                  const OptionalTensor& added_values) {
  const Plain plain;
  const Shape shape = shape_of(a, b, begin, tile_o, tile_k);
  if (gram) check_elements("gram", {shape.N, shape.N});
  const auto options = sum_options(a);
  const Held u("direction", direction, options, shape.O * shape.K);
  Tensor sums[3];
  for (Tensor& sum : sums) sum = fresh({shape.O, shape.K}, options);
  const InterferenceArgs args = {shape,
                                 operand(a),
                                 operand(b),
                                 u.data(),
                                 sums[0].mutable_data_ptr(),
                                 sums[1].mutable_data_ptr(),
                                 sums[2].mutable_data_ptr(),
                                 gram,
                                 added_rows(added_begin, added_index, added_values, shape, options)};
  const int64_t workers = gram ? gram_worker_count(shape.tiles(), shape.N * shape.N) : worker_count(shape.tiles());
  Partials scalars(workers, {4, shape.N}), grams(gram ? workers : 0, {shape.N, shape.N});
  double *scalar = scalars.data(), *pairs = grams.data();
  const Kernels& k = *active();
  run_workers(workers, shape.tiles(), k.interference_workspace(args), [&](int64_t w, int64_t begin, int64_t end, void* workspace) {
    double* mine = scalar + w * 4 * shape.N;
    k.interference_worker(
        args, begin, end, workspace,
        {mine, mine + shape.N, mine + 2 * shape.N, mine + 3 * shape.N, gram ? pairs + w * shape.N * shape.N : nullptr});
  });
  return {sums[0],
          sums[1],
          sums[2],
          scalars.sum_row(0, 4, a),
          scalars.sum_row(1, 4, a),
          direction ? scalars.sum_row(2, 4, a) : Tensor(),
          direction ? scalars.sum_row(3, 4, a) : Tensor(),
          gram ? mirror_upper(grams.sum(a)) : Tensor()};
}

namespace {

// Computes only one of sq_norm, dot and abs_dot, with shape (N,).
Tensor scalars_direct(int64_t which, const Tensor& a, const Tensor& b, const OptionalTensor& direction, int64_t tile_o,
                      int64_t tile_k, const OptionalTensor& begin) {
  const Plain plain;
  const Shape shape = shape_of(a, b, begin, tile_o, tile_k);
  const Held u("direction", direction, sum_options(a), shape.O * shape.K);
  const InterferenceArgs args = {shape, operand(a), operand(b), u.data(), nullptr, nullptr, nullptr, false};
  const int64_t workers = worker_count(shape.tiles());
  Partials partials(workers, {3, shape.N});
  double* out = partials.data();
  const Kernels& k = *active();
  run_workers(workers, shape.tiles(), k.interference_workspace(args), [&](int64_t w, int64_t begin, int64_t end, void* workspace) {
    double* mine = out + w * 3 * shape.N;
    k.interference_worker(args, begin, end, workspace, {nullptr, mine, mine + shape.N, mine + 2 * shape.N, nullptr});
  });
  return partials.sum_row(which, 3, a);
}

Tensor sq_norm_direct(const Tensor& a, const Tensor& b, int64_t tile_o, int64_t tile_k, const OptionalTensor& begin) {
  return scalars_direct(0, a, b, std::nullopt, tile_o, tile_k, begin);
}

Tensor dot_direct(const Tensor& a, const Tensor& b, const Tensor& direction, int64_t tile_o, int64_t tile_k,
                  const OptionalTensor& begin) {
  return scalars_direct(1, a, b, direction, tile_o, tile_k, begin);
}

// The kernels read a2 and b2 (M, T, ·) with the sizes and dtype of a and b.
void check_second(const Tensor& a, const Tensor& b, const Tensor& a2, const Tensor& b2) {
  const auto alike = [](const Tensor& x, const Tensor& y) {
    return x.dim() == y.dim() && x.sizes().slice(1) == y.sizes().slice(1) && x.scalar_type() == y.scalar_type() &&
           x.device() == y.device();
  };
  TORCH_CHECK(alike(a2, a) && alike(b2, b) && a2.size(0) == b2.size(0),
              "a2, b2: expected the dtypes and shapes of a and b except for the number of examples, got ", a2.sizes(), " and ",
              b2.sizes());
}

GramArgs gram_args(const Tensor& a, const Tensor& b, const Tensor& a2, const Tensor& b2, bool self, int64_t tile_o, int64_t tile_k,
                   const OptionalTensor& begin) {
  const Shape shape = shape_of(a, b, begin, tile_o, tile_k);
  const int64_t M = self ? shape.N : a2.size(0);
  check_elements("gram", {shape.N, M});
  if (self) return {shape, M, operand(a), operand(b), operand(a), operand(b), self};
  TORCH_CHECK(!begin, "a2, b2: expected no second set with ragged rows, got one");
  check_second(a, b, a2, b2);
  return {shape, a2.size(0), operand(a), operand(b), operand(a2), operand(b2), self};
}

Tensor gram_direct(const Tensor& a, const Tensor& b, const Tensor& a2, const Tensor& b2, bool self, int64_t tile_o, int64_t tile_k,
                   const OptionalTensor& begin) {
  const Plain plain;
  const GramArgs args = gram_args(a, b, a2, b2, self, tile_o, tile_k, begin);
  const int64_t size = args.shape.N * args.M, workers = gram_worker_count(args.shape.tiles(), size);
  const Partials partials(workers, {args.shape.N, args.M});
  double* out = partials.data();
  const Kernels& k = *active();
  run_workers(workers, args.shape.tiles(), k.gram_workspace(args), [&](int64_t w, int64_t begin, int64_t end, void* workspace) {
    k.gram_worker(args, begin, end, workspace, out + w * size);
  });
  return self ? mirror_upper(partials.sum(a)) : partials.sum(a);
}

// Returns (N, M), or (N,) with `diagonal`.
Tensor ghost(const Tensor& a, const Tensor& b, const Tensor& a2, const Tensor& b2, bool self, bool diagonal) {
  const Plain plain;
  TORCH_CHECK(self || !diagonal, "a2, b2: expected one set of examples for norms, got two");
  const GramArgs args = gram_args(a, b, a2, b2, self, 1, 1, std::nullopt);
  const Shape& shape = args.shape;
  const bool empty = shape.N * args.M * shape.T * shape.K * shape.O == 0;
  const Kernels& k = *active();
  const int64_t blocks = empty ? 0 : k.ghost_blocks(args, diagonal);
  const int64_t size = diagonal ? shape.N : shape.N * args.M, workers = gram_worker_count(blocks, size);
  const Partials partials = diagonal ? Partials(workers, {shape.N}) : Partials(workers, {shape.N, args.M});
  double* out = partials.data();
  if (!empty)
    run_workers(workers, blocks, k.ghost_workspace(args), [&](int64_t w, int64_t begin, int64_t end, void* workspace) {
      k.ghost_worker(args, diagonal, begin, end, workspace, out + w * size);
    });
  const Tensor total = partials.sum(a);
  // Products of dot products can round below zero if a norm is close to zero. Clamping preserves NaN.
  if (diagonal) return total.clamp_min(0);
  if (!self) return total;
  total.diagonal().clamp_min_(0);
  return mirror_upper(total);
}

void weighted_grad_into(const WeightedArgs& args, const Tensor& a) {
  const Kernels& k = *active();
  run_workers(worker_count(args.shape.tiles()), args.shape.tiles(), k.weighted_workspace(args),
              [&](int64_t, int64_t begin, int64_t end, void* workspace) { k.weighted_worker(args, begin, end, workspace); });
}

Tensor weighted_grad(const Tensor& a, const Tensor& b, const Tensor& weights, const OptionalTensor& abs_weights,
                     const OptionalTensor& direction, int64_t tile_o, int64_t tile_k, const OptionalTensor& begin) {
  const Plain plain;
  const Shape shape = shape_of(a, b, begin, tile_o, tile_k);
  TORCH_CHECK(!abs_weights || direction, "direction: expected a tensor because abs_weights is given, got none");
  const Held w("weights", weights, double_options(a), shape.N), v("abs_weights", abs_weights, double_options(a), shape.N);
  const Held u("direction", direction, sum_options(a), shape.O * shape.K);
  const Tensor out = fresh({shape.O, shape.K}, sum_options(a));
  weighted_grad_into({shape, operand(a), operand(b), w.doubles(), v.doubles(), u.data(), out.mutable_data_ptr()}, a);
  return out;
}

// Computes out = x y, the gradient of one example, where the positions are the inner dimension. It covers the products that torch
// lacks: float sums of bf16 or f16 operands.
void product(const Tensor& x, const Tensor& y, const Tensor& out, int64_t tile_o, int64_t tile_k) {
  const Plain plain;
  const Tensor a = y.unsqueeze(0), b = x.t().unsqueeze(0);
  const Shape shape = shape_of(a, b, std::nullopt, tile_o, tile_k);
  TORCH_CHECK(out.dim() == 2 && out.size(0) == shape.O && out.size(1) == shape.K && out.is_contiguous() &&
                  out.scalar_type() == sum_options(a).dtype() && out.device().is_cpu(),
              "out: expected a contiguous (", shape.O, ", ", shape.K, ") tensor in the dtype of the sums, got ", out.sizes(),
              " of ", out.scalar_type());
  const double one = 1;
  weighted_grad_into({shape, operand(a), operand(b), &one, nullptr, nullptr, out.mutable_data_ptr()}, a);
}

// The arguments c_* are the cotangents of grad_sum, abs_sum, sq_sum (O, K) and of l1, sq_norm, dot, abs_dot (N,). mix (N, M)
// contains the weights of the gradients of a2, b2.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& a, const Tensor& b, const OptionalTensor& direction,
                                            const OptionalTensor& c_grad, const OptionalTensor& c_abs, const OptionalTensor& c_sq,
                                            const OptionalTensor& c_l1, const OptionalTensor& c_sqn, const OptionalTensor& c_dot,
                                            const OptionalTensor& c_absdot, const OptionalTensor& mix, const Tensor& a2,
                                            const Tensor& b2, bool want_a, bool want_b, bool want_added, int64_t tile_o,
                                            int64_t tile_k, const OptionalTensor& begin, const OptionalTensor& added_begin,
                                            const OptionalTensor& added_index, const OptionalTensor& added_values) {
  const Plain plain;
  const Shape shape = shape_of(a, b, begin, tile_o, tile_k);
  TORCH_CHECK(!begin || !mix || (a2.sizes() == a.sizes() && b2.sizes() == b.sizes()),
              "a2, b2: expected no second set with ragged rows, got one");
  if (mix) check_second(a, b, a2, b2), check_elements("mix", mix->sizes());
  const auto S = sum_options(a), D = double_options(a);
  const int64_t N = shape.N, size = shape.O * shape.K, M = begin ? N : a2.size(0);
  const Held u("direction", direction, S, size), grad("c_grad", c_grad, S, size), abs("c_abs", c_abs, S, size);
  const Held sq("c_sq", c_sq, S, size), l1("c_l1", c_l1, D, N), sqn("c_sqn", c_sqn, D, N), dot("c_dot", c_dot, D, N);
  const Held absdot("c_absdot", c_absdot, D, N), mixed("mix", mix, D, mix ? N * M : 0);
  const Tensor da = want_a ? at::zeros(a.sizes(), S) : at::empty({0}, S);
  const Tensor db = want_b ? at::zeros(b.sizes(), S) : at::empty({0}, S);
  const AddedRows added = added_rows(added_begin, added_index, added_values, shape, S);
  const Tensor d_added = want_added && added_values ? at::empty(added_values->sizes(), S) : at::empty({0}, S);
  const BackwardArgs args = {shape,
                             operand(a),
                             operand(b),
                             u.data(),
                             grad.data(),
                             abs.data(),
                             sq.data(),
                             l1.doubles(),
                             sqn.doubles(),
                             dot.doubles(),
                             absdot.doubles(),
                             mixed.doubles(),
                             M,
                             operand(a2),
                             operand(b2),
                             added,
                             want_added && added.begin ? d_added.mutable_data_ptr() : nullptr,
                             want_a ? da.mutable_data_ptr() : nullptr,
                             want_b ? db.mutable_data_ptr() : nullptr};
  const Kernels& k = *active();
  const size_t workspace_bytes = k.backward_workspace(args);
  const Tensor shared = at::empty({static_cast<int64_t>(k.backward_shared(args))}, a.options().dtype(at::kByte));
  void* g2 = shared.mutable_data_ptr();
  for (int64_t tile = 0; tile < shape.tiles(); ++tile) {
    if (args.mix)
      run_workers(worker_count(args.M), args.M, workspace_bytes, [&](int64_t, int64_t begin, int64_t end, void* workspace) {
        k.backward_mix_worker(args, tile, begin, end, workspace, g2);
      });
    run_workers(worker_count(shape.N), shape.N, workspace_bytes, [&](int64_t, int64_t begin, int64_t end, void* workspace) {
      k.backward_worker(args, tile, begin, end, workspace, g2);
    });
  }
  return {da.to(a.scalar_type()), db.to(b.scalar_type()), d_added};
}

std::string isa() { return active()->isa; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* k : supported()) names.emplace_back(k->isa);
  return names;
}

void use_isa(const std::string& name) { active() = find_isa(name); }

TORCH_LIBRARY(zsl_cpu, m) {
  m.def(
      "interference(Tensor a, Tensor b, Tensor? direction, bool gram, int tile_o, int tile_k, Tensor? begin=None, "
      "Tensor? added_begin=None, Tensor? added_index=None, Tensor? added_values=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &interference);
  m.def("sq_norm_direct(Tensor a, Tensor b, int tile_o, int tile_k, Tensor? begin=None) -> Tensor", &sq_norm_direct);
  m.def("dot_direct(Tensor a, Tensor b, Tensor direction, int tile_o, int tile_k, Tensor? begin=None) -> Tensor", &dot_direct);
  m.def("gram_direct(Tensor a, Tensor b, Tensor a2, Tensor b2, bool self, int tile_o, int tile_k, Tensor? begin=None) -> Tensor",
        &gram_direct);
  m.def("ghost(Tensor a, Tensor b, Tensor a2, Tensor b2, bool self, bool diagonal) -> Tensor", &ghost);
  m.def(
      "weighted_grad(Tensor a, Tensor b, Tensor weights, Tensor? abs_weights, Tensor? direction, int tile_o, int tile_k, "
      "Tensor? begin=None) -> Tensor",
      &weighted_grad);
  m.def("product(Tensor x, Tensor y, Tensor(a!) out, int tile_o, int tile_k) -> ()", &product);
  m.def(
      "backward(Tensor a, Tensor b, Tensor? direction, Tensor? c_grad, Tensor? c_abs, Tensor? c_sq, Tensor? c_l1, Tensor? c_sqn, "
      "Tensor? c_dot, Tensor? c_absdot, Tensor? mix, Tensor a2, Tensor b2, bool want_a, bool want_b, bool want_added, "
      "int tile_o, int tile_k, Tensor? begin=None, Tensor? added_begin=None, Tensor? added_index=None, "
      "Tensor? added_values=None) -> (Tensor, Tensor, Tensor)",
      &backward);
  m.def("isa() -> str", &isa);
  m.def("isas() -> str[]", &isas);
  m.def("use_isa(str name) -> ()", &use_isa);
}

}  // namespace
}  // namespace zsl
