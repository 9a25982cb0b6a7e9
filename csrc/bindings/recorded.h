// A recorded call of the device's kernels: its allocations, its launches, and the places of pointers in their arguments.
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
  // The properties of an operand on which the launches depend: sizes, strides, dtype, and the address modulo 16.
  struct Operand {
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    int64_t offset;
  };
  // An address among the numbers of a launch. `from` is the index of an operand. Indices after the operands refer to allocations,
  // and -1 is the stream.
  struct Address {
    int64_t at, from, offset;
  };
  // `run` reads the numbers of nested arguments in sequence (see csrc/bindings/cuda_module.cpp). If it is null, nothing is
  // launched.
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

  // Returns whether the operands match those of the recorded call, apart from their addresses.
  bool fits(c10::ArrayRef<at::Tensor> operands) const;
  // Repeats the call and returns its results. A result that the recorded call did not have is undefined. The operands must fit.
  Results run(c10::ArrayRef<at::Tensor> operands) const;

  size_t allocations() const { return allocations_.size(); }

 private:
  at::Device device_;
  std::vector<std::optional<Operand>> operands_;
  std::vector<std::vector<int64_t>> allocations_;  // the sizes of the float32 tensors to allocate
  std::vector<Launch> launches_;
  std::vector<std::optional<Result>> results_;
};

void bind_recorded(pybind11::module_& m);

}  // namespace zsl
