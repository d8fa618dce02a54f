#include "torch_arguments.h"

#include <algorithm>
#include <array>

#include "conversions.h"

namespace flexq::python {

std::string text_of(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string dtype_name(int32_t dtype) {
  constexpr std::array kNames{"uint8",   "int8",    "int16",     "int32",     "int64",      "float16",
                              "float32", "float64", "complex32", "complex64", "complex128", "bool",
                              "qint8",   "quint8",  "qint32",    "bfloat16"};
  const auto i = static_cast<size_t>(dtype);
  return i < kNames.size() ? std::string("torch.") + kNames[i] : "dtype " + std::to_string(dtype);
}

Tensor::Tensor(AtenTensorHandle handle) : handle_(handle) {
  if (handle == nullptr) return;
  const Shim& s = shim();
  torch_check(s.get_dim(handle, &dim), "get_dim");
  torch_check(s.get_sizes(handle, &sizes), "get_sizes");
  torch_check(s.get_strides(handle, &strides), "get_strides");
  torch_check(s.get_dtype(handle, &dtype), "get_dtype");
  torch_check(s.get_device_type(handle, &device.type), "get_device_type");
  torch_check(s.get_device_index(handle, &device.index), "get_device_index");
  torch_check(s.get_data_ptr(handle, &data), "get_data_ptr");
}

Tensor Tensor::empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device) {
  constexpr int64_t kMaxDim = 64;
  int64_t strides[kMaxDim];
  if (dim > kMaxDim) refuse("tensors have at most 64 dimensions, got " + std::to_string(dim));
  int64_t stride = 1;
  for (int64_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle = nullptr;
  torch_check(shim().empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle), "empty_strided");
  return Tensor(handle);
}

Tensor contiguous_copy(const Tensor& t) {
  Tensor copy = Tensor::empty(t.sizes, t.dim, t.dtype, t.device);
  torch_check(shim().copy(copy.get(), t.get(), 0), "copy_");
  return copy;
}

flexq_dtype dtype_of(int32_t dtype, const char* name) {
  if (dtype == shim().float32) return FLEXQ_F32;
  if (dtype == shim().float16) return FLEXQ_F16;
  if (dtype == shim().bfloat16) return FLEXQ_BF16;
  refuse(std::string(name) + " must be float32, float16 or bfloat16, got " + dtype_name(dtype));
}

size_t buffer_size(const Tensor& t, const char* name) {
  if (t.dtype != shim().uint8 || !t.contiguous()) {
    refuse(std::string(name) + " must be contiguous uint8, got " + dtype_name(t.dtype) + " with strides " +
           text_of(t.strides, t.dim));
  }
  return static_cast<size_t>(t.numel());
}

Rows::Rows(const Tensor& t, const char* name) {
  if (t.dim == 0 || t.sizes[t.dim - 1] == 0) {
    refuse(std::string(name) + " must be [..., K] with K at least 1, got " + t.shape());
  }
  dtype = dtype_of(t.dtype, name);
  k = t.sizes[t.dim - 1];
  rows = t.numel() / k;
  data = t.data;
  ld = k;
  if (t.contiguous()) return;
  // Leading dimensions must be one: each stride the next one's times its size.
  int64_t row_stride = 0, expected = 0;
  bool fits = t.strides[t.dim - 1] == 1 || k == 1;
  for (int64_t i = t.dim - 1; fits && i-- > 0;) {
    if (t.sizes[i] == 1) continue;
    if (row_stride == 0) {
      row_stride = t.strides[i];
      fits = row_stride >= k;
    } else {
      fits = t.strides[i] == expected;
    }
    expected = t.strides[i] * t.sizes[i];
  }
  if (fits) {
    ld = row_stride;
    return;
  }
  copy = contiguous_copy(t);
  data = copy.data;
}

flexq_stream stream_on(const Device& device) {
  flexq_stream stream = FLEXQ_STREAM_INIT;
  if (device.type == shim().cpu) {
    uint32_t threads = 1;
    torch_check(shim().get_num_threads(&threads), "get_num_threads");
    stream.executor = executor_of(static_cast<int32_t>(threads));
    return stream;
  }
  stream.device = FLEXQ_CUDA;
  stream.device_index = device.index;
  torch_check(shim().get_current_cuda_stream(device.index, &stream.handle), "get_current_cuda_stream");
  return stream;
}

Tensor Arguments::optional_tensor() {
  auto* value = handle<StableIValue*>(*next_++);
  if (value == nullptr) return Tensor();
  Tensor tensor(handle<AtenTensorHandle>(*value));
  if (shim().delete_stable_ivalue != nullptr) {
    shim().delete_stable_ivalue(value);
  } else {
    delete value;
  }
  return tensor;
}

std::string Arguments::string() {
  const auto text = handle<StringHandle>(*next_++);
  const char* characters = nullptr;
  size_t length = 0;
  torch_check(shim().string_length(text, &length), "string_length");
  torch_check(shim().string_c_str(text, &characters), "string_c_str");
  std::string copy(characters, length);
  shim().delete_string(text);
  return copy;
}

int32_t act_bits_of(int64_t bits) {
  if (bits < 0 || bits > INT32_MAX) refuse("act_bits must be 6 or 8, got " + std::to_string(bits));
  return static_cast<int32_t>(bits);
}

int32_t weight_bits_of(int64_t bits) {
  if (bits < 0 || bits > INT32_MAX) refuse("weight_bits must be 4, 5, 6 or 8, got " + std::to_string(bits));
  return static_cast<int32_t>(bits);
}

}  // namespace flexq::python
