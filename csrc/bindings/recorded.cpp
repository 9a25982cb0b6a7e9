// Repeats recorded kernel calls with new operands, and binds the class Recorded to Python.
#include "recorded.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/TensorImpl.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

namespace zsl {
namespace {

namespace py = pybind11;
using at::Tensor;

constexpr const char* launch_name = "zsl_kernels.launch";
constexpr int64_t alignment = 16;  // the launches depend on addresses modulo this number

int64_t address(const Tensor& x) { return reinterpret_cast<int64_t>(x.const_data_ptr()); }

// torch._C._cuda_getCurrentRawStream, if torch has CUDA. It is looked up when the module is loaded. A static variable in a function
// could deadlock: its lock and the interpreter's lock could wait for each other.
PyObject* current_raw_stream = nullptr;

// Returns the stream on which torch currently launches.
int64_t current_stream(at::Device device) {
  if (!device.is_cuda()) return 0;
  py::gil_scoped_acquire gil;
  return py::cast<int64_t>(py::handle(current_raw_stream)(device.index()));
}

Tensor view(const Tensor& x, const Recorded::Result& as) {
  Tensor found(x.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), false));
  found.unsafeGetTensorImpl()->set_sizes_and_strides(as.sizes, as.strides, as.offset);
  return found;
}

}  // namespace

bool Recorded::fits(c10::ArrayRef<Tensor> operands) const {
  if (operands.size() != operands_.size()) return false;
  for (size_t i = 0; i < operands.size(); ++i) {
    const Tensor& x = operands[i];
    if (x.defined() != operands_[i].has_value()) return false;
    if (!x.defined()) continue;
    const Operand& as = *operands_[i];
    if (x.device() != device_ || x.scalar_type() != as.dtype || x.layout() != at::kStrided || x.is_neg() ||
        x.sizes() != at::IntArrayRef(as.sizes) || x.strides() != at::IntArrayRef(as.strides) || address(x) % alignment != as.offset)
      return false;
  }
  return true;
}

Recorded::Results Recorded::run(c10::ArrayRef<Tensor> operands) const {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::OptionalDeviceGuard guard(device_);
  const auto options = at::TensorOptions().device(device_).dtype(at::kFloat);
  c10::SmallVector<Tensor, 8> allocated;
  for (const auto& sizes : allocations_) allocated.push_back(at::empty(sizes, options));
  const int64_t stream = current_stream(device_);
  c10::SmallVector<int64_t, 96> numbers;
  for (const Launch& launch : launches_) {
    numbers.assign(launch.numbers.begin(), launch.numbers.end());
    for (const Address& x : launch.addresses) {
      const int64_t from = x.from - static_cast<int64_t>(operands.size());
      numbers[x.at] = x.from < 0 ? stream : address(from < 0 ? operands[x.from] : allocated[from]) + x.offset;
    }
    if (launch.run) launch.run(numbers.data());
  }
  Results results;
  for (const auto& as : results_) results.push_back(as ? view(allocated[as->of], *as) : Tensor());
  return results;
}

void bind_recorded(py::module_& m) {
  const py::module_ torch = py::module_::import("torch._C");
  if (py::hasattr(torch, "_cuda_getCurrentRawStream"))
    current_raw_stream = py::object(torch.attr("_cuda_getCurrentRawStream")).release().ptr();
  using Numbers = std::vector<int64_t>;
  using Launched = std::tuple<py::object, Numbers, std::vector<std::array<int64_t, 3>>>;
  using Viewed = std::tuple<int64_t, Numbers, Numbers, int64_t>;
  py::class_<Recorded, std::shared_ptr<Recorded>>(m, "Recorded")
      .def(
          py::init([](const std::vector<std::optional<Tensor>>& operands, at::Device device, std::vector<Numbers> allocations,
                      const std::vector<Launched>& launches, const std::vector<std::optional<Viewed>>& results) {
            std::vector<std::optional<Recorded::Operand>> given;
            for (const auto& x : operands) {
              if (x)
                given.push_back(Recorded::Operand{x->sizes().vec(), x->strides().vec(), x->scalar_type(), address(*x) % alignment});
              else
                given.push_back(std::nullopt);
            }
            std::vector<Recorded::Launch> launched;
            for (const auto& [function, numbers, addresses] : launches) {
              Recorded::Launch launch{nullptr, numbers, {}};
              if (!function.is_none()) {
                void* const found = PyCapsule_GetPointer(function.ptr(), launch_name);
                if (!found) throw py::error_already_set();
                launch.run = reinterpret_cast<void (*)(const int64_t*)>(found);
              }
              for (const auto& [at, from, offset] : addresses) launch.addresses.push_back({at, from, offset});
              launched.push_back(std::move(launch));
            }
            std::vector<std::optional<Recorded::Result>> views;
            for (const auto& x : results) {
              if (x)
                views.push_back(Recorded::Result{std::get<0>(*x), std::get<1>(*x), std::get<2>(*x), std::get<3>(*x)});
              else
                views.push_back(std::nullopt);
            }
            return std::make_shared<Recorded>(device, std::move(given), std::move(allocations), std::move(launched),
                                              std::move(views));
          }),
          py::arg("operands"), py::arg("device"), py::arg("allocations"), py::arg("launches"), py::arg("results"))
      .def_property_readonly("allocations", &Recorded::allocations)
      .def(
          "__call__",
          [](const Recorded& recorded, const py::args& given) -> py::object {
            Recorded::Operands operands;
            for (const py::handle x : given) operands.push_back(x.is_none() ? Tensor() : py::cast<Tensor>(x));
            if (!recorded.fits(operands)) return py::none();
            const Recorded::Results results = recorded.run(operands);
            py::tuple found(results.size());
            for (size_t i = 0; i < results.size(); ++i) found[i] = results[i].defined() ? py::cast(results[i]) : py::none();
            return found;
          },
          "Repeat the recorded call for these operands. Return its results, or None if the operands have another layout.");
}

}  // namespace zsl
