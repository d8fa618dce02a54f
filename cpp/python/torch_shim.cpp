#include "torch_shim.h"

#include <dlfcn.h>

namespace flexq::python {
namespace {

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
  function = library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

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

}  // namespace flexq::python
