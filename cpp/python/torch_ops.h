// The kernels of torch.ops.flexq in C++: check tensors, allocate, call the C API.
#pragma once

#include <span>
#include <string_view>

#include "torch_shim.h"

namespace flexq::python {

struct Operator {
  std::string_view name;
  Kernel kernel;
};

std::span<const Operator> linear_operators();  // activations and linear layers
std::span<const Operator> experts_operators();

}  // namespace flexq::python
