// Python values -> arguments of the C API. Tensors come as DLPack views, never copied.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string_view.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

#include "flexq/flexq.h"

namespace nb = nanobind;

namespace flexq::python {

// Raises ValueError, MemoryError or RuntimeError with the library's message: both nanobind and PyTorch turn C++'s
// exceptions into these.
inline void check(flexq_status status) {
  if (status == FLEXQ_OK) return;
  switch (status) {
    case FLEXQ_INVALID_ARGUMENT:
    case FLEXQ_UNSUPPORTED:
    case FLEXQ_BAD_VALUE:
      throw std::invalid_argument(flexq_last_error());
    case FLEXQ_OUT_OF_MEMORY:
      PyErr_SetString(PyExc_MemoryError, flexq_last_error());
      throw nb::python_error();
    default:
      throw std::runtime_error(std::string(flexq_status_name(status)) + ": " + flexq_last_error());
  }
}

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

// A tensor's `data_ptr()`.
inline void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline flexq_dtype dtype_of(const nb::ndarray<>& t, const char* name) {
  const auto dtype = t.dtype();
  if (dtype == nb::dtype<float>()) return FLEXQ_F32;
  if (dtype.bits == 16 && dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) return FLEXQ_F16;
  if (dtype.bits == 16 && dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return FLEXQ_BF16;
  refuse(std::string(name) + " must be float32, float16 or bfloat16");
}

inline flexq_scheme scheme_of(std::string_view name) {
  if (name == "group") return FLEXQ_SCHEME_GROUP;
  if (name == "channel") return FLEXQ_SCHEME_CHANNEL;
  refuse("scheme must be 'group' or 'channel', got '" + std::string(name) + "'");
}

inline flexq_rotation rotation_of(std::string_view name) {
  if (name == "none") return FLEXQ_ROTATION_NONE;
  if (name == "hadamard128") return FLEXQ_ROTATION_HADAMARD128;
  refuse("rotation must be 'none' or 'hadamard128', got '" + std::string(name) + "'");
}

inline flexq_projection projection_of(std::string_view name) {
  if (name == "gate_up") return FLEXQ_GATE_UP;
  if (name == "down") return FLEXQ_DOWN;
  refuse("projection must be 'gate_up' or 'down', got '" + std::string(name) + "'");
}

inline flexq_gate_function gate_function_of(std::string_view name) {
  if (name == "silu") return FLEXQ_GATE_SILU;
  if (name == "gelu") return FLEXQ_GATE_GELU;
  if (name == "gelu_tanh") return FLEXQ_GATE_GELU_TANH;
  refuse("function must be 'silu', 'gelu' or 'gelu_tanh', got '" + std::string(name) + "'");
}

// In the order of flexq.ops.ExpertsDesc.
inline flexq_experts_desc experts_desc(int64_t experts, int64_t hidden, int64_t intermediate,
                                       std::string_view gate_up_scheme, std::string_view gate_up_rotation,
                                       int32_t gate_up_act_bits, std::string_view down_scheme,
                                       std::string_view down_rotation, int32_t down_act_bits, std::string_view function,
                                       float alpha, float limit, float up_offset, bool interleaved,
                                       int32_t gate_up_weight_bits, int32_t down_weight_bits) {
  flexq_experts_desc desc = FLEXQ_EXPERTS_DESC_INIT;
  desc.experts = experts;
  desc.hidden = hidden;
  desc.intermediate = intermediate;
  desc.gate_up = {gate_up_weight_bits, scheme_of(gate_up_scheme), rotation_of(gate_up_rotation), gate_up_act_bits};
  desc.down = {down_weight_bits, scheme_of(down_scheme), rotation_of(down_rotation), down_act_bits};
  desc.layout = interleaved ? FLEXQ_GATE_UP_INTERLEAVED : FLEXQ_GATE_UP_CONCATENATED;
  desc.function = gate_function_of(function);
  desc.alpha = alpha;
  desc.limit = limit;
  desc.up_offset = up_offset;
  return desc;
}

// A row-major matrix, possibly a slice of a larger one: rows `ld` elements apart.
struct Matrix {
  Matrix(const nb::ndarray<>& t, const char* name) {
    if (t.ndim() != 2) refuse(std::string(name) + " must have 2 dimensions, got " + std::to_string(t.ndim()));
    rows = static_cast<int64_t>(t.shape(0));
    cols = static_cast<int64_t>(t.shape(1));
    if (cols > 1 && t.stride(1) != 1) refuse(std::string(name) + " must have contiguous rows");
    ld = rows > 1 ? t.stride(0) : cols;
    data = t.data();
    dtype = dtype_of(t, name);
  }
  void* data;
  flexq_dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t ld;
};

// A contiguous array of `T`, with at least `count` elements if that is given.
template <typename T>
T* array_of(const nb::ndarray<>& t, const char* name, size_t count = 0) {
  int64_t expected = 1;
  for (size_t i = t.ndim(); i-- > 0;) {
    if (t.shape(i) > 1 && t.stride(i) != expected) refuse(std::string(name) + " must be contiguous");
    expected *= static_cast<int64_t>(t.shape(i));
  }
  if (t.dtype().bits != 8 * sizeof(T)) {
    refuse(std::string(name) + " must have elements of " + std::to_string(8 * sizeof(T)) + " bits");
  }
  if (t.size() < count) {
    refuse(std::string(name) + " must have at least " + std::to_string(count) + " elements, got " +
           std::to_string(t.size()));
  }
  return reinterpret_cast<T*>(t.data());
}

// Who runs the CPU's loops on so many threads: OpenMP's if the process has them (PyTorch's do), as two pools that both
// spin on the same cores slow each other down; else a pool of the library's. Null for one thread. Lives forever.
const flexq_executor* executor_of(int32_t num_threads);

// A flexq_stream that keeps its kernel's name alive.
struct Stream {
  flexq_stream stream;
  std::shared_ptr<const std::string> kernel = nullptr;
};

void bind_stream(nb::module_& m);
void bind_weight(nb::module_& m);
void bind_activation(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_torch_ops(nb::module_& m);

using NoGil = nb::gil_scoped_release;

}  // namespace flexq::python
