// A call of the device's kernels that was recorded: its allocations, and its launches with the places of their pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace zsl {

class Recorded {
 public:
  // Of an operand: its sizes, strides and dtype, and its address modulo 16, on which launches depend.
  struct Operand {
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    int64_t offset;
  };
  // A number of a launch that is an address: `from` an operand, or behind these an allocation, or the stream (-1).
  struct Address {
    int64_t at, from, offset;
  };
  // `run` takes the numbers of nested arguments one after the other (csrc/bindings/cuda_module.cpp); null: nothing is launched.
  struct Launch {
    void (*run)(const int64_t*);
    std::vector<int64_t> numbers;
    std::vector<Address> addresses;
  };
  // A view of an allocation.
  struct Result {
    int64_t of;
    std::vector<int64_t> sizes, strides;
    int64_t offset;
  };
  using Results = c10::SmallVector<at::Tensor, 16>;
  using Operands = c10::SmallVector<at::Tensor, 8>;

  Recorded(at::Device device, std::vector<std::optional<Operand>> operands, std::vector<std::vector<int64_t>> allocations,
           std::vector<Launch> launches, std::vector<std::optional<Result>> results)
      : device_(device),
        operands_(std::move(operands)),
        allocations_(std::move(allocations)),
        launches_(std::move(launches)),
        results_(std::move(results)) {}

  // Whether they are those of the recorded call but for their addresses.
  bool fits(c10::ArrayRef<at::Tensor> operands) const;
  // The results, undefined where there were none. Operands have to fit.
  Results run(c10::ArrayRef<at::Tensor> operands) const;

  size_t allocations() const { return allocations_.size(); }

 private:
  at::Device device_;
  std::vector<std::optional<Operand>> operands_;
  std::vector<std::vector<int64_t>> allocations_;  // float32 tensors of these sizes
  std::vector<Launch> launches_;
  std::vector<std::optional<Result>> results_;
};

void bind_recorded(pybind11::module_& m);

}  // namespace zsl
