// The kernels for parameters that are small or sparse, as private torch ops: embeddings, norm scales and biases, and dense
// gradients that are held already. Who owns the checks is said in zsl_kernels/small_ops.py; these trust their arguments but for
// shapes.
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "workers.h"

namespace zsl {
namespace {

using std::int64_t;

// Below this many elements for each worker, starting the workers costs more than the work.
constexpr int64_t worth_a_worker = 1 << 15;

int64_t workers_for(int64_t elements) { return worker_count(elements / worth_a_worker); }

// Features handled at a time: sums that stay in the first-level cache, items for every worker, and `rows` stored rows of bounded
// size, a whole number of cache lines each.
int64_t block_for(int64_t K, int64_t groups, int64_t workers, int64_t rows) {
  constexpr int64_t line = 16, stored = int64_t{1} << 22;
  const int64_t most = std::clamp<int64_t>(stored / std::max<int64_t>(rows, 1), 256, 1024);
  const int64_t blocks = std::max((K + most - 1) / most, (workers + groups - 1) / std::max<int64_t>(groups, 1));
  const int64_t block = (K + std::max<int64_t>(blocks, 1) - 1) / std::max<int64_t>(blocks, 1);
  return std::max<int64_t>((block + line - 1) / line * line, line);
}

// Items (group, block of features) in contiguous ranges of about equal weight; a group's blocks weigh the same.
std::vector<int64_t> balanced(const std::vector<double>& weights, int64_t blocks, int64_t workers) {
  double total = 0, before = 0;
  for (double weight : weights) total += weight;
  std::vector<int64_t> bounds = {0};
  for (size_t group = 0; group < weights.size(); ++group) {
    while (static_cast<int64_t>(bounds.size()) < workers) {
      const double target = total * static_cast<double>(bounds.size()) / static_cast<double>(workers);
      if (target > before + weights[group]) break;
      const double share = weights[group] > 0 ? (target - before) / weights[group] : 0;
      bounds.push_back(static_cast<int64_t>(group) * blocks + static_cast<int64_t>(share * static_cast<double>(blocks) + 0.5));
    }
    before += weights[group];
  }
  bounds.resize(static_cast<size_t>(workers) + 1, static_cast<int64_t>(weights.size()) * blocks);
  return bounds;
}

using Entry = std::pair<int64_t, int64_t>;  // key ≥ 0, place

// Stable, by eleven bits at a time: some thousand entries in tens of microseconds.
void sort_by_key(std::vector<Entry>& entries) {
  constexpr int bits = 11;
  int64_t most = 0;
  for (const Entry& entry : entries) most = std::max(most, entry.first);
  std::vector<Entry> sorted(entries.size());
  for (int shift = 0; shift < 63 && most >> shift; shift += bits) {
    const auto digit = [&](const Entry& entry) { return static_cast<size_t>(entry.first >> shift & ((1 << bits) - 1)); };
    std::array<size_t, (1 << bits) + 1> start = {};
    for (const Entry& entry : entries) ++start[digit(entry) + 1];
    for (size_t d = 1; d < start.size(); ++d) start[d] += start[d - 1];
    for (const Entry& entry : entries) sorted[start[digit(entry)]++] = entry;
    entries.swap(sorted);
  }
}

// Positions by their group: order[starts[r] … starts[r+1]) are those of group r.
struct Grouped {
  std::vector<int64_t> starts = {0}, order;

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t size(int64_t group) const { return starts[group + 1] - starts[group]; }
};

const int64_t* longs(const OptionalTensor& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }

// Partial results of the workers, (workers, size) at a distance of `stride`, added in order.
Tensor add_up(const double* partial, int64_t workers, int64_t stride, int64_t size, const at::TensorOptions& options) {
  const Tensor out = at::empty({size}, options);
  const auto fill = [&](auto* to) {
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t w = 0; w < workers; ++w) sum += partial[w * stride + i];
      to[i] = static_cast<std::remove_pointer_t<decltype(to)>>(sum);
    }
  };
  options.dtype() == at::kDouble ? fill(out.mutable_data_ptr<double>()) : fill(out.mutable_data_ptr<float>());
  return out;
}

void mirror_upper(double* gram, int64_t N) {
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < i; ++j) gram[i * N + j] = gram[j * N + i];
}

using Scalars = std::array<Tensor, 5>;  // l1, sq_norm, dot, abs_dot, gram

// Fills in how the work is split, and runs it. `weights`: the cost of each row, in any unit.
Scalars run_rows(RowArgs& args, const std::vector<double>& weights, int64_t elements, bool direction, const Tensor& b) {
  const auto options = sum_options(b);
  const int64_t N = args.N, rows = static_cast<int64_t>(weights.size());
  int64_t workers = workers_for(elements);
  if (args.gram) workers = std::min(workers, gram_worker_count(workers, N * N));
  args.rows.block = block_for(args.rows.K, rows, workers, args.gram ? args.most_examples : 0);
  const std::vector<int64_t> bounds = balanced(weights, args.rows.blocks(), workers);
  std::vector<double> scalars(static_cast<size_t>(workers * 4 * N));
  const Tensor grams = at::zeros({args.gram ? workers * N * N : 0}, options.dtype(at::kDouble));
  double* pairs = grams.mutable_data_ptr<double>();
  const Kernels& k = *active();
  run_workers(workers, workers, k.row_interference_workspace(args), b, [&](int64_t w, int64_t, int64_t, void* workspace) {
    double* mine = scalars.data() + w * 4 * N;
    k.row_interference_worker(args, bounds[w], bounds[w + 1], workspace,
                              {mine, mine + N, mine + 2 * N, mine + 3 * N, args.gram ? pairs + w * N * N : nullptr});
  });
  Scalars found;
  for (int64_t i = 0; i < 4; ++i) found[i] = add_up(scalars.data() + i * N, workers, 4 * N, direction || i < 2 ? N : 0, options);
  // Mirroring the workers' own keeps the sum's order the same on both sides of the diagonal.
  for (int64_t w = 0; args.gram && w < workers; ++w) mirror_upper(pairs + w * N * N, N);
  found[4] = add_up(pairs, workers, N * N, args.gram ? N * N : 0, options);
  if (args.gram) found[4] = found[4].view({N, N});
  return found;
}

// g (N, …): one row that every example touches.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_interference(const Tensor& g,
                                                                                              const OptionalTensor& direction,
                                                                                              bool gram) {
  TORCH_CHECK(g.dim() > 0 && g.device().is_cpu(), "expected a CPU tensor g (N, …), got ", g.sizes());
  const auto options = sum_options(g);
  const auto shape = g.sizes().slice(1);
  const int64_t N = g.size(0), d = c10::multiply_integers(shape);
  const Tensor rows = g.reshape({N, 1, d});
  const Held u(direction, options);
  TORCH_CHECK(!direction || u.tensor.numel() == d, "expected direction of the shape of one gradient");
  const auto sum = [&] { return N ? at::empty(shape, options) : at::zeros(shape, options); };
  const Tensor grad_sum = sum(), abs_sum = sum(), sq_sum = sum();
  const int64_t starts[] = {0, N};
  RowArgs args = {};
  args.rows.sums = dtype_of(grad_sum);
  args.rows.T = 1, args.rows.K = d, args.rows.starts = starts, args.rows.b = operand(rows);
  args.N = args.most_examples = N, args.gram = gram, args.u = u.data();
  args.grad_sum = grad_sum.mutable_data_ptr(), args.abs_sum = abs_sum.mutable_data_ptr(), args.sq_sum = sq_sum.mutable_data_ptr();
  Scalars s = run_rows(args, {1.0}, N * d, direction.has_value(), g);
  return {grad_sum, abs_sum, sq_sum, s[0], s[1], s[2], s[3], s[4]};
}

// ids (P,) and example_ids (P,) int64, b (N, T, K) of P = N·T positions (ragged: (1, P, K)), direction (V, K).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> embedding_interference(
    const Tensor& ids, const Tensor& b, const OptionalTensor& example_ids, int64_t num_examples, int64_t padding_idx,
    const OptionalTensor& direction, bool gram) {
  const int64_t P = ids.numel(), T = b.size(1), K = b.size(2), N = num_examples;
  TORCH_CHECK(b.dim() == 3 && b.size(0) * T == P && (!example_ids || example_ids->numel() == P) && b.device().is_cpu(),
              "expected ids of b's positions, got ", ids.sizes(), " and ", b.sizes());
  const Tensor flat_ids = ids.contiguous();
  const int64_t *id = longs(flat_ids), *examples = longs(example_ids);

  std::vector<Entry> entries;
  entries.reserve(static_cast<size_t>(P));
  for (int64_t p = 0; p < P; ++p)
    if (id[p] >= 0 && id[p] != padding_idx) entries.emplace_back(id[p] * N + (examples ? examples[p] : p / T), p);
  sort_by_key(entries);

  // One group for each row; its weight is some eight vector operations for an element, and half a product for a pair.
  Grouped grouped;
  std::vector<int64_t> touched;
  std::vector<double> weights;
  int64_t of_row = 0, most_examples = 0;
  grouped.order.reserve(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto [key, p] = entries[i];
    if (touched.empty() || touched.back() != key / N) {
      touched.push_back(key / N), weights.push_back(0), of_row = 0;
      if (i) grouped.starts.push_back(static_cast<int64_t>(i));
    }
    if (!of_row || entries[i - 1].first != key) weights.back() += gram ? ++of_row : (of_row = 1);
    weights.back() += 8;
    most_examples = std::max(most_examples, of_row);
    grouped.order.push_back(p);
  }
  if (!entries.empty()) grouped.starts.push_back(static_cast<int64_t>(entries.size()));

  const auto options = sum_options(b);
  const int64_t U = static_cast<int64_t>(touched.size());
  const Tensor rows = at::empty({U}, ids.options().dtype(at::kLong));
  std::copy(touched.begin(), touched.end(), rows.mutable_data_ptr<int64_t>());
  const Held u(direction ? OptionalTensor(direction->index_select(0, rows)) : std::nullopt, options);
  const Tensor grad_sum = at::empty({U, K}, options), abs_sum = at::empty({U, K}, options), sq_sum = at::empty({U, K}, options);
  RowArgs args = {};
  args.rows.sums = dtype_of(grad_sum);
  args.rows.T = T, args.rows.K = K, args.rows.b = operand(b);
  args.rows.starts = grouped.starts.data(), args.rows.order = grouped.order.data();
  args.examples = examples, args.N = N, args.most_examples = most_examples, args.gram = gram, args.u = u.data();
  args.grad_sum = grad_sum.mutable_data_ptr(), args.abs_sum = abs_sum.mutable_data_ptr(), args.sq_sum = sq_sum.mutable_data_ptr();
  Scalars s = run_rows(args, weights, static_cast<int64_t>(entries.size()) * K, direction.has_value(), b);
  return {rows, grad_sum, abs_sum, sq_sum, s[0], s[1], s[2], s[3], s[4]};
}

// x and b (N, T, K), mean and rstd (N, T); with example_ids (T,) int64 they are (1, T, K) and (1, T). Without x only the bias.
std::tuple<Tensor, Tensor> scale_bias_grad(const OptionalTensor& x, const Tensor& b, const OptionalTensor& mean,
                                           const OptionalTensor& rstd, const OptionalTensor& example_ids, int64_t num_examples,
                                           bool bias) {
  TORCH_CHECK(b.dim() == 3 && (!x || x->sizes() == b.sizes()) && b.device().is_cpu(), "expected x and b (N, T, K) on the CPU");
  const int64_t T = b.size(1), K = b.size(2), P = b.size(0) * T, groups = num_examples;
  const auto options = sum_options(x && x->scalar_type() == at::kDouble ? *x : b);
  const Held means(mean, options), rstds(rstd, options);
  TORCH_CHECK((!mean || mean->numel() == P) && (!rstd || rstd->numel() == P), "expected mean and rstd for every position");

  Grouped grouped;
  if (example_ids) {
    const int64_t* example = longs(example_ids);
    std::vector<Entry> entries;
    for (int64_t p = 0; p < P; ++p) entries.emplace_back(example[p], p);
    sort_by_key(entries);
    for (size_t i = 0; i < entries.size(); ++i) {
      while (grouped.count() < entries[i].first) grouped.starts.push_back(static_cast<int64_t>(i));
      grouped.order.push_back(entries[i].second);
    }
    while (grouped.count() < groups) grouped.starts.push_back(P);
  } else {
    for (int64_t n = 1; n <= groups; ++n) grouped.starts.push_back(n * T);
  }
  std::vector<double> weights;
  for (int64_t n = 0; n < groups; ++n) weights.push_back(static_cast<double>(grouped.size(n)) + 0.25);  // writing the results

  const Tensor scale = at::empty({x ? groups : 0, x ? K : 0}, options), sum = at::empty({bias ? groups : 0, bias ? K : 0}, options);
  PositionArgs args = {};
  args.sums = dtype_of(scale);
  args.T = T, args.K = K, args.starts = grouped.starts.data(), args.order = example_ids ? grouped.order.data() : nullptr;
  args.b = operand(b), args.mean = means.data(), args.rstd = rstds.data();
  if (x) args.x = operand(*x), args.scale = scale.mutable_data_ptr();
  if (bias) args.bias = sum.mutable_data_ptr();
  const int64_t workers = workers_for(P * K * (x ? 2 : 1));
  args.block = block_for(K, groups, workers, 0);
  const std::vector<int64_t> bounds = balanced(weights, args.blocks(), workers);
  const Kernels& k = *active();
  run_workers(workers, workers, k.scale_bias_workspace(args), b, [&](int64_t w, int64_t, int64_t, void* workspace) {
    k.scale_bias_worker(args, bounds[w], bounds[w + 1], workspace);
  });
  return {scale, sum};
}

TORCH_LIBRARY_FRAGMENT(zsl_cpu, m) {
  m.def(
      "dense_interference(Tensor g, Tensor? direction, bool gram) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &dense_interference);
  m.def(
      "embedding_interference(Tensor ids, Tensor b, Tensor? example_ids, int num_examples, int padding_idx, Tensor? direction, "
      "bool gram) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &embedding_interference);
  m.def(
      "scale_bias_grad(Tensor? x, Tensor b, Tensor? mean, Tensor? rstd, Tensor? example_ids, int num_examples, bool bias) -> "
      "(Tensor, Tensor)",
      &scale_bias_grad);
}

}  // namespace
}  // namespace zsl
