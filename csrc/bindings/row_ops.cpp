// Binds the CPU kernels that need no matrix product as private torch ops (zsl_cpu::*).
//
// They cover embeddings, scales and biases of norms, gradients that are already in memory, and sums over coordinates.
// zsl_kernels/ops validates the arguments. These ops validate shapes, and the values of integers that determine memory addresses.
#include <ATen/core/List.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"
#include "workers.h"

namespace zsl {
namespace {

using std::int64_t;

// Below this number of elements per worker, starting the workers costs more than the work itself.
constexpr int64_t worth_a_worker = 1 << 15;

int64_t workers_for(int64_t elements) { return worker_count(elements / worth_a_worker); }

// Returns the number of features processed at a time. The block's sums fit in the L1 cache, every worker gets items, the size of
// the `rows` stored rows is bounded, and each stored row is a whole number of cache lines.
int64_t block_for(int64_t K, int64_t groups, int64_t workers, int64_t rows) {
  constexpr int64_t line = 16, stored = int64_t{1} << 22;
  const int64_t most = std::clamp<int64_t>(stored / std::max<int64_t>(rows, 1), 256, 1024);
  const int64_t blocks = std::max((K + most - 1) / most, (workers + groups - 1) / std::max<int64_t>(groups, 1));
  const int64_t block = (K + std::max<int64_t>(blocks, 1) - 1) / std::max<int64_t>(blocks, 1);
  return std::max<int64_t>((block + line - 1) / line * line, line);
}

// Splits items (group, block of features) into contiguous ranges of about equal weight. All blocks of a group have the same weight.
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

// Stable radix sort with eleven bits per pass. It sorts several thousand entries in tens of microseconds.
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

// Positions by group: order[starts[r] … starts[r+1]) are the positions of group r.
struct Grouped {
  std::vector<int64_t> starts = {0}, order;

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t size(int64_t group) const { return starts[group + 1] - starts[group]; }
};

// Integers of any dtype and layout, converted to the layout that the kernels read. All are below `end`, and none is below zero
// unless `negative` is set.
struct Longs {
  Tensor tensor;
  const int64_t* data = nullptr;

  Longs(const char* name, const OptionalTensor& x, int64_t end, bool negative = false) {
    if (!x) return;
    TORCH_CHECK(x->device().is_cpu() && at::isIntegralType(x->scalar_type(), /*includeBool=*/false), name,
                ": expected integers on the CPU, got ", x->scalar_type(), " on ", x->device());
    tensor = x->scalar_type() == at::kLong ? *x : x->to(at::kLong);
    if (!tensor.is_contiguous()) tensor = tensor.contiguous();
    data = tensor.const_data_ptr<int64_t>();
    if (!tensor.numel()) return;
    const auto [least, most] = std::minmax_element(data, data + tensor.numel());
    const bool wrapped = *least < 0 && x->scalar_type() == at::kUInt64;  // exceeds the range of int64
    TORCH_CHECK_INDEX(*most < end && !wrapped && (negative || *least >= 0), name, ": expected values in [0, ", end, "), got ",
                      wrapped       ? std::to_string(static_cast<uint64_t>(*least))
                      : *most < end ? std::to_string(*least)
                                    : std::to_string(*most));
  }
};

// Validates b (N, T, ·), or (1, P, ·) with the example of each position.
void check_positions(const Tensor& b, const OptionalTensor& example_ids, int64_t N) {
  TORCH_CHECK(b.dim() == 3 && b.device().is_cpu(), "b: expected shape (N, T, K) on the CPU, got ", b.sizes(), " on ", b.device());
  check_elements("b", b.sizes());
  const int64_t P = b.size(0) * b.size(1);
  if (example_ids) {
    TORCH_CHECK_VALUE(example_ids->numel() == P, "example_ids: expected ", P, ", one for each position of b, got ",
                      example_ids->numel());
    check_elements("num_examples", {N, b.size(2)});
  } else {
    TORCH_CHECK_VALUE(N == b.size(0), "num_examples: expected ", b.size(0), ", the first size of b, got ", N);
  }
}

void mirror_upper(double* gram, int64_t N) {
  for (int64_t i = 0; i < N; ++i)
    for (int64_t j = 0; j < i; ++j) gram[i * N + j] = gram[j * N + i];
}

using Scalars = std::array<Tensor, 5>;  // l1, sq_norm, dot, abs_dot, gram; undefined (None in Python) if not requested

// Sets how the work is split, and runs it. `weights` is the cost of each row in any unit.
Scalars run_rows(RowArgs& args, const std::vector<double>& weights, int64_t elements, bool direction, const Tensor& b) {
  const auto options = sum_options(b);
  const int64_t N = args.N, rows = static_cast<int64_t>(weights.size());
  int64_t workers = workers_for(elements);
  if (args.gram) workers = std::min(workers, gram_worker_count(workers, N * N));
  args.rows.block = block_for(args.rows.K, rows, workers, args.gram ? args.most_examples : 0);
  const std::vector<int64_t> bounds = balanced(weights, args.rows.blocks(), workers);
  std::vector<double> scalars(static_cast<size_t>(workers * 4 * N));
  const Tensor grams = fresh({args.gram ? workers * N * N : 0}, at::kDouble);
  double* pairs = grams.mutable_data_ptr<double>();
  std::fill_n(pairs, grams.numel(), 0.0);
  const Kernels& k = *active();
  run_workers(workers, workers, k.row_interference_workspace(args), [&](int64_t w, int64_t, int64_t, void* workspace) {
    double* mine = scalars.data() + w * 4 * N;
    k.row_interference_worker(args, bounds[w], bounds[w + 1], workspace,
                              {mine, mine + N, mine + 2 * N, mine + 3 * N, args.gram ? pairs + w * N * N : nullptr});
  });
  Scalars found;
  for (int64_t i = 0; i < (direction ? 4 : 2); ++i) found[i] = add_up(scalars.data() + i * N, workers, 4 * N, N, options);
  if (!args.gram) return found;
  // Mirroring each worker's own matrix keeps the order of additions the same on both sides of the diagonal.
  for (int64_t w = 0; w < workers; ++w) mirror_upper(pairs + w * N * N, N);
  found[4] = add_up(pairs, workers, N * N, N * N, options).view({N, N});
  return found;
}

}  // namespace

// g (N, …) is one row that every example touches.
Sums dense_interference(const Tensor& g, const OptionalTensor& direction, bool gram) {
  const Plain plain;
  TORCH_CHECK(g.dim() > 0 && g.device().is_cpu(), "g: expected shape (N, …) on the CPU, got ", g.sizes(), " on ", g.device());
  check_elements("g", g.sizes());
  if (gram) check_elements("gram", {g.size(0), g.size(0)});
  const auto options = sum_options(g);
  const auto shape = g.sizes().slice(1);
  const int64_t N = g.size(0), d = c10::multiply_integers(shape);
  const Tensor flat = g.is_contiguous() ? g : g.reshape({N, d});
  const Held u("direction", direction, options, d);
  const Tensor grad_sum = fresh(shape, options), abs_sum = fresh(shape, options), sq_sum = fresh(shape, options);
  if (!N)
    for (const Tensor& sum : {grad_sum, abs_sum, sq_sum}) sum.zero_();
  const int64_t starts[] = {0, N};
  RowArgs args = {};
  args.rows.sums = dtype_of(grad_sum);
  args.rows.T = 1, args.rows.K = d, args.rows.starts = starts, args.rows.b = {flat.const_data_ptr(), dtype_of(g), d, 0, 1};
  if (!flat.is_contiguous()) args.rows.b.sn = flat.stride(0), args.rows.b.sf = flat.stride(1);
  args.N = args.most_examples = N, args.gram = gram, args.u = u.data();
  args.grad_sum = grad_sum.mutable_data_ptr(), args.abs_sum = abs_sum.mutable_data_ptr(), args.sq_sum = sq_sum.mutable_data_ptr();
  Scalars s = run_rows(args, {1.0}, N * d, direction.has_value(), g);
  return {grad_sum, abs_sum, sq_sum, s[0], s[1], s[2], s[3], s[4]};
}

namespace {

bool all_finite(const Tensor& x) {
  const auto check = [&](const auto* values) {
    return std::all_of(values, values + x.numel(), [](auto v) { return std::isfinite(v); });
  };
  return x.scalar_type() == at::kDouble ? check(x.const_data_ptr<double>()) : check(x.const_data_ptr<float>());
}

// Sets those products to NaN that the kernel does not compute. An example is zero in the rows that it does not touch, but another
// example's values in these rows may be infinite or NaN. `rows` and b are those of args.
void mark_untouched(const RowArgs& args, int64_t rows, const Tensor& b, Tensor& gram) {
  const int64_t N = args.N, K = args.rows.K, T = args.rows.T;
  const Tensor wide = b.to(at::kDouble).contiguous();
  const double* values = wide.const_data_ptr<double>();
  const auto example_of = [&](int64_t p) { return args.examples ? args.examples[p] : p / T; };
  const auto finite = [&](double sum) { return std::isfinite(args.rows.sums == DType::f64 ? sum : static_cast<float>(sum)); };
  const Tensor pairs = gram.to(at::kDouble);
  double* out = pairs.mutable_data_ptr<double>();
  std::vector<double> sums(static_cast<size_t>(K));
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<char> touches(static_cast<size_t>(N), 0);
    std::vector<int64_t> broken;  // examples with values that are not finite
    for (int64_t i = args.rows.starts[row]; i < args.rows.starts[row + 1];) {
      const int64_t example = example_of(args.rows.order[i]);
      touches[example] = 1;
      std::fill(sums.begin(), sums.end(), 0.0);
      for (; i < args.rows.starts[row + 1] && example_of(args.rows.order[i]) == example; ++i)
        for (int64_t k = 0; k < K; ++k) sums[k] += values[args.rows.order[i] * K + k];
      if (!std::all_of(sums.begin(), sums.end(), finite)) broken.push_back(example);
    }
    for (int64_t example : broken)
      for (int64_t other = 0; other < N; ++other)
        if (!touches[other]) out[example * N + other] = out[other * N + example] = std::numeric_limits<double>::quiet_NaN();
  }
  gram = pairs.to(gram.scalar_type());
}

// ids and example_ids (P,) are integers, b (N, T, K) has P = N·T positions (ragged: (1, P, K)), and direction is (V, K).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> embedding_interference(
    const Tensor& ids, const Tensor& b, const OptionalTensor& example_ids, int64_t num_examples, int64_t num_embeddings,
    int64_t padding_idx, const OptionalTensor& direction, bool gram) {
  const Plain plain;
  check_positions(b, example_ids, num_examples);
  const int64_t P = b.size(0) * b.size(1), T = b.size(1), K = b.size(2), N = num_examples;
  TORCH_CHECK_VALUE(ids.numel() == P, "ids: expected ", P, ", one for each position of b, got ", ids.numel());
  // The key of a position combines its row and its example.
  TORCH_CHECK_VALUE(num_embeddings >= 0 && num_embeddings <= std::numeric_limits<int64_t>::max() / std::max<int64_t>(N, 1),
                    "num_embeddings: expected num_embeddings * num_examples < 2^63 for ", N, " examples, got ", num_embeddings);
  if (gram) check_elements("gram", {N, N});
  if (direction)
    TORCH_CHECK_VALUE(direction->sizes() == at::IntArrayRef({num_embeddings, K}), "direction: expected shape (", num_embeddings,
                      ", ", K, "), got ", direction->sizes());
  const Longs flat_ids("ids", ids, num_embeddings, true), example_of("example_ids", example_ids, N);
  const int64_t *id = flat_ids.data, *examples = example_of.data;

  std::vector<Entry> entries;
  entries.reserve(static_cast<size_t>(P));
  for (int64_t p = 0; p < P; ++p)
    if (id[p] >= 0 && id[p] != padding_idx) entries.emplace_back(id[p] * N + (examples ? examples[p] : p / T), p);
  sort_by_key(entries);

  // One group per row. Its weight counts about eight vector operations per element and half a product per pair.
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
    if (!of_row || entries[i - 1].first != key) ++of_row, weights.back() += gram ? of_row : 1;
    weights.back() += 8;
    most_examples = std::max(most_examples, of_row);
    grouped.order.push_back(p);
  }
  if (!entries.empty()) grouped.starts.push_back(static_cast<int64_t>(entries.size()));

  const auto options = sum_options(b);
  const int64_t U = static_cast<int64_t>(touched.size());
  const Tensor rows = fresh({U}, at::kLong);
  std::copy(touched.begin(), touched.end(), rows.mutable_data_ptr<int64_t>());
  const Held u("direction", direction ? OptionalTensor(direction->index_select(0, rows)) : std::nullopt, options, U * K);
  const Tensor grad_sum = fresh({U, K}, options), abs_sum = fresh({U, K}, options), sq_sum = fresh({U, K}, options);
  RowArgs args = {};
  args.rows.sums = dtype_of(grad_sum);
  args.rows.T = T, args.rows.K = K, args.rows.b = operand(b);
  args.rows.starts = grouped.starts.data(), args.rows.order = grouped.order.data();
  args.examples = examples, args.N = N, args.most_examples = most_examples, args.gram = gram, args.u = u.data();
  args.grad_sum = grad_sum.mutable_data_ptr(), args.abs_sum = abs_sum.mutable_data_ptr(), args.sq_sum = sq_sum.mutable_data_ptr();
  Scalars s = run_rows(args, weights, static_cast<int64_t>(entries.size()) * K, direction.has_value(), b);
  if (gram && !all_finite(s[0])) mark_untouched(args, U, b, s[4]);
  return {rows, grad_sum, abs_sum, sq_sum, s[0], s[1], s[2], s[3], s[4]};
}

}  // namespace

// x and b are (N, T, K), and mean and rstd are (N, T). With example_ids (T,) they are (1, T, K) and (1, T). Without x, only the
// bias is computed.
std::tuple<Tensor, Tensor> scale_bias_grad(const OptionalTensor& x, const Tensor& b, const OptionalTensor& mean,
                                           const OptionalTensor& rstd, const OptionalTensor& example_ids, int64_t num_examples,
                                           bool bias) {
  const Plain plain;
  check_positions(b, example_ids, num_examples);
  if (x)
    TORCH_CHECK_VALUE(x->sizes() == b.sizes() && x->device().is_cpu(), "x: expected the shape of b, ", b.sizes(),
                      ", on the CPU, got ", x->sizes(), " on ", x->device());
  const int64_t T = b.size(1), K = b.size(2), P = b.size(0) * T, groups = num_examples;
  const auto options = sum_options(x && x->scalar_type() == at::kDouble ? *x : b);
  const Held means("mean", mean, options, P), rstds("rstd", rstd, options, P);
  const Tensor scale = x ? fresh({groups, K}, options) : Tensor(), sum = bias ? fresh({groups, K}, options) : Tensor();

  Grouped grouped;
  grouped.starts.reserve(static_cast<size_t>(groups) + 1);
  if (example_ids) {
    const Longs ids("example_ids", example_ids, groups);
    const int64_t* example = ids.data;
    std::vector<Entry> entries;
    entries.reserve(static_cast<size_t>(P));
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
  weights.reserve(static_cast<size_t>(groups));
  for (int64_t n = 0; n < groups; ++n) weights.push_back(static_cast<double>(grouped.size(n)) + 0.25);  // writing the results

  PositionArgs args = {};
  args.sums = options.dtype() == at::kDouble ? DType::f64 : DType::f32;
  args.T = T, args.K = K, args.starts = grouped.starts.data(), args.order = example_ids ? grouped.order.data() : nullptr;
  args.b = operand(b), args.mean = means.data(), args.rstd = rstds.data();
  if (x) args.x = operand(*x), args.scale = scale.mutable_data_ptr();
  if (bias) args.bias = sum.mutable_data_ptr();
  const int64_t workers = workers_for(P * K * (x ? 2 : 1));
  args.block = block_for(K, groups, workers, 0);
  const std::vector<int64_t> bounds = balanced(weights, args.blocks(), workers);
  const Kernels& k = *active();
  run_workers(workers, workers, k.scale_bias_workspace(args), [&](int64_t w, int64_t, int64_t, void* workspace) {
    k.scale_bias_worker(args, bounds[w], bounds[w + 1], workspace);
  });
  return {scale, sum};
}

namespace {

// The inputs of the sums over coordinates of one weight, and the number of workers among which they are divided.
struct Coordinates {
  static constexpr int64_t block = 1 << 14;  // a multiple of the kernel's block size for every type
  Held grad_sum, abs_sum, sq_sum, direction;
  CoordinateArgs args;
  int64_t count, blocks, workers;

  Coordinates(const Tensor& g, const Tensor& a, const Tensor& q, const OptionalTensor& u)
      : grad_sum("grad_sum", g, g.options(), g.numel()),
        abs_sum("abs_sum", a, g.options(), g.numel()),
        sq_sum("sq_sum", q, g.options(), g.numel()),
        direction("direction", u, g.options(), g.numel()),
        args{dtype_of(g), grad_sum.data(), abs_sum.data(), sq_sum.data(), direction.data()},
        count(g.numel()),
        blocks((count + block - 1) / block),
        workers(worker_count(blocks)) {}
};

// Computes the eight sums of CoordinateArgs for each weight, (weights, 8). Each weight is divided into parts independently of the
// others, so that its sums have the same bits as in a call of its own. The parts of all weights are distributed among the workers.
void add_coordinates(const std::vector<Coordinates>& weights, double* out) {
  std::vector<std::pair<size_t, int64_t>> parts;  // (weight, worker)
  std::vector<double> sizes;
  int64_t blocks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Coordinates& weight = weights[i];
    blocks += weight.blocks;
    for (int64_t w = 0; w < weight.workers; ++w)
      parts.emplace_back(i, w), sizes.push_back(static_cast<double>(weight.count / weight.workers) + 64);  // 64: starting it
  }
  const Tensor partial = fresh({static_cast<int64_t>(parts.size()), 8}, at::kDouble);
  double* sums = partial.mutable_data_ptr<double>();
  std::fill_n(sums, partial.numel(), 0.0);
  const int64_t workers = worker_count(std::min(blocks, static_cast<int64_t>(parts.size())));
  const std::vector<int64_t> bounds = balanced(sizes, 1, workers);
  const Kernels& k = *active();
  run_workers(workers, workers, 0, [&](int64_t worker, int64_t, int64_t, void*) {
    for (int64_t part = bounds[worker]; part < bounds[worker + 1]; ++part) {
      const auto [i, w] = parts[part];
      const Coordinates& weight = weights[i];
      const int64_t begin = weight.blocks * w / weight.workers, end = weight.blocks * (w + 1) / weight.workers;
      k.coordinates_worker(weight.args, begin * Coordinates::block, std::min(end * Coordinates::block, weight.count),
                           sums + 8 * part);
    }
  });
  int64_t first = 0;
  for (const Coordinates& weight : weights) {
    // For up to four workers every order of addition used here gives the same bits. For more workers torch adds them.
    if (weight.workers > 4) {
      const Tensor total = partial.narrow(0, first, weight.workers).sum(0);
      std::copy_n(total.const_data_ptr<double>(), 8, out);
    } else {
      std::fill_n(out, 8, 0.0);
      for (int64_t i = 0; i < 8 * weight.workers; ++i) out[i % 8] += sums[8 * first + i];
    }
    first += weight.workers, out += 8;
  }
}

// Checks everything that the public functions promise. zk.coordinate_sums_of_many relies on this check and looks for the exact
// error only if it fails.
void check_sums(const Tensor& g, const Tensor& a, const Tensor& q, const OptionalTensor& u) {
  check_elements("grad_sum", g.sizes());
  for (const Tensor& x : {g, a, q})
    TORCH_CHECK(x.device().is_cpu() && x.sizes() == g.sizes() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                "grad_sum, abs_sum, sq_sum: expected float32 or float64 sums of one shape on the CPU, got ", x.scalar_type(), " ",
                x.sizes());
  if (!u) return;
  dtype_of(*u);  // rejects all but the floating-point dtypes
  TORCH_CHECK(u->device().is_cpu() && u->sizes() == g.sizes(), "direction: expected the shape of the sums, ", g.sizes(),
              ", on the CPU, got ", u->sizes());
}

// Returns a tensor of shape (8,).
Tensor coordinate_sums(const Tensor& grad_sum, const Tensor& abs_sum, const Tensor& sq_sum, const OptionalTensor& direction) {
  const Plain plain;
  check_sums(grad_sum, abs_sum, sq_sum, direction);
  const Tensor out = fresh({8}, at::kDouble);
  std::vector<Coordinates> weights;
  weights.emplace_back(grad_sum, abs_sum, sq_sum, direction);
  add_coordinates(weights, out.mutable_data_ptr<double>());
  return out;
}

// Returns a tensor of shape (weights, 8). There is either no list of directions, or an optional direction for each weight.
Tensor coordinate_sums_of_lists(at::TensorList grad_sums, at::TensorList abs_sums, at::TensorList sq_sums,
                                const c10::List<OptionalTensor>& directions) {
  const Plain plain;
  const size_t count = grad_sums.size();
  TORCH_CHECK(abs_sums.size() == count && sq_sums.size() == count && (directions.empty() || directions.size() == count),
              "abs_sums, sq_sums, directions: expected ", count, " tensors each, as in grad_sums, got ", abs_sums.size(), ", ",
              sq_sums.size(), " and ", directions.size());
  const Tensor out = fresh({static_cast<int64_t>(count), 8}, at::kDouble);
  std::vector<Coordinates> weights;
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const OptionalTensor direction = directions.empty() ? std::nullopt : directions.get(i);
    check_sums(grad_sums[i], abs_sums[i], sq_sums[i], direction);
    weights.emplace_back(grad_sums[i], abs_sums[i], sq_sums[i], direction);
  }
  add_coordinates(weights, out.mutable_data_ptr<double>());
  return out;
}

}  // namespace

Tensor coordinate_sums_of_many(const std::vector<std::pair<const Sums*, OptionalTensor>>& weights) {
  const Plain plain;
  const Tensor out = fresh({static_cast<int64_t>(weights.size()), 8}, at::kDouble);
  std::vector<Coordinates> found;
  found.reserve(weights.size());
  for (const auto& [sums, direction] : weights) {
    const auto& [grad_sum, abs_sum, sq_sum, l1, sq_norm, dot, abs_dot, gram] = *sums;
    check_sums(grad_sum, abs_sum, sq_sum, direction);
    found.emplace_back(grad_sum, abs_sum, sq_sum, direction);
  }
  add_coordinates(found, out.mutable_data_ptr<double>());
  return out;
}

namespace {

TORCH_LIBRARY_FRAGMENT(zsl_cpu, m) {
  m.def("coordinate_sums(Tensor grad_sum, Tensor abs_sum, Tensor sq_sum, Tensor? direction) -> Tensor", &coordinate_sums);
  m.def("coordinate_sums_of_many(Tensor[] grad_sums, Tensor[] abs_sums, Tensor[] sq_sums, Tensor?[] directions) -> Tensor",
        &coordinate_sums_of_lists);
  m.def(
      "dense_interference(Tensor g, Tensor? direction, bool gram) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &dense_interference);
  m.def(
      "embedding_interference(Tensor ids, Tensor b, Tensor? example_ids, int num_examples, int num_embeddings, int padding_idx, "
      "Tensor? direction, bool gram) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      &embedding_interference);
  m.def(
      "scale_bias_grad(Tensor? x, Tensor b, Tensor? mean, Tensor? rstd, Tensor? example_ids, int num_examples, bool bias) -> "
      "(Tensor, Tensor)",
      &scale_bias_grad);
}

}  // namespace
}  // namespace zsl
