// The kernels of torch.ops.flexq that run for every layer of every token, called by PyTorch without a detour through
// Python: check tensors, allocate, call the C API.
//
// PyTorch's own C shim (libtorch's stable ABI, torch/csrc/stable/c/shim.h) is looked up in the libraries that the
// process has loaded, so that one build works with every version from 2.10 on and needs none to be built. flexq.ops
// defines the operators, and implements them in Python for versions without it.
#include <dlfcn.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "conversions.h"

namespace flexq::python {
namespace {

// ---- The shim. Names and types are PyTorch's; every function returns 0 unless it failed. ----

using StableIValue = uint64_t;  // an int64_t, a double, a handle, or the address of another one
struct TensorOpaque;
struct LibraryOpaque;
struct StringOpaque;
using AtenTensorHandle = TensorOpaque*;
using TorchLibraryHandle = LibraryOpaque*;
using StringHandle = StringOpaque*;
using Kernel = void (*)(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

struct Shim {
  int32_t (*library_init_impl)(const char* ns, const char* key, const char* file, uint32_t line, TorchLibraryHandle*);
  int32_t (*library_impl)(TorchLibraryHandle, const char* name, Kernel, uint64_t version);
  int32_t (*string_length)(StringHandle, size_t*);
  int32_t (*string_c_str)(StringHandle, const char**);
  int32_t (*delete_string)(StringHandle);
  int32_t (*get_num_threads)(uint32_t*);
  int32_t (*get_data_ptr)(AtenTensorHandle, void**);
  int32_t (*get_dim)(AtenTensorHandle, int64_t*);
  int32_t (*get_sizes)(AtenTensorHandle, int64_t**);
  int32_t (*get_strides)(AtenTensorHandle, int64_t**);
  int32_t (*get_dtype)(AtenTensorHandle, int32_t*);
  int32_t (*get_device_type)(AtenTensorHandle, int32_t*);
  int32_t (*get_device_index)(AtenTensorHandle, int32_t*);
  int32_t (*empty_strided)(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, AtenTensorHandle*);
  int32_t (*copy)(AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking);
  int32_t (*delete_tensor)(AtenTensorHandle);
  int32_t (*device_type_cpu)();
  int32_t (*device_type_cuda)();
  int32_t (*dtype_uint8)();
  int32_t (*dtype_int32)();
  int32_t (*dtype_int64)();
  int32_t (*dtype_float32)();
  int32_t (*dtype_float16)();
  int32_t (*dtype_bfloat16)();
  // Null where PyTorch has no CUDA.
  int32_t (*get_current_cuda_stream)(int32_t device_index, void**);
  // Null before PyTorch 2.13.
  int32_t (*delete_stable_ivalue)(StableIValue*);

  int32_t cpu, cuda, uint8, int32, int64, float32, float16, bfloat16;  // what the functions above say
};

// The version whose conventions `Kernel`s follow, as PyTorch encodes it.
constexpr uint64_t kShimVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
  function = library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

const Shim* load_shim() {
  static Shim s;
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  const bool found =
      find(torch, "aoti_torch_library_init_impl", s.library_init_impl) &&
      find(torch, "torch_library_impl", s.library_impl) && find(torch, "torch_string_length", s.string_length) &&
      find(torch, "torch_string_c_str", s.string_c_str) && find(torch, "torch_delete_string", s.delete_string) &&
      find(torch, "torch_get_num_threads", s.get_num_threads) &&
      find(torch, "aoti_torch_get_data_ptr", s.get_data_ptr) && find(torch, "aoti_torch_get_dim", s.get_dim) &&
      find(torch, "aoti_torch_get_sizes", s.get_sizes) && find(torch, "aoti_torch_get_strides", s.get_strides) &&
      find(torch, "aoti_torch_get_dtype", s.get_dtype) &&
      find(torch, "aoti_torch_get_device_type", s.get_device_type) &&
      find(torch, "aoti_torch_get_device_index", s.get_device_index) &&
      find(torch, "aoti_torch_empty_strided", s.empty_strided) && find(torch, "aoti_torch_copy_", s.copy) &&
      find(torch, "aoti_torch_delete_tensor_object", s.delete_tensor) &&
      find(torch, "aoti_torch_device_type_cpu", s.device_type_cpu) &&
      find(torch, "aoti_torch_device_type_cuda", s.device_type_cuda) &&
      find(torch, "aoti_torch_dtype_uint8", s.dtype_uint8) && find(torch, "aoti_torch_dtype_int32", s.dtype_int32) &&
      find(torch, "aoti_torch_dtype_int64", s.dtype_int64) &&
      find(torch, "aoti_torch_dtype_float32", s.dtype_float32) &&
      find(torch, "aoti_torch_dtype_float16", s.dtype_float16) &&
      find(torch, "aoti_torch_dtype_bfloat16", s.dtype_bfloat16);
  if (!found) return nullptr;
  find(torch, "torch_delete_stable_ivalue", s.delete_stable_ivalue);
  find(dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY), "aoti_torch_get_current_cuda_stream",
       s.get_current_cuda_stream);
  s.cpu = s.device_type_cpu();
  s.cuda = s.device_type_cuda();
  s.uint8 = s.dtype_uint8();
  s.int32 = s.dtype_int32();
  s.int64 = s.dtype_int64();
  s.float32 = s.dtype_float32();
  s.float16 = s.dtype_float16();
  s.bfloat16 = s.dtype_bfloat16();
  return &s;
}

// Null if the process has no PyTorch, or one without it.
const Shim* shim_or_null() {
  static const Shim* const shim = load_shim();
  return shim;
}

const Shim& shim() { return *shim_or_null(); }

void torch_check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("PyTorch failed: ") + what);
}

// ---- Tensors ----

struct Device {
  int32_t type;
  int32_t index;
  bool operator==(const Device&) const = default;
  std::string name() const {
    if (type == shim().cpu) return "cpu";
    return "cuda:" + std::to_string(index);
  }
};

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

// Owns a handle, or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
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

  static Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, const Device& device) {
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

Tensor contiguous_copy(const Tensor& t) {
  Tensor copy = Tensor::empty(t.sizes, t.dim, t.dtype, t.device);
  torch_check(shim().copy(copy.get(), t.get(), 0), "copy_");
  return copy;
}

// x [..., K] as rows `ld` elements apart, copied only if it has none.
struct Rows {
  explicit Rows(const Tensor& t, const char* name = "x") {
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
  void* data;
  flexq_dtype dtype;
  int64_t rows;
  int64_t k;
  int64_t ld;
  Tensor copy;
};

struct Bias {
  Bias(const Tensor& t, int64_t n, const Device& device) {
    if (!t.defined()) return;
    if (!t.is_vector(n) || t.device != device) {
      refuse("bias must be contiguous [" + std::to_string(n) + "] on " + device.name() + ", got " + t.shape() + " on " +
             t.device.name());
    }
    data = t.data;
    dtype = dtype_of(t.dtype, "bias");
  }
  const void* data = nullptr;
  flexq_dtype dtype = FLEXQ_F32;
};

// Where PyTorch would run work on a device.
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

// ---- Operators ----

// An operator's arguments, which it owns from the start: all are read before anything can fail.
class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return Tensor(handle<AtenTensorHandle>(*next_++)); }
  Tensor optional_tensor() {
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
  int64_t integer() { return static_cast<int64_t>(*next_++); }
  // Conventions differ in how wide a dtype is.
  int32_t dtype() { return static_cast<int32_t>(static_cast<uint32_t>(*next_++)); }
  bool boolean() { return (*next_++ & 0xff) != 0; }  // the rest of the word may be anything
  double number() { return std::bit_cast<double>(*next_++); }
  std::string string() {
    const auto text = handle<StringHandle>(*next_++);
    const char* characters = nullptr;
    size_t length = 0;
    torch_check(shim().string_length(text, &length), "string_length");
    torch_check(shim().string_c_str(text, &characters), "string_c_str");
    std::string copy(characters, length);
    shim().delete_string(text);
    return copy;
  }

 private:
  template <typename Handle>
  static Handle handle(StableIValue value) {
    return reinterpret_cast<Handle>(static_cast<uintptr_t>(value));
  }
  const StableIValue* next_;
};

StableIValue result(Tensor tensor) { return reinterpret_cast<uintptr_t>(tensor.release()); }

int32_t act_bits_of(int64_t bits) {
  if (bits < 0 || bits > INT32_MAX) refuse("act_bits must be 6 or 8, got " + std::to_string(bits));
  return static_cast<int32_t>(bits);
}

// How an operator's activation is quantized.
struct Format {
  explicit Format(Arguments& arguments)
      : act_bits(arguments.integer()), scheme(arguments.string()), rotation(arguments.string()) {}
  int64_t act_bits;
  std::string scheme, rotation;
};

flexq_activation_desc activation_desc(int64_t m, int64_t k, const Format& format) {
  return {sizeof(flexq_activation_desc), m, k, act_bits_of(format.act_bits), scheme_of(format.scheme),
          rotation_of(format.rotation),  0};
}

int32_t weight_bits_of(int64_t bits) {
  if (bits < 0 || bits > INT32_MAX) refuse("weight_bits must be 4, 5, 6 or 8, got " + std::to_string(bits));
  return static_cast<int32_t>(bits);
}

flexq_weight_desc weight_desc(int64_t n, int64_t k, const Format& format, int64_t weight_bits) {
  return {sizeof(flexq_weight_desc),    n, k, weight_bits_of(weight_bits), scheme_of(format.scheme),
          rotation_of(format.rotation), 0};
}

// Room for a quantized activation.
Tensor activation_like(const flexq_stream& stream, const flexq_activation_desc& desc, const Device& device) {
  size_t bytes = 0;
  check(flexq_activation_size(&stream, &desc, &bytes));
  return Tensor::bytes(bytes, device);
}

// (Tensor x, int act_bits, str scheme, str rotation) -> Tensor
void quantize_activation(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const Format format(arguments);

  const Rows rows(x);
  const flexq_stream stream = stream_on(x.device);
  const flexq_activation_desc desc = activation_desc(rows.rows, rows.k, format);
  Tensor out = activation_like(stream, desc, x.device);
  check(flexq_quantize_activation(&stream, &desc, rows.data, rows.dtype, rows.ld, out.data,
                                  static_cast<size_t>(out.numel())));
  stack[0] = result(std::move(out));
}

// The quantized RMS norm of x + residual, and that sum.
std::pair<Tensor, Tensor> quantize_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps,
                                        const Format& format) {
  const Rows rows(x);
  if (residual.defined() && (!residual.same_shape(x) || residual.dtype != x.dtype || residual.device != x.device)) {
    refuse("residual must be like x, " + dtype_name(x.dtype) + " " + x.shape() + ", got " + dtype_name(residual.dtype) +
           " " + residual.shape());
  }
  if (!weight.is_vector(rows.k) || weight.dtype != x.dtype || weight.device != x.device) {
    refuse("weight must be contiguous " + dtype_name(x.dtype) + " [" + std::to_string(rows.k) + "] on " +
           x.device.name() + ", got " + dtype_name(weight.dtype) + " " + weight.shape());
  }
  std::optional<Rows> other;
  if (residual.defined()) other.emplace(residual, "residual");
  const flexq_stream stream = stream_on(x.device);
  const flexq_activation_desc desc = activation_desc(rows.rows, rows.k, format);
  Tensor out = activation_like(stream, desc, x.device);
  Tensor sum = Tensor::empty(x.sizes, x.dim, x.dtype, x.device);
  check(flexq_rms_norm_quantize(&stream, &desc, rows.data, rows.ld, other ? other->data : nullptr,
                                other ? other->ld : 0, weight.data, eps, rows.dtype, sum.data, rows.k, out.data,
                                static_cast<size_t>(out.numel())));
  return {std::move(out), std::move(sum)};
}

// The quantized silu(gate) * up, both `rows` rows of k elements.
Tensor quantize_product(const void* gate, int64_t ld_gate, const void* up, int64_t ld_up, flexq_dtype dtype,
                        int64_t rows, int64_t k, const Device& device, const Format& format) {
  const flexq_stream stream = stream_on(device);
  const flexq_activation_desc desc = activation_desc(rows, k, format);
  Tensor out = activation_like(stream, desc, device);
  check(flexq_silu_mul_quantize(&stream, &desc, gate, ld_gate, up, ld_up, dtype, out.data,
                                static_cast<size_t>(out.numel())));
  return out;
}

// quantized [M, K] x packed [N, K]^T + bias, of a dtype and of a shape [..., N] of M rows.
Tensor multiply(const Tensor& quantized, const Tensor& packed, const Tensor& bias, int64_t m, int64_t n, int64_t k,
                const Format& format, int32_t dtype, int64_t weight_bits, const std::vector<int64_t>& shape) {
  if (quantized.device != packed.device) {
    refuse("the activation is on " + quantized.device.name() + ", the weight on " + packed.device.name());
  }
  const flexq_dtype y_dtype = dtype_of(dtype, "dtype");
  const size_t packed_bytes = buffer_size(packed, "packed"), quantized_bytes = buffer_size(quantized, "quantized");
  const Bias b(bias, n, packed.device);
  const flexq_stream stream = stream_on(packed.device);
  const flexq_weight_desc desc = weight_desc(n, k, format, weight_bits);
  const flexq_activation_desc act_desc = activation_desc(m, k, format);
  size_t bytes = 0;
  check(flexq_gemm_workspace_size(&stream, &desc, act_desc.act_bits, m, &bytes));
  const Tensor workspace = bytes > 0 ? Tensor::bytes(bytes, packed.device) : Tensor();
  Tensor y = Tensor::empty(shape.data(), static_cast<int64_t>(shape.size()), dtype, packed.device);
  check(flexq_gemm(&stream, &desc, packed.data, packed_bytes, &act_desc, quantized.data, quantized_bytes, b.data,
                   b.dtype, y.data, y_dtype, n, workspace.data, bytes));
  return y;
}

// x's shape with n features.
std::vector<int64_t> with_features(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
  sizes.back() = n;
  return sizes;
}

// (Tensor x, Tensor? residual, Tensor weight, float eps, int act_bits, str scheme, str rotation) -> (Tensor, Tensor)
void rms_norm_quantize(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), residual = arguments.optional_tensor(), weight = arguments.tensor();
  const auto eps = static_cast<float>(arguments.number());
  const Format format(arguments);

  auto [quantized, sum] = quantize_norm(x, residual, weight, eps, format);
  stack[0] = result(std::move(quantized));
  stack[1] = result(std::move(sum));
}

// (Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor packed, Tensor? bias, int n, int act_bits,
//  str scheme, str rotation, int weight_bits) -> (Tensor, Tensor)
void rms_norm_linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), residual = arguments.optional_tensor(), norm_weight = arguments.tensor();
  const auto eps = static_cast<float>(arguments.number());
  const Tensor packed = arguments.tensor(), bias = arguments.optional_tensor();
  const int64_t n = arguments.integer();
  const Format format(arguments);
  const int64_t weight_bits = arguments.integer();

  auto [quantized, sum] = quantize_norm(x, residual, norm_weight, eps, format);
  const int64_t k = x.sizes[x.dim - 1];
  stack[0] =
      result(multiply(quantized, packed, bias, x.numel() / k, n, k, format, x.dtype, weight_bits, with_features(x, n)));
  stack[1] = result(std::move(sum));
}

// (Tensor gate, Tensor up, int act_bits, str scheme, str rotation) -> Tensor
void silu_mul_quantize(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor gate = arguments.tensor(), up = arguments.tensor();
  const Format format(arguments);

  if (!up.same_shape(gate) || up.dtype != gate.dtype || up.device != gate.device) {
    refuse("up must be like gate, " + dtype_name(gate.dtype) + " " + gate.shape() + ", got " + dtype_name(up.dtype) +
           " " + up.shape());
  }
  const Rows rows(gate, "gate"), other(up, "up");
  stack[0] = result(
      quantize_product(rows.data, rows.ld, other.data, other.ld, rows.dtype, rows.rows, rows.k, gate.device, format));
}

// (Tensor gate_up, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation, int weight_bits)
//  -> Tensor
void silu_mul_linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor gate_up = arguments.tensor(), packed = arguments.tensor(), bias = arguments.optional_tensor();
  const int64_t n = arguments.integer();
  const Format format(arguments);
  const int64_t weight_bits = arguments.integer();

  const int64_t features = gate_up.dim == 0 ? 0 : gate_up.sizes[gate_up.dim - 1];
  if (features == 0 || features % 2 != 0) {
    refuse("gate_up must be [..., 2K] with K at least 1, got " + gate_up.shape());
  }
  const Rows rows(gate_up, "gate_up");
  const int64_t k = features / 2;
  const auto* up = static_cast<const char*>(rows.data) + k * (rows.dtype == FLEXQ_F32 ? 4 : 2);
  const Tensor quantized =
      quantize_product(rows.data, rows.ld, up, rows.ld, rows.dtype, rows.rows, k, gate_up.device, format);
  stack[0] = result(multiply(quantized, packed, bias, rows.rows, n, k, format, gate_up.dtype, weight_bits,
                             with_features(gate_up, n)));
}

// (Tensor quantized, Tensor packed, Tensor? bias, SymInt m, int n, int k, int act_bits, str scheme, str rotation,
//  ScalarType dtype, int weight_bits) -> Tensor
void gemm(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor quantized = arguments.tensor(), packed = arguments.tensor(), bias = arguments.optional_tensor();
  const int64_t m = arguments.integer(), n = arguments.integer(), k = arguments.integer();
  const Format format(arguments);
  const int32_t dtype = arguments.dtype();
  const int64_t weight_bits = arguments.integer();

  stack[0] = result(multiply(quantized, packed, bias, m, n, k, format, dtype, weight_bits, {m, n}));
}

// (Tensor x, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation, int weight_bits) -> Tensor
void linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), packed = arguments.tensor(), bias = arguments.optional_tensor();
  const int64_t n = arguments.integer();
  const Format format(arguments);
  const int64_t weight_bits = arguments.integer();

  if (x.device != packed.device) {
    refuse("x is on " + x.device.name() + ", the weight on " + packed.device.name());
  }
  const Rows rows(x);
  const size_t packed_bytes = buffer_size(packed, "packed");
  const Bias b(bias, n, x.device);
  const flexq_stream stream = stream_on(x.device);
  const flexq_weight_desc desc = weight_desc(n, rows.k, format, weight_bits);
  const int32_t act_bits = act_bits_of(format.act_bits);
  size_t bytes = 0;
  check(flexq_linear_workspace_size(&stream, &desc, act_bits, rows.rows, &bytes));
  const Tensor workspace = bytes > 0 ? Tensor::bytes(bytes, x.device) : Tensor();
  const std::vector<int64_t> shape = with_features(x, n);
  Tensor y = Tensor::empty(shape.data(), x.dim, x.dtype, x.device);
  check(flexq_linear(&stream, &desc, packed.data, packed_bytes, act_bits, rows.rows, rows.data, rows.dtype, rows.ld,
                     b.data, b.dtype, y.data, rows.dtype, n, workspace.data, bytes));
  stack[0] = result(std::move(y));
}

// The arguments of flexq.ops.ExpertsDesc, in its order.
flexq_experts_desc read_experts_desc(Arguments& arguments) {
  const int64_t experts = arguments.integer(), hidden = arguments.integer(), intermediate = arguments.integer();
  struct Projection {
    std::string scheme, rotation;
    int64_t act_bits;
  } projections[2];
  for (Projection& projection : projections) {
    projection.scheme = arguments.string();
    projection.rotation = arguments.string();
    projection.act_bits = arguments.integer();
  }
  const std::string function = arguments.string();
  float numbers[3];
  for (float& number : numbers) number = static_cast<float>(arguments.number());
  const bool interleaved = arguments.boolean();
  const int32_t up_bits = weight_bits_of(arguments.integer()), down_bits = weight_bits_of(arguments.integer());
  const auto& [up, down] = projections;
  return experts_desc(experts, hidden, intermediate, up.scheme, up.rotation, act_bits_of(up.act_bits), down.scheme,
                      down.rotation, act_bits_of(down.act_bits), function, numbers[0], numbers[1], numbers[2],
                      interleaved, up_bits, down_bits);
}

struct ExpertBias {
  ExpertBias(const Tensor& t, const char* name, int64_t experts, int64_t n, const Device& device) {
    if (!t.defined()) return;
    const int64_t expected[] = {experts, n};
    if (t.dim != 2 || t.sizes[0] != experts || t.sizes[1] != n || !t.contiguous() || t.device != device) {
      refuse(std::string(name) + " must be contiguous " + text_of(expected, 2) + " on " + device.name() + ", got " +
             t.shape() + " on " + t.device.name());
    }
    data = t.data;
    dtype = dtype_of(t.dtype, name);
  }
  const void* data = nullptr;
  flexq_dtype dtype = FLEXQ_F32;
};

// (Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,
//  Tensor? expert_map, bool weights_on_input, ...ExpertsDesc) -> Tensor
void experts_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), ids = arguments.tensor(), weights = arguments.tensor();
  const Tensor gate_up = arguments.tensor(), down = arguments.tensor();
  const Tensor gate_up_bias = arguments.optional_tensor(), down_bias = arguments.optional_tensor();
  const Tensor expert_map = arguments.optional_tensor();
  const bool weights_on_input = arguments.boolean();
  const flexq_experts_desc desc = read_experts_desc(arguments);

  const Rows rows(x);
  if (rows.k != desc.hidden) refuse("x must be [..., " + std::to_string(desc.hidden) + "], got " + x.shape());
  const bool same_rows = ids.dim == x.dim && std::equal(ids.sizes, ids.sizes + ids.dim - 1, x.sizes);
  if ((ids.dtype != shim().int32 && ids.dtype != shim().int64) || !same_rows || ids.sizes[ids.dim - 1] == 0) {
    std::string expected = text_of(x.sizes, x.dim - 1);
    expected.insert(expected.size() - 1, x.dim > 1 ? ", 'top_k'" : "'top_k'");
    refuse("ids must be int32 or int64 " + expected + ", got " + dtype_name(ids.dtype) + " " + ids.shape());
  }
  if (!weights.same_shape(ids)) refuse("weights must be like ids, " + ids.shape() + ", got " + weights.shape());
  flexq_routing routing = FLEXQ_ROUTING_INIT;
  routing.weights_dtype = dtype_of(weights.dtype, "weights");
  if (expert_map.defined()) {
    if (expert_map.dtype != shim().int32 || expert_map.dim != 1 || !expert_map.contiguous()) {
      refuse("expert_map must be contiguous int32 [experts everywhere], got " + dtype_name(expert_map.dtype) + " " +
             expert_map.shape());
    }
    routing.expert_map = static_cast<const int32_t*>(expert_map.data);
    routing.map_size = expert_map.numel();
  }
  const std::pair<const char*, const Tensor*> others[] = {
      {"ids", &ids}, {"weights", &weights}, {"gate_up", &gate_up}, {"down", &down}, {"expert_map", &expert_map}};
  for (const auto& [name, tensor] : others) {
    if (tensor->defined() && tensor->device != x.device) refuse("x is on " + x.device.name() + ", " + name + " not");
  }
  const ExpertBias up_bias(gate_up_bias, "gate_up_bias", desc.experts, 2 * desc.intermediate, x.device);
  const ExpertBias out_bias(down_bias, "down_bias", desc.experts, desc.hidden, x.device);
  if (up_bias.data != nullptr && out_bias.data != nullptr && up_bias.dtype != out_bias.dtype) {
    refuse("gate_up_bias and down_bias must have the same dtype");
  }
  const size_t gate_up_bytes = buffer_size(gate_up, "gate_up"), down_bytes = buffer_size(down, "down");
  const Tensor ids_copy = ids.contiguous() ? Tensor() : contiguous_copy(ids);
  const Tensor weights_copy = weights.contiguous() ? Tensor() : contiguous_copy(weights);
  routing.m = rows.rows;
  routing.top_k = ids.sizes[ids.dim - 1];
  routing.ids = ids_copy.defined() ? ids_copy.data : ids.data;
  routing.weights = weights_copy.defined() ? weights_copy.data : weights.data;
  routing.ids_type = ids.dtype == shim().int64 ? FLEXQ_I64 : FLEXQ_I32;
  routing.weights_on_input = weights_on_input;
  const flexq_stream stream = stream_on(x.device);
  size_t bytes = 0;
  check(flexq_experts_workspace_size(&stream, &desc, rows.rows, routing.top_k, rows.dtype, &bytes));
  const Tensor workspace = bytes > 0 ? Tensor::bytes(bytes, x.device) : Tensor();
  Tensor y = Tensor::empty(x.sizes, x.dim, x.dtype, x.device);
  check(flexq_experts_forward(&stream, &desc, gate_up.data, gate_up_bytes, down.data, down_bytes, &routing, rows.data,
                              rows.dtype, rows.ld, up_bias.data, out_bias.data, std::max(up_bias.dtype, out_bias.dtype),
                              y.data, rows.dtype, desc.hidden, workspace.data, bytes));
  stack[0] = result(std::move(y));
}

constexpr std::pair<std::string_view, Kernel> kKernels[] = {{"quantize_activation", quantize_activation},
                                                            {"rms_norm_quantize", rms_norm_quantize},
                                                            {"silu_mul_quantize", silu_mul_quantize},
                                                            {"rms_norm_linear", rms_norm_linear},
                                                            {"silu_mul_linear", silu_mul_linear},
                                                            {"gemm", gemm},
                                                            {"linear", linear},
                                                            {"experts_forward", experts_forward}};

bool implement(const std::string& name, const std::string& key) {
  if (shim_or_null() == nullptr || (key == "CUDA" && shim().get_current_cuda_stream == nullptr)) return false;
  for (const auto& [known, kernel] : kKernels) {
    if (known != name) continue;
    TorchLibraryHandle library = nullptr;  // kept for as long as the process runs, like the module
    torch_check(shim().library_init_impl("flexq", key.c_str(), "torch_ops.cpp", __LINE__, &library),
                "library_init_impl");
    torch_check(shim().library_impl(library, name.c_str(), kernel, kShimVersion), "library_impl");
    return true;
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
