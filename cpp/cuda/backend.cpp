// The CUDA backend behind core/backend.h: devices, workspace and the order of launches.
#include "core/backend.h"

#include <algorithm>

#include "core/error.h"
#include "cuda/kernels.h"
#include "cuda/layout.h"

namespace flexq {
namespace cuda {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(FLEXQ_DEVICE_ERROR, what, ": ", cudaGetErrorString(error));
}

namespace {

constexpr int kOldestMajor = 8;
// Sums are of 4 * code in int32 here, where the CPU's are of code.
constexpr int64_t kMaxChannelK = int64_t{1} << 17;

int attribute(cudaDeviceAttr which, int32_t device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

// Makes a device current for a scope, and the caller's one again at its end.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    check(cudaGetDevice(&before_), "current device");
    if (device != before_) check(cudaSetDevice(device), "set device");
    changed_ = device != before_;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

Device device_of(const flexq_stream& stream) {
  return {attribute(cudaDevAttrMultiProcessorCount, stream.device_index),
          attribute(cudaDevAttrComputeCapabilityMajor, stream.device_index) >= 9};
}

cudaStream_t handle(const flexq_stream& stream) { return static_cast<cudaStream_t>(stream.handle); }

class CudaBackend final : public Backend {
 public:
  void check_available(int32_t device_index) const override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
      cudaGetLastError();  // not to be found by whoever asks next
      fail(FLEXQ_UNAVAILABLE, "no usable CUDA device: ", cudaGetErrorString(error));
    }
    if (device_index < 0 || device_index >= count) {
      fail(FLEXQ_UNAVAILABLE, "device_index must be 0 to ", count - 1, ", got ", device_index);
    }
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device_index);
    if (major < kOldestMajor) {
      fail(FLEXQ_UNAVAILABLE, "CUDA device ", device_index, " has compute capability ", major, ".",
           attribute(cudaDevAttrComputeCapabilityMinor, device_index), "; FlexQ needs 8.0 or later");
    }
  }

  const char* isa(int32_t device_index) const override {
    const int version = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device_index) +
                        attribute(cudaDevAttrComputeCapabilityMinor, device_index);
    switch (version) {
      case 80:
        return "sm_80";
      case 86:
        return "sm_86";
      case 89:
        return "sm_89";
      case 90:
        return "sm_90";
      default:
        return "sm_80 or later";
    }
  }

  size_t prepack_size(const flexq_weight_desc& desc) const override { return WeightLayout(desc).size; }
  void prepack(const flexq_stream& stream, const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
               void* prepacked) const override {
    const DeviceScope scope(stream.device_index);
    cuda::prepack(handle(stream), desc, planes, scales, prepacked);
  }
  void unprepack(const flexq_stream& stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
                 uint16_t* scales) const override {
    const DeviceScope scope(stream.device_index);
    cuda::unprepack(handle(stream), desc, prepacked, planes, scales);
  }

  size_t activation_size(const flexq_activation_desc& desc) const override { return ActivationLayout(desc).size; }
  void quantize_activation(const flexq_stream& stream, const flexq_activation_desc& desc, const void* x,
                           flexq_dtype dtype, int64_t ldx, void* quantized) const override {
    const DeviceScope scope(stream.device_index);
    cuda::quantize_activation(handle(stream), device_of(stream), desc, x, dtype, ldx, quantized);
  }
  void activation_export(const flexq_stream& stream, const flexq_activation_desc& desc, const void* quantized,
                         int8_t* codes, float* scales) const override {
    const DeviceScope scope(stream.device_index);
    cuda::activation_export(handle(stream), desc, quantized, codes, scales);
  }

  size_t gemm_workspace_size(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t,
                             int64_t m) const override {
    check_desc(desc);
    return m == 0 || desc.n == 0 ? 0 : plan(stream, desc, m).workspace_bytes;
  }

  void gemm(const flexq_stream& stream, const GemmCall& call) const override {
    const DeviceScope scope(stream.device_index);
    run(stream, call, false);
  }

  void linear(const flexq_stream& stream, const LinearInput& input, const GemmCall& call) const override {
    const DeviceScope scope(stream.device_index);
    cuda::quantize_activation(handle(stream), device_of(stream), call.act_desc, input.x, input.dtype, input.ldx,
                              const_cast<void*>(call.quantized));
    run(stream, call, true);
  }

 private:
  static void check_desc(const flexq_weight_desc& desc) {
    if (desc.scheme == FLEXQ_SCHEME_CHANNEL && desc.k > kMaxChannelK) {
      fail(FLEXQ_UNSUPPORTED, "scheme channel on CUDA takes k up to ", kMaxChannelK, ", got ", desc.k,
           "; use scheme group");
    }
  }

  static GemmPlan plan(const flexq_stream& stream, const flexq_weight_desc& desc, int64_t m) {
    check_desc(desc);
    return plan_gemm_s8(device_of(stream), desc, m);
  }

  static void run(const flexq_stream& stream, const GemmCall& call, bool overlapped) {
    const GemmPlan p = plan(stream, call.desc, call.act_desc.m);
    const GemmArgs args{call.desc,       call.prepacked, call.act_desc, call.quantized, call.bias,
                        call.bias_dtype, call.y,         call.y_dtype,  call.ldy,       call.workspace};
    for (int64_t token = 0; token < call.act_desc.m; token += kMaxTokensPerPass) {
      const int64_t tokens = std::min<int64_t>(kMaxTokensPerPass, call.act_desc.m - token);
      gemm_s8(handle(stream), device_of(stream), args, p, token, tokens, overlapped || token > 0);
    }
  }
};

}  // namespace
}  // namespace cuda

const Backend* cuda_backend() {
  static const cuda::CudaBackend backend;
  return &backend;
}

}  // namespace flexq
