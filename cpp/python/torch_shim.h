// PyTorch's own C shim (libtorch's stable ABI, torch/csrc/stable/c/shim.h), looked up in the libraries that the process
// has loaded, so that one build works with every version from 2.10 on and needs none to be built.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace flexq::python {

using StableIValue = uint64_t;  // an int64_t, a double, a handle, or the address of another one
struct TensorOpaque;
struct LibraryOpaque;
struct StringOpaque;
using AtenTensorHandle = TensorOpaque*;
using TorchLibraryHandle = LibraryOpaque*;
using StringHandle = StringOpaque*;
using Kernel = void (*)(StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs);

// Names and types are PyTorch's; every function returns 0 unless it failed.
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

// Null if the process has no PyTorch, or one without it.
const Shim* load_shim();

inline const Shim* shim_or_null() {
  static const Shim* const shim = load_shim();
  return shim;
}

inline const Shim& shim() { return *shim_or_null(); }

// Of what a function of the shim returned.
inline void torch_check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("PyTorch failed: ") + what);
}

}  // namespace flexq::python
