// What PyTorch calls an operator with, and what the operator makes of it for the C API.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "flexq/flexq.h"
#include "torch_shim.h"

namespace flexq::python {

struct Device {
  int32_t type;
  int32_t index;
  bool operator==(const Device&) const = default;
  std::string name() const {
    if (type == shim().cpu) return "cpu";
    return "cuda:" + std::to_string(index);
  }
};

std::string text_of(const int64_t* values, int64_t count);
std::string dtype_name(int32_t dtype);

// Owns a handle, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle);
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    data = other.data;
    dim = other.dim;
    sizes = other.sizes;
    strides = other.strides;
    dtype = other.dtype;
    device = other.device;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) shim().delete_tensor(handle_);
  }

  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device);
  static Tensor bytes(size_t count, const Device& device) {
    const auto size = static_cast<int64_t>(count);
    return empty(&size, 1, shim().uint8, device);
  }

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  AtenTensorHandle get() const { return handle_; }
  std::string shape() const { return text_of(sizes, dim); }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim; ++i) count *= sizes[i];
    return count;
  }
  bool contiguous() const {
    int64_t stride = 1;
    for (int64_t i = dim; i-- > 0;) {
      if (sizes[i] == 0) return true;
      if (sizes[i] != 1 && strides[i] != stride) return false;
      stride *= sizes[i];
    }
    return true;
  }
  bool same_shape(const Tensor& other) const {
    return dim == other.dim && std::memcmp(sizes, other.sizes, static_cast<size_t>(dim) * sizeof *sizes) == 0;
  }
  bool is_vector(int64_t size) const { return dim == 1 && sizes[0] == size && contiguous(); }

  void* data = nullptr;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0;
  Device device{};

 private:
  AtenTensorHandle handle_ = nullptr;
};

Tensor contiguous_copy(const Tensor& t);

flexq_dtype dtype_of(int32_t dtype, const char* name);

// Of a contiguous uint8 tensor; refuses others.
size_t buffer_size(const Tensor& t, const char* name);

// x [..., K] as rows `ld` elements apart, copied only if it has none.
struct Rows {
  explicit Rows(const Tensor& t, const char* name = "x");
  void* data;
  flexq_dtype dtype;
  int64_t rows;
  int64_t k;
  int64_t ld;
  Tensor copy;
};

// Where PyTorch would run work on a device.
flexq_stream stream_on(const Device& device);

// An operator's arguments, which it owns from the start: all are read before anything can fail.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(handle<AtenTensorHandle>(*next_++)); }
  Tensor optional_tensor();
  int64_t integer() { return static_cast<int64_t>(*next_++); }
  // Conventions differ in how wide a dtype is.
  int32_t dtype() { return static_cast<int32_t>(static_cast<uint32_t>(*next_++)); }
  bool boolean() { return (*next_++ & 0xff) != 0; }  // the rest of the word may be anything
  double number() { return std::bit_cast<double>(*next_++); }
  std::string string();

 private:
  template <typename Handle>
  static Handle handle(StableIValue value) {
    return reinterpret_cast<Handle>(static_cast<uintptr_t>(value));
  }
  const StableIValue* next_;
};

inline StableIValue result(Tensor tensor) { return reinterpret_cast<uintptr_t>(tensor.release()); }

int32_t act_bits_of(int64_t bits);
int32_t weight_bits_of(int64_t bits);

}  // namespace flexq::python
