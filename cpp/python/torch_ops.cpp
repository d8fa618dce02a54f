// The kernels of torch.ops.flexq that run for every layer of every token, called by PyTorch without a detour through
// Python. flexq.ops defines the operators, and implements them in Python for versions of PyTorch without its C shim.
#include "torch_ops.h"

#include <nanobind/stl/string.h>

#include <string>

#include "conversions.h"
#include "torch_shim.h"

namespace flexq::python {
namespace {

bool implement(const std::string& name, const std::string& key) {
  if (shim_or_null() == nullptr || (key == "CUDA" && shim().get_current_cuda_stream == nullptr)) return false;
  for (const auto& operators : {linear_operators(), experts_operators()}) {
    for (const auto& [known, kernel] : operators) {
      if (known != name) continue;
      TorchLibraryHandle library = nullptr;  // kept for as long as the process runs, like the module
      torch_check(shim().library_init_impl("flexq", key.c_str(), "torch_ops.cpp", __LINE__, &library),
                  "library_init_impl");
      torch_check(shim().library_impl(library, name.c_str(), kernel, kShimVersion), "library_impl");
      return true;
    }
  }
  return false;
}

}  // namespace

void bind_torch_ops(nb::module_& m) {
  m.def("implement_operator", &implement, nb::arg("name"), nb::arg("key"),
        "Registers the C++ kernel of torch.ops.flexq.<name> for a dispatch key; False if there is none, or PyTorch is "
        "too old for it.");
}

}  // namespace flexq::python
