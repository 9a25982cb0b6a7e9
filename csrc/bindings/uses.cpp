// Runs the known uses of weights under a probe without Python.
//
// An autograd node's backward pass computes a weight's gradient together with its statistics and stores these with the weight. This
// fast path covers the plain case: the use is the weight's only one in the pass, and its rows are (N, T, ·) in order. On the CPU
// this file calls the kernels (short_way). On other devices it repeats the calls that Python has recorded (recorded_way). In all
// other cases the node calls the rule's Python function (long_way), so that no rule is written twice.
//
// Python (python/zerosum/probe) decides which uses may take the fast path. Before a pass it says which uses are regular and what
// each weight requires.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"
#include "recorded.h"

namespace zsl {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A Python object that a node holds. Autograd threads may free nodes, also after the interpreter has shut down.
class Object {
 public:
  explicit Object(py::object object) : pointer_(object.release().ptr()) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    Py_XDECREF(pointer_);
  }
  py::handle get() const { return pointer_; }

 private:
  PyObject* pointer_;
};

// The state that all weights of a probe share.
struct State {
  int64_t epoch = 0;         // number of the epoch: the forward code that runs between two backward passes
  bool at_once = false;      // whether a backward pass is running in which regular uses may be computed at once
  int64_t examples = 0;      // number of examples of that pass
  int64_t setting = 0;       // torch's setting for matrix products, where calls are recorded
  bool forward = false;      // whether the training's forward pass is running, in the epoch that its first use began
  unsigned long thread = 0;  // the thread of that forward pass
  std::string regular;       // for each use of the epoch, in order: whether its rows are regular
  bool is_regular(size_t use) const { return use < regular.size() && regular[use]; }
};

// The sums of the gradient that a weight's only use has computed. Python makes tensors of them when they are read.
struct Left {
  Sums sums;
  OptionalTensor direction;  // the direction of dot and abs_dot
  const Tensor& grad_sum() const { return std::get<0>(sums); }
};

struct Weight {
  explicit Weight(std::shared_ptr<State> state) : state(std::move(state)) {}

  std::shared_ptr<State> state;
  bool single = false;                   // it has had one use in some pass and never more than one
  bool refused = false;                  // nothing is to be computed for it, or not here
  bool barred = false;                   // refused until its memory layout changes
  int64_t alone = -1;                    // the epoch in which one use was assumed to be the only one
  int64_t gathered = -1, deferred = -1;  // the epochs in which uses went through its node, or in which its statistics come late
  OptionalTensor direction;
  bool gram = false;
  std::vector<int64_t> sizes, strides;  // its memory layout at the last check
  int64_t offset = -1;

  // The results of the last pass: the sums of a gradient, and the address of that gradient.
  bool waiting = false, arrived = false;
  bool merges = false;  // whether earlier passes of the block have left sums, to whose memory autograd is about to add
  Sums sums;
  std::unique_ptr<Object> owner;  // a weak reference
  const void* place = nullptr;
  uint32_t version = 0;

  // Starts a block. Returns whether the parameter has the same memory layout as at the start of the previous block.
  bool renew(const Tensor& like, OptionalTensor along, bool with_gram, bool merging) {
    direction = std::move(along), gram = with_gram, merges = merging, refused = barred;
    drop();
    if (like.storage_offset() == offset && like.sizes() == at::IntArrayRef(sizes) && like.strides() == at::IntArrayRef(strides))
      return true;
    sizes = like.sizes().vec(), strides = like.strides().vec(), offset = like.storage_offset();
    return false;
  }

  // Returns whether to assume that a use is the only one of this epoch.
  bool stands_alone() const {
    const int64_t epoch = state->epoch;
    return single && alone != epoch && gathered != epoch && deferred != epoch;
  }
  bool ready() const { return !refused && deferred != state->epoch && !waiting; }

  // Stores the sums and returns the gradient. The gradient is another tensor with the same memory and version, because autograd
  // takes over a tensor that has no other references.
  Tensor keep(Sums found, at::ScalarType dtype) {
    sums = std::move(found);
    const Tensor& total = std::get<0>(sums);
    Tensor grad = total;
    if (total.scalar_type() != dtype) {
      grad = total.to(dtype);
    } else {
      grad = Tensor(total.unsafeGetTensorImpl()->shallow_copy_and_detach(total.unsafeGetTensorImpl()->version_counter(), false));
    }
    place = grad.const_data_ptr(), version = static_cast<uint32_t>(grad._version());
    waiting = true, arrived = false;
    return grad;
  }

  // The gradient hook. It returns whether the gradient that reaches the parameter is exactly the one that a use has computed.
  bool arrives(const Tensor& grad) {
    if (!waiting || grad.layout() != at::kStrided) return false;
    arrived = !grad.numel() || (grad.const_data_ptr() == place && static_cast<uint32_t>(grad._version()) == version);
    return arrived;
  }

  void drop() {
    waiting = arrived = false;
    sums = {};
  }
};

using Weights = std::array<std::shared_ptr<Weight>, 2>;

enum class Kind { linear, addmm, layer_norm };

// How the backward pass of a call takes the fast path: on the CPU with a tile of the product, on other devices with recorded calls.
struct Plan {
  int64_t examples = -1, tile_o = 0, tile_k = 0, threads = 0, setting = 0;
  const Kernels* kernels = nullptr;
  std::shared_ptr<Recorded> product;  // operands: a, b and a direction
  // For a bias the operands are the output's gradient and a direction. For a norm they are its input, the output's gradient, the
  // means, the reciprocal standard deviations, and one direction each for scale and shift.
  std::shared_ptr<Recorded> vectors;
  bool is_for(int64_t E, const State& state) const {
    return examples == E && threads == at::get_num_threads() && kernels == active() && setting == state.setting;
  }
};

// A call that has been seen before.
struct Known {
  Kind kind;
  std::shared_ptr<State> state;
  Weights weights;
  std::array<at::ScalarType, 2> dtypes;    // dtypes of the weights
  std::optional<at::ScalarType> autocast;  // dtype to which the products' operands are cast
  Plan plan;
  std::unique_ptr<Object> backward;  // (site, grad, saved, needs) -> gradients
};

// One use of weights: the state of its node, apart from tensors.
struct Use : torch::CustomClassHolder {
  Use(std::shared_ptr<Known> known, py::object site, size_t index) : known(std::move(known)), site(std::move(site)), index(index) {
    epoch = this->known->state->epoch;
  }
  std::shared_ptr<Known> known;
  Object site;
  size_t index;
  int64_t epoch;
};
using UsePtr = c10::intrusive_ptr<Use>;

bool is_plain(const Tensor& x) {
  using at::DispatchKey;
  constexpr c10::DispatchKeySet special(
      {DispatchKey::Python, DispatchKey::FuncTorchBatched, DispatchKey::Batched, DispatchKey::Negative, DispatchKey::Conjugate});
  return (x.is_cpu() || x.is_cuda()) && x.layout() == at::kStrided && !x.key_set().has_any(special);
}

// Reshapes x to (E, T, F).
Tensor rows(const Tensor& x, int64_t E) {
  if (x.dim() == 3 && x.size(0) == E) return x;
  const int64_t F = x.size(-1), lead = F ? x.numel() / F : c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  return x.reshape({E, E ? lead / E : 0, F});
}

// Returns whether the strides are those of newly allocated memory, including dimensions of size one, whose strides are arbitrary.
bool in_order(const Tensor& x) {
  int64_t stride = 1;
  for (int64_t d = x.dim() - 1; d >= 0; stride *= x.size(d--))
    if (x.stride(d) != stride) return false;
  return true;
}

// Returns whether this use may be computed at once.
bool at_once(const Use& use, const Tensor& grad, const variable_list& saved, bool first, bool second) {
  const State& state = *use.known->state;
  if (!state.at_once || use.epoch != state.epoch || !state.is_regular(use.index) || at::GradMode::is_enabled() ||
      c10::impl::TorchDispatchModeTLS::any_modes_set())
    return false;
  const auto plain = [&](const Tensor& x) { return !x.defined() || is_plain(x); };
  if (!is_plain(grad) || !std::all_of(saved.begin(), saved.end(), plain)) return false;
  const Weights& weights = use.known->weights;
  return (!first || (weights[0] && weights[0]->ready())) && (!second || (weights[1] && weights[1]->ready()));
}

// Returns whether this use may be computed at once, on the CPU and without Python.
bool short_way(const Use& use, const Tensor& grad, const variable_list& saved, bool first, bool second) {
  if (!grad.is_cpu() || (grad.scalar_type() != at::kFloat && grad.scalar_type() != at::kDouble)) return false;
  const auto same = [&](const Tensor& x) { return !x.defined() || (x.is_cpu() && x.scalar_type() == grad.scalar_type()); };
  if (!std::all_of(saved.begin(), saved.end(), same) || !at_once(use, grad, saved, first, second)) return false;
  const Plan& plan = use.known->plan;
  return use.known->kind == Kind::layer_norm || !first ||
         (plan.tile_o > 0 && plan.is_for(use.known->state->examples, *use.known->state));
}

Tensor along(const std::shared_ptr<Weight>& weight, bool flat) {
  if (!weight || !weight->direction) return {};
  return flat ? weight->direction->reshape(-1) : *weight->direction;
}

// Returns the eight sums that start at result k of a recorded call.
Sums sums_of(const Recorded::Results& found, size_t k) {
  return {found[k], found[k + 1], found[k + 2], found[k + 3], found[k + 4], found[k + 5], found[k + 6], found[k + 7]};
}

// Returns the gradients that the rule's Python function computes.
std::array<Tensor, 3> long_way(const Use& use, const Tensor& grad, const variable_list& saved, const std::array<bool, 3>& needs) {
  py::gil_scoped_acquire gil;
  py::tuple tensors(saved.size());
  for (size_t k = 0; k < saved.size(); ++k) tensors[k] = saved[k].defined() ? py::cast(saved[k]) : py::none();
  const py::object found = py::reinterpret_borrow<py::object>(use.known->backward->get())(
      use.site.get(), grad, tensors, py::make_tuple(needs[0], needs[1], needs[2]));
  const py::tuple each = py::cast<py::tuple>(found);
  std::array<Tensor, 3> grads;
  for (size_t k = 0; k < 3; ++k)
    if (!each[k].is_none()) grads[k] = py::cast<Tensor>(each[k]);
  return grads;
}

Tensor bias_gradient(Weight& weight, const Tensor& each, const Tensor& bias) {
  const OptionalTensor u = weight.direction ? OptionalTensor(weight.direction->reshape(-1)) : std::nullopt;
  return weight.keep(dense_interference(each, u, weight.gram), bias.scalar_type());
}

std::array<bool, 3> wanted(AutogradContext* ctx, bool third) {
  return {ctx->needs_input_grad(0), ctx->needs_input_grad(1), third && ctx->needs_input_grad(2)};
}

const Use& use_of(AutogradContext* ctx) { return *static_cast<Use*>(ctx->saved_data.at("use").toCapsule().get()); }

// The node of F.linear, and of addmm and matmul, whose matrix is transposed.
struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                        const Tensor& anchor, const UsePtr& use) {
    ctx->saved_data.emplace("use", at::IValue::make_capsule(use));
    ctx->saved_data.emplace("bias", bias.has_value());
    const bool addmm = use->known->kind == Kind::addmm;
    const auto dtype = use->known->autocast;
    Tensor w = weight;
    OptionalTensor c = bias;
    if (dtype) {
      // The original weight is the node's operand, so that its gradient is not rounded. The saved copy has the lower precision.
      const at::AutoDispatchBelowADInplaceOrView below;
      w = lower(weight, *dtype);
      if (bias) c = lower(*bias, *dtype);
      ctx->saved_data.emplace("weight", weight);
    }
    ctx->save_for_backward({x, w});
    if (addmm || in_order(x)) {
      const at::AutoDispatchBelowADInplaceOrView below;
      return addmm ? at::addmm(*c, x, w) : at::linear(x, w, c);
    }
    // With other strides, torch's algorithm depends on whether the weight's transpose requires a gradient. That is unknown below
    // autograd.
    if (dtype && weight.requires_grad()) w = w.detach().set_requires_grad(true);
    const Tensor y = at::linear(x, w, c);
    return y.is_view() ? at::_unsafe_view(y, y.sizes()) : y;  // the result may be written to, so it must not be a view
  }

  static Tensor lower(const Tensor& x, at::ScalarType dtype) { return x.scalar_type() == at::kDouble ? x : x.to(dtype); }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const Use& use = use_of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = given[0], &x = saved[0], &weight = saved[1];
    const auto needs = wanted(ctx, ctx->saved_data.at("bias").toBool());
    const Known& known = *use.known;
    const bool transposed = known.kind == Kind::addmm;
    const auto grad_of_x = [&] { return needs[0] ? at::matmul(grad, transposed ? weight.mT() : weight) : Tensor(); };
    if (short_way(use, grad, saved, needs[1], needs[2])) {
      const Plain plain;
      const int64_t E = known.state->examples;
      Tensor grad_weight, grad_bias;
      const Tensor grad_x = grad_of_x(), b = rows(grad, E);
      if (needs[1]) {
        const Tensor a = rows(x, E);
        Weight& w = *known.weights[0];
        Sums sums = interference(transposed ? b : a, transposed ? a : b, w.direction, w.gram, known.plan.tile_o, known.plan.tile_k,
                                 {}, {}, {}, {});
        grad_weight = w.keep(std::move(sums), weight.scalar_type());
      }
      if (needs[2]) {
        Tensor each = std::get<1>(scale_bias_grad({}, b, {}, {}, {}, E, true));
        grad_bias = bias_gradient(*known.weights[1], each, grad);
      }
      return {grad_x, grad_weight, grad_bias, Tensor(), Tensor()};
    }
    const auto found = recorded_way(use, grad, saved, needs, transposed);
    if (found) {
      const Plain plain;
      return {grad_of_x(), (*found)[0], (*found)[1], Tensor(), Tensor()};
    }
    variable_list tensors = saved;
    const auto whole = ctx->saved_data.find("weight");
    if (whole != ctx->saved_data.end() && at::GradMode::is_enabled())  // to be differentiated again
      tensors[1] = lower(whole->second.toTensor(), *known.autocast);
    const auto grads = long_way(use, grad, tensors, needs);
    return {grads[0], grads[1], grads[2], Tensor(), Tensor()};
  }

  // Returns the gradients of weight and bias from recorded calls, if there are recorded calls that fit these tensors.
  static std::optional<std::array<Tensor, 2>> recorded_way(const Use& use, const Tensor& grad, const variable_list& saved,
                                                           const std::array<bool, 3>& needs, bool transposed) {
    const Known& known = *use.known;
    const Plan& plan = known.plan;
    if ((needs[1] && !plan.product) || (needs[2] && !plan.vectors) || (!needs[1] && !needs[2]) ||
        !at_once(use, grad, saved, needs[1], needs[2]) || !plan.is_for(known.state->examples, *known.state))
      return std::nullopt;
    const Plain plain;
    const int64_t E = known.state->examples;
    const Tensor b = rows(grad, E);
    Recorded::Operands of_product, of_vectors;
    if (needs[1]) {
      const Tensor a = rows(saved[0], E);
      of_product = {transposed ? b : a, transposed ? a : b, along(known.weights[0], false)};
      if (!plan.product->fits(of_product)) return std::nullopt;
    }
    if (needs[2]) {
      of_vectors = {b, along(known.weights[1], true)};
      if (!plan.vectors->fits(of_vectors)) return std::nullopt;
    }
    std::array<Tensor, 2> found;
    if (needs[1]) found[0] = known.weights[0]->keep(sums_of(plan.product->run(of_product), 0), known.dtypes[0]);
    if (needs[2]) found[1] = known.weights[1]->keep(sums_of(plan.vectors->run(of_vectors), 0), known.dtypes[1]);
    return found;
  }
};

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                        const Tensor& anchor, const UsePtr& use) {
    ctx->saved_data.emplace("use", at::IValue::make_capsule(use));
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd] = at::native_layer_norm(x, x.sizes().slice(x.dim() - 1), weight, bias, eps);
    ctx->save_for_backward({x, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const Use& use = use_of(ctx);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &grad = given[0], &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    std::array<bool, 3> needs = {ctx->needs_input_grad(0), false, false};
    size_t input = 1;
    for (size_t k = 1; k < 3; ++k)
      if (saved[k].defined()) needs[k] = ctx->needs_input_grad(input++);
    std::array<Tensor, 3> found;
    if (recorded_way(use, grad, saved, needs, found)) {
      const Plain plain;
      if (needs[0]) found[0] = grad_of_x(grad, saved);
    } else if (!short_way(use, grad, saved, needs[1], needs[2])) {
      found = long_way(use, grad, saved, needs);
    } else {
      const Plain plain;
      const Known& known = *use.known;
      const int64_t E = known.state->examples;
      if (needs[0]) found[0] = grad_of_x(grad, saved);
      if (needs[1] || needs[2]) {
        const OptionalTensor scaled = needs[1] ? OptionalTensor(rows(x, E)) : std::nullopt;
        const OptionalTensor means = needs[1] ? OptionalTensor(mean) : std::nullopt,
                             rstds = needs[1] ? OptionalTensor(rstd) : std::nullopt;
        const auto [scale, shift] = scale_bias_grad(scaled, rows(grad, E), means, rstds, {}, E, needs[2]);
        if (needs[1]) found[1] = bias_gradient(*known.weights[0], scale, weight);
        if (needs[2]) found[2] = bias_gradient(*known.weights[1], shift, bias);
      }
    }
    return {found[0], found[1], found[2], Tensor(), Tensor(), Tensor()};
  }

  static Tensor grad_of_x(const Tensor& grad, const variable_list& saved) {
    const Tensor& x = saved[0];
    const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    return std::get<0>(at::native_layer_norm_backward(grad, x, x.sizes().slice(x.dim() - 1), saved[3], saved[4], given(saved[1]),
                                                      given(saved[2]), {true, false, false}));
  }

  // Computes the gradients of scale and shift with one recorded call for both, or for the only one that the norm has.
  static bool recorded_way(const Use& use, const Tensor& grad, const variable_list& saved, const std::array<bool, 3>& needs,
                           std::array<Tensor, 3>& found) {
    const Known& known = *use.known;
    const Plan& plan = known.plan;
    const Weights& weights = known.weights;
    if (!plan.vectors || needs[1] != (weights[0] != nullptr) || needs[2] != (weights[1] != nullptr) ||
        !at_once(use, grad, saved, needs[1], needs[2]) || !plan.is_for(known.state->examples, *known.state))
      return false;
    const Plain plain;
    const int64_t E = known.state->examples;
    const auto each = [&](const Tensor& t) { return rows(t, E).squeeze(-1); };
    const Recorded::Operands operands = {rows(saved[0], E), rows(grad, E),           each(saved[3]),
                                         each(saved[4]),    along(weights[0], true), along(weights[1], true)};
    if (!plan.vectors->fits(operands)) return false;
    const Recorded::Results results = plan.vectors->run(operands);
    size_t k = 0;
    for (size_t i = 0; i < 2; ++i) {
      if (!weights[i]) continue;
      found[i + 1] = weights[i]->keep(sums_of(results, k), known.dtypes[i]);
      k += 8;
    }
    return true;
  }
};

// Returns whether some argument is a tensor whose address has an entry in `sources`.
bool touches(PyObject* sources, PyObject* arguments);

bool is_source(PyObject* sources, PyObject* x) {
  if (x == Py_None || PyLong_CheckExact(x) || PyFloat_CheckExact(x) || PyBool_Check(x)) return false;
  if (PyTuple_CheckExact(x) || PyList_CheckExact(x) || PyDict_CheckExact(x)) return touches(sources, x);
  const py::object key = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(x));
  return PyDict_Contains(sources, key.ptr()) == 1;
}

bool touches(PyObject* sources, PyObject* arguments) {
  if (PyDict_CheckExact(arguments)) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(arguments, &at, &key, &value);)
      if (is_source(sources, value)) return true;
    return false;
  }
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(arguments);
  for (Py_ssize_t k = 0; k < count; ++k)
    if (is_source(sources, PySequence_Fast_GET_ITEM(arguments, k))) return true;
  return false;
}

// The requirements on one argument of a known call.
struct Argument {
  enum { weight, tensor, other } kind;
  py::object value;  // the weight, or the value of an argument that is not a tensor
  at::DimVector sizes;
  at::ScalarType dtype = at::kFloat;
  bool requires_grad = false;

  bool fits(py::handle x) const {
    if (kind == weight) return x.is(value);
    if (kind == other) return x.is(value) || (!THPVariable_Check(x.ptr()) && x.equal(value));
    if (!THPVariable_CheckExact(x.ptr())) return false;
    const Tensor& t = THPVariable_Unpack(x.ptr());
    return t.sizes() == at::IntArrayRef(sizes) && t.scalar_type() == dtype && t.requires_grad() == requires_grad;
  }
};

// A call at one place in the model. It is recognized by its function, its weights and the shapes of its operands.
class Call {
 public:
  // `function`, `names` (of the keyword arguments) and the arguments are those of the recorded call.
  Call(const std::string& kind, std::shared_ptr<State> state, py::object function, py::tuple names, const py::tuple& args,
       const std::vector<std::shared_ptr<Weight>>& weights, std::array<int, 3> places, py::object backward,
       std::optional<at::ScalarType> autocast)
      : known_(std::make_shared<Known>()), function_(std::move(function)), names_(std::move(names)), places_(places) {
    known_->kind = kind == "linear" ? Kind::linear : kind == "addmm" ? Kind::addmm : Kind::layer_norm;
    known_->state = std::move(state);
    TORCH_CHECK(weights.size() == 2, "weights: expected two, got ", weights.size());
    known_->weights = {weights[0], weights[1]};
    known_->autocast = autocast;
    known_->backward = std::make_unique<Object>(std::move(backward));
    for (py::handle x : args) {
      Argument argument;
      const bool tensor = THPVariable_Check(x.ptr());
      const int place = static_cast<int>(arguments_.size());
      const bool own = tensor && ((place == places_[1] && weights[0]) || (place == places_[2] && weights[1]));
      argument.kind = own ? Argument::weight : tensor ? Argument::tensor : Argument::other;
      if (own || !tensor) argument.value = py::reinterpret_borrow<py::object>(x);
      if (tensor) {
        const Tensor& t = THPVariable_Unpack(x.ptr());
        argument.sizes = t.sizes(), argument.dtype = t.scalar_type(), argument.requires_grad = t.requires_grad();
      }
      arguments_.push_back(std::move(argument));
    }
    for (size_t k = 0; k < 2; ++k)
      if (weights[k]) known_->dtypes[k] = arguments_.at(places_[k + 1]).dtype;
  }

  // Returns the result of the call in the mode, or nothing if the call differs from the previous one.
  py::object run(py::handle mode, PyObject* function, PyObject* args, PyObject* kwargs, PyObject* sources) const {
    const State& state = *known_->state;
    const std::vector<PyObject*> given = arguments(function, args, kwargs);
    if (given.empty()) return {};
    for (size_t k = 0; k < given.size(); ++k)
      if (!arguments_[k].fits(given[k]) || (arguments_[k].kind == Argument::tensor && is_weight(sources, given[k]))) return {};
    for (const auto& w : known_->weights)
      if (w && !w->stands_alone()) return {};
    const Tensor x = at(given, 0), weight = at(given, 1), bias = at(given, 2);
    const auto device = x.device().type();
    if (at::autocast::is_autocast_enabled(device) != known_->autocast.has_value() ||
        (known_->autocast && at::autocast::get_autocast_dtype(device) != *known_->autocast))
      return {};
    const size_t index = static_cast<size_t>(PyList_GET_SIZE(mode.attr("sites").ptr()));
    UsePtr use = c10::make_intrusive<Use>(known_, mode.attr("begin")(), index);
    for (const auto& w : known_->weights)
      if (w) w->alone = state.epoch;
    const Tensor anchor = py::cast<Tensor>(mode.attr("anchor"));
    const auto given_or_not = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const bool norm = known_->kind == Kind::layer_norm;
    const double eps = norm ? PyFloat_AsDouble(given[4]) : 0;
    Tensor y;
    {
      py::gil_scoped_release release;
      // This follows autocast: products in the lower precision, and norms on other devices than the CPU in float32.
      const auto as = known_->autocast && x.scalar_type() != at::kDouble
                          ? std::optional<at::ScalarType>(norm ? at::kFloat : *known_->autocast)
                          : std::nullopt;
      const Tensor operand = as ? x.to(*as) : x;
      y = norm ? LayerNorm::apply(operand, given_or_not(weight), given_or_not(bias), eps, anchor, use)
               : Linear::apply(operand, weight, given_or_not(bias), anchor, use);
    }
    return py::cast(y);
  }

  // Returns whether it is known if the backward pass has a fast path, for E examples and the current threads and kernels.
  bool planned(int64_t examples) const { return known_->plan.is_for(examples, *known_->state); }
  // Sets the tile of the fast path. An empty tile means that there is none.
  void plan(int64_t examples, int64_t tile_o, int64_t tile_k) {
    known_->plan = {examples, tile_o, tile_k, at::get_num_threads(), known_->state->setting, active(), nullptr, nullptr};
  }
  // Sets the calls that the fast path repeats on a device: one for the product, and one for the bias or for scale and shift. A null
  // pointer means that there is none.
  void record(int64_t examples, std::shared_ptr<Recorded> product, std::shared_ptr<Recorded> vectors) {
    plan(examples, 0, 0);
    known_->plan.product = std::move(product), known_->plan.vectors = std::move(vectors);
  }

 private:
  // Returns the positional and keyword arguments in one list. The list is empty if the function, the number of arguments or the
  // keywords differ.
  std::vector<PyObject*> arguments(PyObject* function, PyObject* args, PyObject* kwargs) const {
    const Py_ssize_t count = PyTuple_GET_SIZE(args), named = kwargs ? PyDict_GET_SIZE(kwargs) : 0;
    if (function != function_.ptr() || static_cast<size_t>(count + named) != arguments_.size() ||
        static_cast<size_t>(named) != names_.size())
      return {};
    std::vector<PyObject*> given;
    given.reserve(arguments_.size());
    for (Py_ssize_t k = 0; k < count; ++k) given.push_back(PyTuple_GET_ITEM(args, k));
    PyObject *name, *value;
    Py_ssize_t place = 0, at = 0;
    while (named && PyDict_Next(kwargs, &place, &name, &value)) {
      PyObject* const known = PyTuple_GET_ITEM(names_.ptr(), at++);
      if (name != known && PyObject_RichCompareBool(name, known, Py_EQ) != 1) return {};
      given.push_back(value);
    }
    return given;
  }

  // Returns whether an activation may be a weight or a view of one, that is, of a leaf that requires a gradient.
  static bool is_weight(PyObject* sources, PyObject* x) {
    if (is_source(sources, x)) return true;
    const Tensor& t = THPVariable_Unpack(x);
    return t.requires_grad() && t.is_view() && t._base().requires_grad() && t._base().is_leaf();
  }

  Tensor at(const std::vector<PyObject*>& given, size_t which) const {
    const int place = places_[which];
    if (place < 0 || static_cast<size_t>(place) >= given.size() || given[place] == Py_None) return {};
    return THPVariable_Unpack(given[place]);
  }

  std::shared_ptr<Known> known_;
  py::object function_;
  py::tuple names_;
  std::array<int, 3> places_;  // of x, the weight and the bias; -1 if absent
  std::vector<Argument> arguments_;
};

// The nodes as Python objects. They have a site, and the names of the functions that they replace.
template <class Function>
PyObject* site_of(PyObject* self, void*) {
  auto* node =
      static_cast<torch::autograd::CppNode<Function>*>(reinterpret_cast<torch::autograd::THPCppFunction*>(self)->cdata.get());
  const auto found = node->ctx_.saved_data.find("use");
  if (found == node->ctx_.saved_data.end()) Py_RETURN_NONE;  // the node's buffers have been freed
  return static_cast<Use*>(found->second.toCapsule().get())->site.get().inc_ref().ptr();
}

template <class Function>
PyObject* name_of(PyObject*, PyObject*) {
  return PyUnicode_FromString(std::is_same_v<Function, Linear> ? "_LinearBackward" : "_LayerNormBackward");
}

template <class Function>
void register_node(const char* name) {
  using namespace torch::autograd;
  static PyGetSetDef properties[] = {THP_FUNCTION_DEFAULT_PROPERTIES,
                                     {"site", site_of<Function>, nullptr, nullptr, nullptr},
                                     {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyMethodDef methods[] = {{"_register_hook_dict", THPCppFunction_register_hook_dict, METH_O, nullptr},
                                  {"register_hook", THPCppFunction_register_hook, METH_O, nullptr},
                                  {"register_prehook", THPCppFunction_register_prehook, METH_O, nullptr},
                                  {"name", name_of<Function>, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyTypeObject type;
  registerCppFunction(typeid(CppNode<Function>), _initFunctionPyTypeObject(type, name, properties, methods));
}

// Returns the sums whose gradient has reached the parameter, or null. In both cases the stored sums are cleared.
std::unique_ptr<Left> take(Weight& weight) {
  if (!weight.waiting) return nullptr;
  auto left = weight.arrived ? std::make_unique<Left>(Left{std::move(weight.sums), weight.direction}) : nullptr;
  weight.drop();
  return left;
}

py::tuple tensors_of(const Left& left) {
  return std::apply([](const auto&... x) { return py::make_tuple(x...); }, left.sums);
}

// Returns the sums over coordinates for several weights, (weights, 8), or None if they are not all on the CPU.
py::object coordinate_sums_of_left(const std::vector<const Left*>& weights) {
  std::vector<std::pair<const Sums*, OptionalTensor>> found;
  found.reserve(weights.size());
  for (const Left* left : weights) {
    if (!left->grad_sum().is_cpu()) return py::none();
    const auto along = left->direction ? OptionalTensor(left->direction->reshape(left->grad_sum().sizes())) : std::nullopt;
    found.emplace_back(&left->sums, along);
  }
  return py::cast(coordinate_sums_of_many(found));
}

void on_gradient(Weight& weight, const Tensor& grad) {
  const bool arrived = weight.arrives(grad);
  if ((arrived && !weight.merges) || !weight.owner) return;
  const py::object owner = weight.owner->get()();
  if (owner.is_none()) return;
  arrived ? owner.attr("take_marked")() : owner.attr("on_gradient")(grad);
}

// Returns the result of a call that the mode knows, without Python. It returns nothing if the call is unknown or requires more
// checks.
py::object run_known(py::handle mode, PyObject* function, PyObject* args, PyObject* kwargs, PyObject* sources) {
  if (!at::GradMode::is_enabled() || c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0))
    return {};
  const py::object held = mode.attr("state"), known = mode.attr("known"), keys = mode.attr("keys");
  const State& state = py::cast<const State&>(held);
  if (!state.forward || state.thread != PyThread_get_thread_ident()) return {};
  const py::int_ place(PyList_GET_SIZE(keys.ptr()));
  PyObject* const found = PyDict_GetItemWithError(known.ptr(), place.ptr());
  if (!found) return {};
  const py::object call = py::reinterpret_borrow<py::object>(found);
  return py::cast<const Call&>(call).run(mode, function, args, kwargs, sources);
}

// The mode's __torch_function__. For most calls it does nothing but call the function. `rest` is (handler, the functions that the
// handler must see in any case).
PyObject* for_weights(PyObject* rest, PyObject* const* given, Py_ssize_t count) {
  static PyObject* const sources_name = PyUnicode_InternFromString("sources");
  static PyObject* const all_name = PyUnicode_InternFromString("sees_all");
  PyObject *handler = PyTuple_GET_ITEM(rest, 0), *wanted = PyTuple_GET_ITEM(rest, 1);
  const auto handle = [&] { return PyObject_Vectorcall(handler, given, static_cast<size_t>(count), nullptr); };
  if (count < 4 || !PyTuple_CheckExact(given[3])) return handle();
  PyObject *mode = given[0], *function = given[1], *args = given[3];
  PyObject* kwargs = count > 4 && given[4] != Py_None ? given[4] : nullptr;
  const py::object all = py::reinterpret_steal<py::object>(PyObject_GetAttr(mode, all_name));
  const py::object sources = py::reinterpret_steal<py::object>(PyObject_GetAttr(mode, sources_name));
  if (!all || !sources) return nullptr;
  const int is_wanted = PyDict_Contains(wanted, function);
  if (is_wanted < 0) return nullptr;
  if (all.ptr() != Py_False || is_wanted || !PyDict_CheckExact(sources.ptr())) return handle();
  if (!touches(sources.ptr(), args) && !(kwargs && touches(sources.ptr(), kwargs))) return PyObject_Call(function, args, kwargs);
  try {
    if (py::object result = run_known(mode, function, args, kwargs, sources.ptr())) return result.release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
  return handle();
}

py::object only_for_weights(const py::function& handler, const py::dict& wanted) {
  static PyMethodDef method = {"__torch_function__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&for_weights)),
                               METH_FASTCALL, nullptr};
  const py::tuple rest = py::make_tuple(handler, wanted);
  const auto function = py::reinterpret_steal<py::object>(PyCFunction_New(&method, rest.ptr()));
  return py::reinterpret_steal<py::object>(PyInstanceMethod_New(function.ptr()));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<State, std::shared_ptr<State>>(m, "State")
      .def(py::init<>())
      .def_readwrite("epoch", &State::epoch)
      .def_readwrite("at_once", &State::at_once)
      .def_readwrite("examples", &State::examples)
      .def_readwrite("setting", &State::setting)
      .def_readwrite("forward", &State::forward)
      .def_readwrite("thread", &State::thread)
      .def_property(
          "regular", [](const State& s) { return py::bytes(s.regular); },
          [](State& s, const py::bytes& regular) { s.regular = regular; });
  py::class_<Weight, std::shared_ptr<Weight>>(m, "Weight")
      .def(py::init<std::shared_ptr<State>>())
      .def_readwrite("single", &Weight::single)
      .def_readwrite("refused", &Weight::refused)
      .def_readwrite("barred", &Weight::barred)
      .def_readwrite("alone", &Weight::alone)
      .def_readwrite("gathered", &Weight::gathered)
      .def_readwrite("deferred", &Weight::deferred)
      .def_readwrite("direction", &Weight::direction)
      .def_readwrite("gram", &Weight::gram)
      .def_readwrite("merges", &Weight::merges)
      .def_property("owner", nullptr, [](Weight& w, py::object owner) { w.owner = std::make_unique<Object>(std::move(owner)); })
      .def_readonly("waiting", &Weight::waiting)
      .def("renew", &Weight::renew)
      .def("stands_alone", &Weight::stands_alone)
      .def("take", &take)
      .def("__call__", &on_gradient);
  py::class_<Left>(m, "Left").def("tensors", &tensors_of).def_property_readonly("version", [](const Left& left) {
    return left.grad_sum()._version();
  });
  m.def("coordinate_sums_of_left", &coordinate_sums_of_left);
  py::class_<Call>(m, "Call")
      .def(py::init<const std::string&, std::shared_ptr<State>, py::object, py::tuple, const py::tuple&,
                    const std::vector<std::shared_ptr<Weight>>&, std::array<int, 3>, py::object, std::optional<at::ScalarType>>())
      .def("planned", &Call::planned)
      .def("plan", &Call::plan)
      .def("record", &Call::record);
  m.def("run_known",
        [](py::handle mode, py::handle function, const py::tuple& args, const py::dict& kwargs, const py::dict& sources) {
          const py::object found = run_known(mode, function.ptr(), args.ptr(), kwargs.ptr(), sources.ptr());
          return found ? found : py::none();
        });
  m.def("only_for_weights", &only_for_weights);
  bind_recorded(m);
  register_node<Linear>("zsl_kernels._cpu.LinearBackward");
  register_node<LayerNorm>("zsl_kernels._cpu.LayerNormBackward");
}

}  // namespace zsl
