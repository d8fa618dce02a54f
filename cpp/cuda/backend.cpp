// The CUDA backend behind core/backend.h: devices, workspace and the order of launches.
#include "core/backend.h"

#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>

#include "core/error.h"
#include "cuda/choices.h"
#include "cuda/dispatch.h"
#include "cuda/experts/forward.h"
#include "cuda/kernels.h"
#include "cuda/layout.h"

namespace flexq {
namespace cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so not to be found by whoever asks next
  fail(FLEXQ_DEVICE_ERROR, what, ": ", cudaGetErrorString(error));
}

namespace {

constexpr int kOldestMajor = 8;
#if defined(FLEXQ_HAS_SM90A)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;  // this build has no code for sm_90a
#endif
// Sums are of 4 * code in int32 here, where the CPU's are of code.
constexpr int64_t kMaxChannelK = int64_t{1} << 17;
// What kernels count in int, and what grids of a thread a few elements hold: more than any GPU's memory.
constexpr int64_t kMaxSide = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxElements = int64_t{1} << 38;

void check_side(const char* name, int64_t size) {
  if (size > kMaxSide) fail(FLEXQ_UNSUPPORTED, name, " must be at most ", kMaxSide, " on CUDA, got ", size);
}

void check_elements(const char* a_name, int64_t a, const char* b_name, int64_t b) {
  check_side(a_name, a);
  check_side(b_name, b);
  if (a > 0 && b > kMaxElements / a) {
    fail(FLEXQ_UNSUPPORTED, a_name, " * ", b_name, " must be at most 2^38 on CUDA, got ", a, " * ", b);
  }
}

void check_sizes(const flexq_weight_desc& desc) { check_elements("n", desc.n, "k", padded_k(desc.k)); }
void check_sizes(const flexq_activation_desc& desc) { check_elements("m", desc.m, "k", padded_k(desc.k)); }

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

Device query_device(int32_t device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  // Two transfers a clock (kHz) of so many bits.
  const double peak =
      2e-3 * attribute(cudaDevAttrMemoryClockRate, device) * (attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8.0);
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  const double clocks = 1e-3 * attribute(cudaDevAttrClockRate, device);
  const int sm = 10 * major + attribute(cudaDevAttrComputeCapabilityMinor, device);
  const auto [name, costs] =
      cost_table_for({.sm = sm, .num_sms = sms, .memory_bytes_per_us = peak, .clocks_per_us = clocks});
  Device d{.num_sms = sms,
           .has_sm90 = major >= 9,
           .has_wgmma = kHasWgmma && major == 9,
           .shared_per_cta = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
           .dram_bytes_per_us = costs.bandwidth_share * peak,
           .clocks_per_us = clocks,
           .costs = costs,
           .cost_table_name = name,
           .cost_table_text = cost_table_text(costs),
           .clusters = {}};
  if (d.has_wgmma) {
    const DeviceScope scope(device);
    d.clusters = wgmma_clusters();
  }
  return d;
}

// Asked for once, as the driver reads clock rates from the device, which is too slow for every call; and only of
// devices in use, as it needs their contexts.
const Device& device_of(const flexq_stream& stream) {
  struct Known {
    std::once_flag once;
    Device device;
  };
  static std::deque<Known> devices = [] {
    int count = 0;
    check(cudaGetDeviceCount(&count), "device count");
    return std::deque<Known>(static_cast<size_t>(count));
  }();
  Known& known = devices.at(static_cast<size_t>(stream.device_index));
  std::call_once(known.once, [&] { known.device = query_device(stream.device_index); });
  return known.device;
}

cudaStream_t handle(const flexq_stream& stream) { return static_cast<cudaStream_t>(stream.handle); }

class CudaBackend final : public Backend {
 public:
  void check_available(int32_t device_index) const override {
    constexpr int32_t kRemembered = 64;
    static std::array<std::atomic<bool>, kRemembered> fine{};  // devices found to be so, as every call asks
    const bool remembered = device_index >= 0 && device_index < kRemembered;
    if (remembered && fine[static_cast<size_t>(device_index)].load(std::memory_order_relaxed)) return;
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
    if (remembered) fine[static_cast<size_t>(device_index)].store(true, std::memory_order_relaxed);
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

  int64_t quantize_weight(const flexq_stream& stream, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                          int64_t ldw, uint8_t* planes, uint16_t* scales) const override {
    check_sizes(desc);
    const DeviceScope scope(stream.device_index);
    return cuda::quantize_weight(handle(stream), desc, w, dtype, ldw, planes, scales);
  }
  void pack_codes(const flexq_stream& stream, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc,
                  uint8_t* planes) const override {
    check_sizes(desc);
    const DeviceScope scope(stream.device_index);
    cuda::pack_codes(handle(stream), desc, codes, ldc, planes);
  }

  size_t prepack_size(const flexq_weight_desc& desc) const override {
    check_sizes(desc);
    return WeightLayout(desc).size;
  }
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

  size_t activation_size(const flexq_activation_desc& desc) const override {
    check_sizes(desc);
    return ActivationLayout(desc).size;
  }
  void quantize_activation(const flexq_stream& stream, const flexq_activation_desc& desc,
                           const ActivationSource& source, void* quantized) const override {
    const DeviceScope scope(stream.device_index);
    cuda::quantize_activation(handle(stream), device_of(stream), desc, source, quantized);
  }
  void activation_export(const flexq_stream& stream, const flexq_activation_desc& desc, const void* quantized,
                         int8_t* codes, float* scales) const override {
    const DeviceScope scope(stream.device_index);
    cuda::activation_export(handle(stream), desc, quantized, codes, scales);
  }

  size_t gemm_workspace_size(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t act_bits,
                             int64_t m) const override {
    check_gemm(desc, m);
    if (m == 0 || desc.n == 0) return 0;
    const GemmPlan chosen = plan(stream, desc, act_bits, m);
    if (chosen.family == GemmPlan::kWgmma) return wgmma_workspace_size(device_of(stream), chosen, desc, m);
    return mma_workspace_size(chosen, desc, m);
  }

  int32_t gemm_kernels(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t act_bits, int64_t m,
                       flexq_kernel_info* infos, int32_t capacity) const override {
    check_gemm(desc, m);
    if (m == 0 || desc.n == 0) return 0;
    int32_t count = 0;
    for (const Candidate& candidate : Candidates(device_of(stream), desc, act_bits, m)) {
      if (count < capacity) {
        std::memcpy(infos[count].name, name_of(candidate.plan).text, sizeof infos[count].name);
        infos[count].estimated_microseconds = candidate.microseconds;
      }
      ++count;
    }
    return count;
  }

  CostTableText cost_table(const flexq_stream& stream) const override {
    const Device& device = device_of(stream);
    return {device.cost_table_name.c_str(), device.cost_table_text.c_str()};
  }

  void gemm(const flexq_stream& stream, const GemmCall& call) const override {
    const GemmPlan chosen = plan_of(stream, call);
    const DeviceScope scope(stream.device_index);
    run(stream, call, chosen);
  }

  void linear(const flexq_stream& stream, const ActivationSource& source, const GemmCall& call) const override {
    const GemmPlan chosen = plan_of(stream, call);  // or refused, before anything is queued
    const DeviceScope scope(stream.device_index);
    cuda::quantize_activation(handle(stream), device_of(stream), call.act_desc, source,
                              const_cast<void*>(call.quantized));
    run(stream, call, chosen);
  }

  size_t experts_workspace_size(const flexq_stream& stream, const flexq_experts_desc& desc, int64_t m, int64_t top_k,
                                flexq_dtype x_dtype) const override {
    check_experts(desc);
    return m == 0 ? 0 : experts::workspace_size(device_of(stream), stream, desc, m, top_k, x_dtype);
  }

  void experts_forward(const flexq_stream& stream, const ExpertsCall& call) const override {
    const Device& device = device_of(stream);
    const DeviceScope scope(stream.device_index);
    experts::forward(device, stream, call,
                     {static_cast<int64_t>(expert_bytes(call.desc, FLEXQ_GATE_UP)),
                      static_cast<int64_t>(expert_bytes(call.desc, FLEXQ_DOWN))});
  }

 private:
  static void check_experts(const flexq_experts_desc& desc) {
    if (desc.experts > experts::kMaxExperts) {
      fail(FLEXQ_UNSUPPORTED, "experts must be at most ", experts::kMaxExperts, " on CUDA, got ", desc.experts);
    }
    for (const flexq_projection projection : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      check_gemm(weight_of_expert(desc, projection), experts::kMaxPairs);
    }
  }

  static void check_gemm(const flexq_weight_desc& desc, int64_t m) {
    check_sizes(desc);
    check_elements("m", m, "n", desc.n);
    if (desc.scheme == FLEXQ_SCHEME_CHANNEL && desc.k > kMaxChannelK) {
      fail(FLEXQ_UNSUPPORTED, "scheme channel on CUDA takes k up to ", kMaxChannelK, ", got ", desc.k,
           "; use scheme group");
    }
  }

  static GemmPlan plan(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t act_bits, int64_t m) {
    const auto candidates = [&] { return Candidates(device_of(stream), desc, act_bits, m); };
    thread_local Choices<7, GemmPlan> choices;  // as the model of cost is asked it of every candidate
    return stream.kernel != nullptr
               ? candidates().named(stream.kernel).plan
               : choices.get({desc.n, desc.k, m, stream.device_index, desc.scheme, act_bits, desc.weight_bits},
                             [&] { return candidates().best().plan; });
  }

  static GemmPlan plan_of(const flexq_stream& stream, const GemmCall& call) {
    check_gemm(call.desc, call.act_desc.m);
    return plan(stream, call.desc, call.act_desc.act_bits, call.act_desc.m);
  }

  static void run(const flexq_stream& stream, const GemmCall& call, const GemmPlan& chosen) {
    const GemmArgs args{call.desc,       call.prepacked, call.act_desc, call.quantized, call.bias,
                        call.bias_dtype, call.y,         call.y_dtype,  call.ldy,       call.workspace};
    const auto gemm = chosen.family == GemmPlan::kMma ? gemm_mma : gemm_wgmma;
    gemm(handle(stream), device_of(stream), args, chosen);
  }
};

}  // namespace
}  // namespace cuda

const Backend* cuda_backend() {
  static const cuda::CudaBackend backend;
  return &backend;
}

}  // namespace flexq
