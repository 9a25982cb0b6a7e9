// Runs every kernel of every instruction set of this processor outside torch, for the sanitizers: operands, results and workspaces
// are exactly as large as they must be, what was never written is NaN, and every result is compared with plain loops. Values are
// small integers, so results are exact whatever the order of summation.
//
//   driver [--isa NAME] [--dtype NAME] [--short BYTES]
//
// --short gives the workspaces so many bytes too few: a run that a sanitizer must stop.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

#ifdef ZSL_EMULATE_AMX
int check_amx_instructions();
#endif

namespace {

using namespace zsl;

int64_t short_by = 0;
std::string context;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "MISMATCH %s: %s\n", context.c_str(), what.c_str());
  std::exit(1);
}

// Bytes of their own from the heap, where a sanitizer knows their ends; all 0xFF, which is NaN in every dtype.
class Bytes {
 public:
  explicit Bytes(size_t size) : data_(static_cast<char*>(std::malloc(size))) { std::memset(data_.get(), 0xff, size); }
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char[], Free> data_;
};

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
DType sum_of(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// -2 … 2 as float16: the exponents of 1 and 2 are all it takes.
uint16_t half_bits(double x) { return (x < 0 ? 0x8000 : 0) | (x == 0 ? 0 : std::abs(x) == 1 ? 0x3c00 : 0x4000); }

void put(void* data, DType dtype, int64_t at, double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[at] = value;
      break;
    case DType::f32:
      static_cast<float*>(data)[at] = narrow;
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(bits >> 16);
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[at] = half_bits(value);
      break;
  }
}

int draw(int low, int high) {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return low + static_cast<int>((state >> 33) % static_cast<uint64_t>(high - low + 1));
}

std::vector<double> integers(int64_t count, int low = -1, int high = 1) {
  std::vector<double> x(static_cast<size_t>(count));
  for (double& value : x) value = draw(low, high);
  return x;
}

// A contiguous tensor of sums' dtype: given, or to be written.
struct Matrix {
  DType dtype;
  int64_t count;
  Bytes bytes;

  Matrix(int64_t count, DType dtype) : dtype(dtype), count(count), bytes(static_cast<size_t>(count) * size_of(dtype)) {}
  Matrix(const std::vector<double>& values, DType dtype) : Matrix(static_cast<int64_t>(values.size()), dtype) {
    for (int64_t i = 0; i < count; ++i) put(bytes.get(), dtype, i, values[static_cast<size_t>(i)]);
  }
  double operator[](int64_t i) const {
    return dtype == DType::f64 ? static_cast<const double*>(bytes.get())[i] : static_cast<const float*>(bytes.get())[i];
  }
};

enum class Layout { dense, features_first, spread, shared };

// An (N, T, F) operand of some strides: its values, and memory that ends with its last element.
struct Input {
  int64_t N, T, F;
  std::vector<double> values;
  Operand operand;
  std::unique_ptr<Bytes> bytes;

  Input(int64_t N, int64_t T, int64_t F, DType dtype, Layout layout) : N(N), T(T), F(F), values(integers(N * T * F)) {
    int64_t sn = T * F, st = F, sf = 1;
    if (layout == Layout::features_first) sn = T, st = 1, sf = N * T;
    if (layout == Layout::spread) sf = 3, st = 3 * F + 1, sn = (3 * F + 1) * T + 5;
    if (layout == Layout::shared) sn = 0;
    const bool empty = N * T * F == 0;
    const int64_t count = empty ? 0 : (N - 1) * sn + (T - 1) * st + (F - 1) * sf + 1;
    bytes = std::make_unique<Bytes>(static_cast<size_t>(count) * size_of(dtype));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t f = 0; f < F; ++f) {
          if (layout == Layout::shared) value(n, t, f) = value(0, t, f);
          put(bytes->get(), dtype, n * sn + t * st + f * sf, value(n, t, f));
        }
    operand = {bytes->get(), dtype, sn, st, sf};
  }

  double& value(int64_t n, int64_t t, int64_t f) { return values[static_cast<size_t>((n * T + t) * F + f)]; }
  double value(int64_t n, int64_t t, int64_t f) const { return values[static_cast<size_t>((n * T + t) * F + f)]; }
};

// Every g_i, by loops: (N, O, K). Example n has rows [begin[n], begin[n + 1]) of all examples' positions one after another.
std::vector<double> gradients(const Input& a, const Input& b, const std::vector<int64_t>& begin) {
  const size_t N = begin.size() - 1;
  std::vector<double> g(N * static_cast<size_t>(b.F * a.F));
  for (size_t n = 0; n < N; ++n)
    for (int64_t r = begin[n]; r < begin[n + 1]; ++r)
      for (int64_t o = 0; o < b.F; ++o)
        for (int64_t k = 0; k < a.F; ++k)
          g[(n * static_cast<size_t>(b.F) + static_cast<size_t>(o)) * static_cast<size_t>(a.F) + static_cast<size_t>(k)] +=
              b.value(0, r, o) * a.value(0, r, k);
  return g;
}

// Offsets of N examples with from 0 to `most` rows each, or exactly `most`.
std::vector<int64_t> offsets(int64_t N, int64_t most, bool ragged) {
  std::vector<int64_t> begin(static_cast<size_t>(N + 1));
  for (size_t n = 0; n < static_cast<size_t>(N); ++n) begin[n + 1] = begin[n] + (ragged ? draw(0, static_cast<int>(most)) : most);
  return begin;
}

// Rows added to the gradients, at some features of each example.
struct Added {
  std::vector<int64_t> begin{0}, index;
  std::vector<double> values;
  Matrix matrix;
  AddedRows rows;

  Added(int64_t N, int64_t O, int64_t K, bool any, DType dtype) : matrix(fill(N, O, K, any), dtype) {
    if (any) rows = {begin.data(), index.data(), matrix.bytes.get()};
  }
  Added(const Added&) = delete;

  std::vector<double> fill(int64_t N, int64_t O, int64_t K, bool any) {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t o = 0; any && o < O; ++o)
        if (n != 1 && draw(0, 3) == 0) index.push_back(o);
      begin.push_back(static_cast<int64_t>(index.size()));
    }
    index.shrink_to_fit(), begin.shrink_to_fit();
    return values = integers(static_cast<int64_t>(index.size()) * K);
  }

  void add_to(std::vector<double>& g, int64_t O, int64_t K) const {
    for (size_t n = 0; n + 1 < begin.size(); ++n)
      for (int64_t p = begin[n]; p < begin[n + 1]; ++p)
        for (int64_t k = 0; k < K; ++k) g[(static_cast<int64_t>(n) * O + index[p]) * K + k] += values[p * K + k];
  }
};

double inner(const double* x, const double* y, int64_t count) {
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) sum += x[j] * y[j];
  return sum;
}

double sign(double x) { return (x > 0) - (x < 0); }

template <class Got>
void expect(const char* name, const Got& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i)
    if (!(got[static_cast<int64_t>(i)] == want[i]))
      fail(std::string(name) + "[" + std::to_string(i) + "]: got " + std::to_string(got[static_cast<int64_t>(i)]) + ", expected " +
           std::to_string(want[i]));
}

// A workspace for each worker and a contiguous range of [0, count), as the binding has it; more than one in threads.
void run(int workers, int64_t count, size_t workspace, const std::function<void(int, int64_t, int64_t, void*)>& body) {
  const auto work = [&](int w) {
    const Bytes bytes(workspace - std::min(workspace, static_cast<size_t>(short_by)));
    body(w, count * w / workers, count * (w + 1) / workers, bytes.get());
  };
  std::vector<std::thread> others;
  for (int w = 1; w < workers; ++w) others.emplace_back(work, w);
  work(0);
  for (std::thread& thread : others) thread.join();
}

std::vector<double> total(const std::vector<std::vector<double>>& partials) {
  std::vector<double> sum(partials[0].size());
  for (const auto& partial : partials)
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += partial[i];
  return sum;
}

struct Case {
  int64_t N, T, K, O, tile_o, tile_k;
};

// Examples of T positions each, or with ragged rows; and with the embedding's part of a tied weight.
struct Form {
  const char* name;
  bool ragged, added;
};

class Checks {
 public:
  Checks(const Kernels& kernels, const Case& c, DType dtype, Layout layout, int threads, const Form& form)
      : k_(kernels),
        form_(form),
        begin_(offsets(c.N, c.T, form.ragged)),
        shape_{c.N, c.T, c.K, c.O, c.tile_o, c.tile_k, form.ragged ? begin_.data() : nullptr},
        sums_(sum_of(dtype)),
        threads_(threads),
        M_(plain() ? c.N + 2 : c.N),
        a_(form.ragged ? 1 : c.N, form.ragged ? begin_.back() : c.T, c.K, dtype, layout),
        b_(a_.N, a_.T, c.O, dtype, layout == Layout::shared ? Layout::dense : layout),
        a2_(M_, c.T, c.K, dtype, layout),
        b2_(M_, c.T, c.O, dtype, layout == Layout::shared ? Layout::dense : layout),
        added_(c.N, c.O, c.K, form.added, sums_),
        g_(gradients(a_, b_, begin_)),
        g2_(gradients(a2_, b2_, offsets(M_, c.T, false))),
        u_(integers(size(), -2, 2)),
        u_matrix_(u_, sums_) {
    if (form.ragged) a_.operand.sn = b_.operand.sn = 0;
    added_.add_to(g_, c.O, c.K);
    if (!plain()) g2_ = g_;
    if (form.ragged)
      for (int64_t n = shape_.T = 0; n < c.N; ++n) shape_.T = std::max(shape_.T, shape_.length(n));
  }

  void all() const {
    for (bool direction : {false, true})
      for (bool gram : {false, true}) interference(direction, gram);
    for (bool mix : {false, true}) backward(mix, true, true), backward(mix, true, false);
    backward(true, false, true);
    if (form_.added) return;
    scalars();
    gram(true);
    weighted(false), weighted(true);
    if (form_.ragged) return;
    gram(false);
    if (shape_.N * shape_.T * shape_.K * shape_.O > 0) ghost(true, true), ghost(true, false), ghost(false, false);
  }

 private:
  bool plain() const { return !form_.ragged && !form_.added; }
  int64_t size() const { return shape_.O * shape_.K; }
  const double* g(int64_t n) const { return g_.data() + n * size(); }
  const double* g2(int64_t m) const { return g2_.data() + m * size(); }

  // f(g_ij, j) summed over j, for each example.
  std::vector<double> each_example(const std::function<double(double, int64_t)>& f) const {
    std::vector<double> x(static_cast<size_t>(shape_.N));
    for (int64_t n = 0; n < shape_.N; ++n)
      for (int64_t j = 0; j < size(); ++j) x[static_cast<size_t>(n)] += f(g(n)[j], j);
    return x;
  }

  // f(g_ij, i) summed over the examples, for each coordinate.
  std::vector<double> each_coordinate(const std::function<double(double, int64_t)>& f) const {
    std::vector<double> x(static_cast<size_t>(size()));
    for (int64_t n = 0; n < shape_.N; ++n)
      for (int64_t j = 0; j < size(); ++j) x[static_cast<size_t>(j)] += f(g(n)[j], n);
    return x;
  }

  // The kernels fill blocks on and above the diagonal for one set with itself.
  void expect_gram(const char* name, const std::vector<double>& got, bool self) const {
    const int64_t columns = self ? shape_.N : M_;
    for (int64_t i = 0; i < shape_.N; ++i)
      for (int64_t j = self ? i : 0; j < columns; ++j)
        expect(name, &got[static_cast<size_t>(i * columns + j)], {inner(g(i), self ? g(j) : g2(j), size())});
  }

  void interference(bool direction, bool gram) const {
    const size_t N = static_cast<size_t>(shape_.N);
    const Matrix grad(size(), sums_), abs(size(), sums_), sq(size(), sums_);
    const InterferenceArgs args = {shape_,           a_.operand,      b_.operand,     direction ? u_matrix_.bytes.get() : nullptr,
                                   grad.bytes.get(), abs.bytes.get(), sq.bytes.get(), gram,
                                   added_.rows};
    std::vector<std::vector<double>> l1(threads_, std::vector<double>(N)), norm = l1, dot = l1, abs_dot = l1;
    std::vector<std::vector<double>> pairs(threads_, std::vector<double>(gram ? N * N : 0));
    run(threads_, shape_.tiles(), k_.interference_workspace(args), [&](int w, int64_t begin, int64_t end, void* workspace) {
      k_.interference_worker(args, begin, end, workspace,
                             {l1[w].data(), norm[w].data(), dot[w].data(), abs_dot[w].data(), gram ? pairs[w].data() : nullptr});
    });
    expect("grad_sum", grad, each_coordinate([](double x, int64_t) { return x; }));
    expect("abs_sum", abs, each_coordinate([](double x, int64_t) { return std::abs(x); }));
    expect("sq_sum", sq, each_coordinate([](double x, int64_t) { return x * x; }));
    expect("l1", total(l1).data(), each_example([](double x, int64_t) { return std::abs(x); }));
    expect("sq_norm", total(norm).data(), each_example([](double x, int64_t) { return x * x; }));
    if (direction) {
      expect("dot", total(dot).data(), each_example([&](double x, int64_t j) { return x * u_[j]; }));
      expect("abs_dot", total(abs_dot).data(), each_example([&](double x, int64_t j) { return std::abs(x * u_[j]); }));
    }
    if (gram) expect_gram("interference gram", total(pairs), true);
  }

  // Without the sums: sq_norm, dot and abs_dot alone.
  void scalars() const {
    const InterferenceArgs args = {shape_, a_.operand, b_.operand, u_matrix_.bytes.get(), nullptr, nullptr, nullptr, false, {}};
    std::vector<std::vector<double>> norm(threads_, std::vector<double>(static_cast<size_t>(shape_.N))), dot = norm, abs_dot = norm;
    run(threads_, shape_.tiles(), k_.interference_workspace(args), [&](int w, int64_t begin, int64_t end, void* workspace) {
      k_.interference_worker(args, begin, end, workspace, {nullptr, norm[w].data(), dot[w].data(), abs_dot[w].data(), nullptr});
    });
    expect("sq_norm alone", total(norm).data(), each_example([](double x, int64_t) { return x * x; }));
    expect("dot alone", total(dot).data(), each_example([&](double x, int64_t j) { return x * u_[j]; }));
  }

  GramArgs gram_args(bool self) const {
    return {shape_, self ? shape_.N : M_, a_.operand, b_.operand, self ? a_.operand : a2_.operand, self ? b_.operand : b2_.operand,
            self};
  }

  void gram(bool self) const {
    const GramArgs args = gram_args(self);
    std::vector<std::vector<double>> pairs(threads_, std::vector<double>(static_cast<size_t>(shape_.N * args.M)));
    run(threads_, shape_.tiles(), k_.gram_workspace(args),
        [&](int w, int64_t begin, int64_t end, void* workspace) { k_.gram_worker(args, begin, end, workspace, pairs[w].data()); });
    expect_gram(self ? "gram" : "cross gram", total(pairs), self);
  }

  void ghost(bool self, bool diagonal) const {
    const GramArgs args = gram_args(self);
    const int64_t count = diagonal ? shape_.N : shape_.N * args.M;
    std::vector<std::vector<double>> out(threads_, std::vector<double>(static_cast<size_t>(count)));
    run(threads_, k_.ghost_blocks(args, diagonal), k_.ghost_workspace(args),
        [&](int w, int64_t begin, int64_t end, void* workspace) {
          k_.ghost_worker(args, diagonal, begin, end, workspace, out[w].data());
        });
    if (diagonal)
      expect("ghost norms", total(out).data(), each_example([](double x, int64_t) { return x * x; }));
    else
      expect_gram(self ? "ghost" : "cross ghost", total(out), self);
  }

  void weighted(bool abs) const {
    const std::vector<double> weights = integers(shape_.N, -2, 2), v = integers(shape_.N, -2, 2);
    const Matrix out(size(), sums_), w(weights, DType::f64), abs_w(v, DType::f64);
    const WeightedArgs args = {shape_,
                               a_.operand,
                               b_.operand,
                               static_cast<const double*>(w.bytes.get()),
                               abs ? static_cast<const double*>(abs_w.bytes.get()) : nullptr,
                               abs ? u_matrix_.bytes.get() : nullptr,
                               out.bytes.get()};
    run(threads_, shape_.tiles(), k_.weighted_workspace(args),
        [&](int, int64_t begin, int64_t end, void* workspace) { k_.weighted_worker(args, begin, end, workspace); });
    std::vector<double> want = each_coordinate([&](double x, int64_t n) { return weights[n] * x; });
    const std::vector<double> signed_sum = each_coordinate([&](double x, int64_t n) { return v[n] * std::abs(x); });
    for (size_t j = 0; abs && j < want.size(); ++j) want[j] += sign(u_[j]) * signed_sum[j];
    expect(abs ? "weighted, signed" : "weighted", out, want);
  }

  // With `mix` the gradients of a2, b2 count too; with `rest` all other cotangents are given.
  void backward(bool mix, bool rest, bool want_a) const {
    const int64_t N = shape_.N, R = a_.N * a_.T, K = shape_.K, O = shape_.O, P = static_cast<int64_t>(added_.index.size());
    const std::vector<double> c[3] = {integers(size()), integers(size()), integers(size())};
    const std::vector<double> d[4] = {integers(N), integers(N), integers(N), integers(N)};
    const std::vector<double> mixing = integers(N * M_);
    const Matrix c_grad(c[0], sums_), c_abs(c[1], sums_), c_sq(c[2], sums_), mixed(mixing, DType::f64);
    const Matrix each[4] = {{d[0], DType::f64}, {d[1], DType::f64}, {d[2], DType::f64}, {d[3], DType::f64}};
    const Matrix da(std::vector<double>(static_cast<size_t>(R * K)), sums_),
        db(std::vector<double>(static_cast<size_t>(R * O)), sums_), d_added(P * K, sums_);
    const auto given = [&](const Matrix& x) { return rest ? x.bytes.get() : nullptr; };
    const auto doubles = [&](const Matrix& x) { return static_cast<const double*>(given(x)); };
    const BackwardArgs args = {shape_,
                               a_.operand,
                               b_.operand,
                               given(u_matrix_),
                               given(c_grad),
                               given(c_abs),
                               given(c_sq),
                               doubles(each[0]),
                               doubles(each[1]),
                               doubles(each[2]),
                               doubles(each[3]),
                               mix ? static_cast<const double*>(mixed.bytes.get()) : nullptr,
                               M_,
                               plain() ? a2_.operand : a_.operand,
                               plain() ? b2_.operand : b_.operand,
                               added_.rows,
                               want_a && form_.added ? d_added.bytes.get() : nullptr,
                               want_a ? da.bytes.get() : nullptr,
                               db.bytes.get()};
    const Bytes shared(k_.backward_shared(args));
    const size_t workspace = k_.backward_workspace(args);
    for (int64_t tile = 0; tile < shape_.tiles(); ++tile) {
      if (mix)
        run(threads_, M_, workspace,
            [&](int, int64_t begin, int64_t end, void* ws) { k_.backward_mix_worker(args, tile, begin, end, ws, shared.get()); });
      run(threads_, N, workspace,
          [&](int, int64_t begin, int64_t end, void* ws) { k_.backward_worker(args, tile, begin, end, ws, shared.get()); });
    }
    std::vector<double> want_da(static_cast<size_t>(R * K)), want_db(static_cast<size_t>(R * O));
    std::vector<double> want_added(static_cast<size_t>(P * K));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t o = 0; o < O; ++o)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t j = o * K + k;
          const double x = g(n)[j], u = u_[j];
          double s = 0;
          if (rest)
            s = c[0][j] + sign(x) * (c[1][j] + d[0][n]) + 2 * x * (c[2][j] + d[1][n]) + u * d[2][n] +
                std::abs(u) * sign(x) * d[3][n];
          for (int64_t m = 0; mix && m < M_; ++m) s += mixing[n * M_ + m] * g2(m)[j];
          for (int64_t r = begin_[n]; r < begin_[n + 1]; ++r) {
            want_da[r * K + k] += b_.value(0, r, o) * s;
            want_db[r * O + o] += a_.value(0, r, k) * s;
          }
          for (int64_t p = added_.begin[n]; p < added_.begin[n + 1]; ++p)
            if (added_.index[p] == o) want_added[p * K + k] = s;
        }
    if (want_a) expect("da", da, want_da);
    if (want_a && form_.added) expect("d_added", d_added, want_added);
    expect("db", db, want_db);
  }

  const Kernels& k_;
  Form form_;
  std::vector<int64_t> begin_;
  Shape shape_;
  DType sums_;
  int threads_;
  int64_t M_;
  Input a_, b_, a2_, b2_;
  Added added_;
  std::vector<double> g_, g2_, u_;
  Matrix u_matrix_;
};

// Quotients and roots are exact too: A is a power of two, Q one of four.
void coordinates(const Kernels& kernels, DType dtype, bool direction, int64_t count) {
  const std::vector<double> g = integers(count, -2, 2), u = integers(count, -2, 2);
  std::vector<double> a(static_cast<size_t>(count)), q = a, want(8);
  for (size_t j = 0; j < a.size(); ++j) {
    const double root = draw(0, 1) * (1 << draw(0, 2));
    a[j] = draw(0, 3) ? 1 << draw(0, 3) : 0, q[j] = root * root;
    const double terms[] = {a[j] != 0 ? 1.0 : 0.0,
                            a[j] != 0 ? std::abs(g[j]) / a[j] : std::abs(g[j]),
                            a[j] != 0 ? root / a[j] : root,
                            g[j] * g[j],
                            q[j],
                            std::abs(g[j] * u[j]),
                            a[j] * std::abs(u[j]),
                            root * std::abs(u[j])};
    for (int i = 0; i < (direction ? 8 : 5); ++i) want[i] += terms[i];
  }
  const Matrix grad(g, dtype), abs(a, dtype), sq(q, dtype), along(u, dtype);
  double out[8] = {};
  kernels.coordinates_worker({dtype, grad.bytes.get(), abs.bytes.get(), sq.bytes.get(), direction ? along.bytes.get() : nullptr}, 0,
                             count, out);
  expect("coordinates", out, want);
}

// Positions in groups of some order, as the binding gives them: some groups are empty, some positions in no group.
struct Grouping {
  std::vector<int64_t> starts = {0}, order;

  Grouping(int64_t positions, int64_t groups, bool empty_too) {
    std::vector<std::vector<int64_t>> members(static_cast<size_t>(groups));
    for (int64_t p = 0; p < positions; ++p) {
      const int g = draw(0, static_cast<int>(groups));
      if (g < groups) members[static_cast<size_t>(g)].push_back(p);
    }
    for (const auto& member : members) {
      if (member.empty() && !empty_too) continue;
      order.insert(order.end(), member.begin(), member.end());
      starts.push_back(static_cast<int64_t>(order.size()));
    }
  }
  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
};

// Scales and biases over groups of positions, and the sums over the rows that they are. A block is less than K where K is not
// small.
class RowChecks {
 public:
  RowChecks(const Kernels& kernels, int64_t N, int64_t T, int64_t K, DType dtype, Layout layout, int threads)
      : k_(kernels),
        N_(N),
        T_(T),
        K_(K),
        sums_(sum_of(dtype)),
        threads_(threads),
        x_(N, T, K, dtype, layout),
        b_(N, T, K, dtype, layout) {}

  void all() const {
    for (bool ordered : {false, true}) {
      for (int parts : {1, 2, 3}) scale_bias(ordered, parts & 1, parts & 2);
      for (bool direction : {false, true})
        for (bool gram : {false, true}) rows(ordered, direction, gram);
    }
  }

 private:
  double b(int64_t p, int64_t k) const { return b_.value(p / T_, p % T_, k); }
  double x(int64_t p, int64_t k) const { return x_.value(p / T_, p % T_, k); }

  PositionArgs position_args(const Grouping& grouping, bool ordered) const {
    PositionArgs args = {};
    args.sums = sums_, args.T = T_, args.K = K_, args.block = K_ > 32 ? 32 : std::max<int64_t>(K_, 1);
    args.starts = grouping.starts.data(), args.order = ordered ? grouping.order.data() : nullptr;
    args.b = b_.operand;
    return args;
  }

  // Without an order every example is a group.
  Grouping grouping(bool ordered, bool empty_too) const {
    Grouping found(N_ * T_, 3, empty_too);
    if (ordered) return found;
    found.starts = {0}, found.order.clear();
    for (int64_t n = 0; n < N_; ++n) found.starts.push_back((n + 1) * T_);
    for (int64_t p = 0; p < N_ * T_; ++p) found.order.push_back(p);
    return found;
  }

  void scale_bias(bool ordered, bool scale, bool bias) const {
    const Grouping groups = grouping(ordered, true);
    const std::vector<double> means = integers(N_ * T_), rstds = integers(N_ * T_, 1, 2);
    const Matrix mean(means, sums_), rstd(rstds, sums_);
    const Matrix scale_out(groups.count() * K_, sums_), bias_out(groups.count() * K_, sums_);
    PositionArgs args = position_args(groups, ordered);
    if (scale) args.x = x_.operand, args.mean = mean.bytes.get(), args.rstd = rstd.bytes.get(), args.scale = scale_out.bytes.get();
    if (bias) args.bias = bias_out.bytes.get();
    run(threads_, groups.count() * args.blocks(), k_.scale_bias_workspace(args),
        [&](int, int64_t begin, int64_t end, void* ws) { k_.scale_bias_worker(args, begin, end, ws); });
    std::vector<double> want_scale(static_cast<size_t>(groups.count() * K_)), want_bias = want_scale;
    for (int64_t g = 0; g < groups.count(); ++g)
      for (int64_t i = groups.starts[g]; i < groups.starts[g + 1]; ++i)
        for (int64_t k = 0; k < K_; ++k) {
          const int64_t p = groups.order[i];
          want_scale[g * K_ + k] += b(p, k) * (x(p, k) - means[p]) * rstds[p];
          want_bias[g * K_ + k] += b(p, k);
        }
    if (scale) expect("scale", scale_out, want_scale);
    if (bias) expect("bias", bias_out, want_bias);
  }

  void rows(bool ordered, bool direction, bool gram) const {
    // Several rows, of examples that are given; or one row, whose positions are their own examples'.
    Grouping groups(N_ * T_, ordered ? 3 : 0, false);
    std::vector<int64_t> example(static_cast<size_t>(N_ * T_));
    for (int64_t r = 0; r < groups.count(); ++r)  // ascending in each row
      for (int64_t i = groups.starts[r]; i < groups.starts[r + 1]; ++i)
        example[groups.order[i]] = (i - groups.starts[r]) * 5 / (groups.starts[r + 1] - groups.starts[r]);
    if (!ordered) {
      for (int64_t p = 0; p < N_ * T_; ++p) groups.order.push_back(p), example[p] = p / T_;
      if (N_ * T_ > 0) groups.starts.push_back(N_ * T_);
    }
    const int64_t U = groups.count(), members = ordered ? 5 : N_;
    const std::vector<double> u = integers(U * K_, -2, 2);
    const Matrix along(u, sums_), grad(U * K_, sums_), abs(U * K_, sums_), sq(U * K_, sums_);
    RowArgs args = {};
    args.rows = position_args(groups, ordered);
    args.examples = ordered ? example.data() : nullptr, args.N = args.most_examples = members, args.gram = gram;
    args.u = direction ? along.bytes.get() : nullptr;
    args.grad_sum = grad.bytes.get(), args.abs_sum = abs.bytes.get(), args.sq_sum = sq.bytes.get();
    std::vector<std::vector<double>> scalars(threads_, std::vector<double>(4 * members)), pairs(threads_);
    for (auto& pair : pairs) pair.resize(gram ? members * members : 0);
    run(threads_, U * args.rows.blocks(), k_.row_interference_workspace(args), [&](int w, int64_t begin, int64_t end, void* ws) {
      double* mine = scalars[w].data();
      k_.row_interference_worker(args, begin, end, ws,
                                 {mine, mine + members, mine + 2 * members, mine + 3 * members, pairs[w].data()});
    });
    std::vector<double> g(static_cast<size_t>(members * U * K_)), want[3], want_scalars(4 * members);
    for (int64_t r = 0; r < U; ++r)
      for (int64_t i = groups.starts[r]; i < groups.starts[r + 1]; ++i)
        for (int64_t k = 0; k < K_; ++k) g[(example[groups.order[i]] * U + r) * K_ + k] += b(groups.order[i], k);
    for (auto& sum : want) sum.resize(static_cast<size_t>(U * K_));
    for (int64_t m = 0; m < members; ++m)
      for (int64_t j = 0; j < U * K_; ++j) {
        const double v = g[m * U * K_ + j], p = direction ? v * u[j] : 0;
        want[0][j] += v, want[1][j] += std::abs(v), want[2][j] += v * v;
        want_scalars[m] += std::abs(v), want_scalars[members + m] += v * v;
        want_scalars[2 * members + m] += p, want_scalars[3 * members + m] += std::abs(p);
      }
    expect("rows' grad_sum", grad, want[0]);
    expect("rows' abs_sum", abs, want[1]);
    expect("rows' sq_sum", sq, want[2]);
    expect("rows' scalars", total(scalars).data(), want_scalars);
    const std::vector<double> products = total(pairs);
    for (int64_t m = 0; gram && m < members; ++m)
      for (int64_t j = m; j < members; ++j)
        expect("rows' gram", products.data() + m * members + j, {inner(g.data() + m * U * K_, g.data() + j * U * K_, U * K_)});
  }

  const Kernels& k_;
  int64_t N_, T_, K_;
  DType sums_;
  int threads_;
  Input x_, b_;
};

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {kernels_generic()};
  if (kernels_neon()) found.push_back(kernels_neon());
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(kernels_avx2());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      found.push_back(kernels_avx512());
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(kernels_avx512_bf16());
      if (kernels_amx()) found.push_back(kernels_amx());
    }
  }
#endif
#ifdef ZSL_EMULATE_AMX
  found.push_back(kernels_amx_emulated());
#endif
  return found;
}

// N, T, K, O and the tile. One number; off every edge, in several tiles; on the register tiles; in tiles that are not whole
// register tiles; past one chunk of positions and two; a whole register tile of positions; rows past a ghost block; past two runs
// of examples; past one chunk in register tiles below each other; a few examples to a chunk; nothing in each dimension.
constexpr Case cases[] = {
    {1, 1, 1, 1, 1, 1},         {3, 5, 70, 29, 12, 32}, {4, 16, 64, 24, 24, 64}, {5, 3, 40, 25, 7, 19},
    {2, 257, 17, 7, 7, 17},     {1, 513, 9, 5, 5, 9},   {9, 23, 33, 13, 13, 33}, {3, 12, 45, 31, 31, 45},
    {3, 2, 300, 260, 192, 288}, {0, 4, 5, 6, 6, 5},     {130, 2, 9, 5, 5, 9},    {2, 300, 40, 37, 37, 40},
    {11, 70, 35, 40, 40, 35},   {2, 0, 5, 6, 6, 5},     {2, 3, 0, 6, 6, 1},      {2, 3, 5, 0, 1, 5},
};
constexpr Form forms[] = {{"plain", false, false}, {"ragged", true, false}, {"added rows", false, true}, {"both", true, true}};
constexpr const char* dtypes[] = {"f32", "bf16", "f16", "f64"};
constexpr const char* layouts[] = {"dense", "features first", "spread", "shared"};

}  // namespace

int main(int argc, char** argv) {
  std::string only, only_dtype;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!std::strcmp(argv[i], "--isa")) only = argv[i + 1];
    if (!std::strcmp(argv[i], "--dtype")) only_dtype = argv[i + 1];
    if (!std::strcmp(argv[i], "--short")) short_by = std::atoll(argv[i + 1]);
  }
  int runs = 0;
#ifdef ZSL_EMULATE_AMX
  std::printf("%d tiles compared with the processor's\n", check_amx_instructions());
#endif
  for (const Kernels* kernels : supported()) {
    if (!only.empty() && only != kernels->isa) continue;
    for (int dtype = 0; dtype < 4; ++dtype) {
      if (!only_dtype.empty() && only_dtype != dtypes[dtype]) continue;
      for (const Case& c : cases)
        for (int layout = 0; layout < 4; ++layout) {
          // The large case goes through each dtype and layout once.
          if (c.K * c.O > 10000 && layout != dtype) continue;
          const int threads = 1 + (layout + dtype) % 2;
          for (const Form& form : forms) {
            // Each case goes through the other forms once; ragged rows are of no shared input.
            if (&form != forms && layout != (dtype + &form - forms) % 3) continue;
            context = std::string(kernels->isa) + " " + dtypes[dtype] + " " + layouts[layout] + ", " + std::to_string(threads) +
                      " threads, N, T, K, O = " + std::to_string(c.N) + ", " + std::to_string(c.T) + ", " + std::to_string(c.K) +
                      ", " + std::to_string(c.O);
            context += std::string(", ") + form.name;
            Checks(*kernels, c, static_cast<DType>(dtype), static_cast<Layout>(layout), threads, form).all();
            ++runs;
          }
          // Every dtype and every layout once.
          if (layout == dtype)
            RowChecks(*kernels, c.N, c.T, c.K, static_cast<DType>(dtype), static_cast<Layout>(layout), threads).all();
        }
      // More examples than are added in one chain.
      for (int64_t N : {64, 65, 130}) RowChecks(*kernels, N, 1, 40, static_cast<DType>(dtype), Layout::spread, 2).all();
      for (int64_t count : {0, 1, 7, 64, 1000, 5000})
        for (bool direction : {false, true})
          if (dtype == 0 || dtype == 3) coordinates(*kernels, static_cast<DType>(dtype), direction, count);
    }
    std::printf("%s ok\n", kernels->isa);
  }
  std::printf("%d runs\n", runs);
  return runs == 0;
}
