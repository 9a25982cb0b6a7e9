// What the bindings share: operands from tensors, and workers on contiguous ranges of the work.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "../cpu/kernels.h"

namespace zsl {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The kernels in use: those of the best instruction set, unless another was asked for.
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

// (N, T, F), or ragged rows (R, F).
inline Operand operand(const Tensor& x) {
  const bool ragged = x.dim() == 2;
  return {x.const_data_ptr(), dtype_of(x), ragged ? 0 : x.stride(0), x.stride(-2), x.stride(-1)};
}

inline at::TensorOptions sum_options(const Tensor& a) {
  return a.options().dtype(a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}
inline at::TensorOptions double_options(const Tensor& a) { return a.options().dtype(at::kDouble); }

// Keeps what a raw pointer points to alive, in the dtype and layout that the kernels want.
struct Held {
  Tensor tensor;
  Held(const OptionalTensor& x, const at::TensorOptions& options) {
    if (x.has_value()) tensor = x->to(options).contiguous();
  }
  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
  const double* doubles() const { return static_cast<const double*>(data()); }
};

// Calls body(worker, begin, end, workspace) for contiguous ranges of [0, count), one for each worker.
template <class Body>
void run_workers(int64_t workers, int64_t count, size_t workspace_bytes, const Tensor& like, Body body) {
  const int64_t stride = (static_cast<int64_t>(workspace_bytes) + 4095) / 4096 * 4096 + 64;
  const Tensor workspace = at::empty({workers * stride}, like.options().dtype(at::kByte));
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) body(w, count * w / workers, count * (w + 1) / workers, base + w * stride);
    if (active() == kernels_amx()) matrix_unit->release();
  });
}

inline int64_t worker_count(int64_t items) { return std::max<int64_t>(1, std::min<int64_t>(items, at::get_num_threads())); }

// Each worker adds to an (N, M) of its own; past a gigabyte of them, fewer workers.
inline int64_t gram_worker_count(int64_t items, int64_t size) {
  return std::max<int64_t>(1, std::min(worker_count(items), (int64_t{1} << 27) / std::max<int64_t>(size, 1)));
}

}  // namespace zsl
