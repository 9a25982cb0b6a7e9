// Helpers shared by the CPU bindings: they convert tensors to operands and run workers on contiguous ranges of the work.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "../cpu/kernels.h"

namespace zsl {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The active kernels: those of the best supported instruction set, unless the user selects another.
const Kernels*& active();

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    case at::kDouble:
      return DType::f64;
    default:
      TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64, got ", x.scalar_type());
  }
}

// Converts an (N, T, F) tensor, or ragged rows (R, F).
inline Operand operand(const Tensor& x) {
  const bool ragged = x.dim() == 2;
  return {x.const_data_ptr(), dtype_of(x), ragged ? 0 : x.stride(0), x.stride(-2), x.stride(-1)};
}

inline at::TensorOptions sum_options(const Tensor& a) {
  return a.options().dtype(a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}
inline at::TensorOptions double_options(const Tensor& a) { return a.options().dtype(at::kDouble); }

// Every op holds one while it runs. It disables autograd, because the op's inner operations are not differentiated, and autocast,
// because the op itself chooses its dtypes.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// Allocates like at::empty but skips the dispatcher, which would take half the time of a call on small tensors. It uses the
// dispatcher if torch fills new memory or if a dispatch mode is active.
inline Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::Context& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (filled || c10::impl::TorchDispatchModeTLS::any_modes_set()) return at::empty(sizes, at::TensorOptions(dtype));
  return at::detail::empty_cpu(sizes, dtype);
}
inline Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return fresh(sizes, options.dtype().toScalarType());
}

// The limit is more than an address space holds, but a tensor with stride 0 may have that many elements. Below the limit no byte
// count overflows, including those of the buffers that are allocated for each worker.
constexpr int64_t most_elements = int64_t{1} << 48;

// A dimension of size zero counts as one, because the kernels also loop over the other dimensions.
inline void check_elements(const char* name, at::IntArrayRef sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    const bool over = __builtin_mul_overflow(count, std::max<int64_t>(size, 1), &count);
    TORCH_CHECK_VALUE(size >= 0 && !over && count <= most_elements, name, ": expected 0 to 2^48 elements, got sizes ", sizes);
  }
}

// Converts a tensor to the dtype and layout that the kernels expect, resolves a lazy negation, and keeps the memory alive while a
// raw pointer is in use. The kernels read `count` elements.
struct Held {
  Tensor tensor;
  Held(const char* name, const OptionalTensor& x, const at::TensorOptions& options, int64_t count) {
    if (!x.has_value()) return;
    TORCH_CHECK_VALUE(x->numel() == count, name, ": expected ", count, " elements, got shape ", x->sizes());
    tensor = x->dtype() == options.dtype() && x->device() == options.device() ? *x : x->to(options);
    if (!tensor.is_contiguous()) tensor = tensor.contiguous();
    if (tensor.is_neg()) tensor = tensor.resolve_neg();
  }
  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
  const double* doubles() const { return static_cast<const double*>(data()); }
};

// Calls body(worker, begin, end, workspace) for contiguous ranges of [0, count), one range per worker.
template <class Body>
void run_workers(int64_t workers, int64_t count, size_t workspace_bytes, Body body) {
  const int64_t stride = (static_cast<int64_t>(workspace_bytes) + 4095) / 4096 * 4096 + 64;
  const Tensor workspace = fresh({workers * stride}, at::kByte);
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) body(w, count * w / workers, count * (w + 1) / workers, base + w * stride);
  });
}

inline int64_t worker_count(int64_t items) { return std::max<int64_t>(1, std::min<int64_t>(items, at::get_num_threads())); }

// Adds the workers' partial results in order. Each worker has `size` numbers, and consecutive workers are `stride` numbers apart.
inline Tensor add_up(const double* partial, int64_t workers, int64_t stride, int64_t size, const at::TensorOptions& options) {
  const Tensor out = fresh({size}, options);
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

// Each worker accumulates an (N, M) matrix of its own. The number of workers is reduced so that these take at most one gigabyte.
inline int64_t gram_worker_count(int64_t items, int64_t size) {
  return std::max<int64_t>(1, std::min(worker_count(items), (int64_t{1} << 27) / std::max<int64_t>(size, 1)));
}

}  // namespace zsl
