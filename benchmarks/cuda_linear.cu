// Time of a whole linear layer on a GPU (bf16 in, bf16 out, activation quantization included) and of its two kernels,
// against the time to read its prepacked weight once, measured here on the same buffers. CUDA graphs over copies of the
// weight that L2 cannot hold; medians.
//
//   cmake --preset cuda -DFLEXQ_BUILD_BENCHMARKS=ON && cmake --build --preset cuda
//   build/cuda/benchmarks/cuda_linear [--kernels] [W4|W5|W6|W8 ...] [NxK ...] [M ...]
//   build/cuda/benchmarks/cuda_linear --layer [HIDDENxINTERMEDIATE ...] [M ...]
//
// --kernels: instead, each kernel that could run the GEMM, the model's time, its own and that of the
// whole linear, as rows of CSV.
// --layer: instead, the linear layers of a decoder layer with the norms, sums and activation between them fused into
// their quantizers, but without its attention.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda_timing.cuh"
#include "flexq/flexq.hpp"

namespace {

using namespace timing;

// Of a GEMM and of a whole linear with copies of a weight, by `kernel` or the library's choice.
struct Times {
  double linear, gemm;
};
Times times_of(const flexq::Stream& stream, const char* kernel, const flexq::WeightDesc& desc, int32_t bits, int64_t m,
               size_t bytes, const std::vector<uint8_t*>& weights, const uint16_t* x, uint16_t* y, int rounds) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const int count = 2 * static_cast<int>(weights.size());
  const auto weight = [&](int i) { return weights[static_cast<size_t>(i) % weights.size()]; };
  flexq_stream with = stream;
  with.kernel = kernel;
  const flexq::ActivationDesc act(m, desc.k, bits, desc.scheme, desc.rotation);
  size_t linear_bytes = 0, gemm_bytes = 0, act_bytes = 0;
  flexq::check(flexq_linear_workspace_size(&with, &desc, bits, m, &linear_bytes));
  flexq::check(flexq_gemm_workspace_size(&with, &desc, bits, m, &gemm_bytes));
  flexq::check(flexq_activation_size(&with, &act, &act_bytes));
  auto* linear_workspace = allocate<uint8_t>(linear_bytes);
  auto* gemm_workspace = allocate<uint8_t>(gemm_bytes);
  auto* quantized = allocate<uint8_t>(act_bytes);
  flexq::check(flexq_quantize_activation(&with, &act, x, FLEXQ_BF16, desc.k, quantized, act_bytes));
  Times times{};
  times.linear = microseconds(
      handle, count,
      [&](int i) {
        flexq::check(flexq_linear(&with, &desc, weight(i), bytes, bits, m, x, FLEXQ_BF16, desc.k, nullptr, FLEXQ_F32, y,
                                  FLEXQ_BF16, desc.n, linear_workspace, linear_bytes));
      },
      rounds);
  times.gemm = microseconds(
      handle, count,
      [&](int i) {
        flexq::check(flexq_gemm(&with, &desc, weight(i), bytes, &act, quantized, act_bytes, nullptr, FLEXQ_F32, y,
                                FLEXQ_BF16, desc.n, gemm_workspace, gemm_bytes));
      },
      rounds);
  for (auto* p : {linear_workspace, gemm_workspace, quantized}) check(cudaFree(p));
  return times;
}

// Each candidate that is not out of the question; the library chooses the first.
void bench_kernels(const flexq::Stream& stream, const flexq::WeightDesc& desc, int64_t m, size_t bytes,
                   const std::vector<uint8_t*>& weights, const uint16_t* x, uint16_t* y) {
  int32_t count = 0;
  flexq::check(flexq_gemm_kernels(&stream, &desc, 8, m, nullptr, 0, &count));
  std::vector<flexq_kernel_info> infos(static_cast<size_t>(count), FLEXQ_KERNEL_INFO_INIT);
  flexq::check(flexq_gemm_kernels(&stream, &desc, 8, m, infos.data(), count, &count));
  for (size_t i = 0; i < infos.size(); ++i) {
    if (infos[i].estimated_microseconds > 2 * infos[0].estimated_microseconds) break;
    constexpr int kFewRounds = 3;  // there are many
    const Times times = times_of(stream, infos[i].name, desc, 8, m, bytes, weights, x, y, kFewRounds);
    std::printf("%lld,%lld,%s,%lld,%zu,%s,%.2f,%.2f,%.2f\n", static_cast<long long>(desc.n),
                static_cast<long long>(desc.k), desc.scheme == FLEXQ_SCHEME_GROUP ? "group" : "channel",
                static_cast<long long>(m), i, infos[i].name, infos[i].estimated_microseconds, times.gemm, times.linear);
  }
}

// Copies of a weight with pseudo-random codes and scales.
struct Weight {
  flexq::WeightDesc desc;
  size_t bytes = 0;
  std::vector<uint8_t*> copies;

  Weight(const flexq::Stream& stream, int64_t n, int64_t k, flexq_scheme scheme, size_t count, int32_t bits = 6)
      : desc(n, k, scheme, FLEXQ_ROTATION_HADAMARD128, bits) {
    const auto handle = static_cast<cudaStream_t>(stream.handle);
    size_t planes_bytes = 0, scales_bytes = 0;
    flexq::check(flexq_weight_size(&desc, &planes_bytes, &scales_bytes));
    flexq::check(flexq_prepack_size(&stream, &desc, &bytes));
    auto* planes = allocate<uint8_t>(planes_bytes);
    auto* scales = allocate<uint16_t>(scales_bytes / 2);
    fill<<<1024, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(planes), planes_bytes / 4, ~0u, 0);
    fill<<<1024, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(scales), scales_bytes / 4, 0x03ff03ffu, 0x20002000u);
    for (size_t i = 0; i < count; ++i) {
      copies.push_back(allocate<uint8_t>(bytes));
      flexq::check(flexq_prepack(&stream, &desc, planes, scales, copies.back(), bytes));
    }
    check(cudaStreamSynchronize(handle));
    check(cudaFree(planes));
    check(cudaFree(scales));
  }
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  ~Weight() {
    for (auto* copy : copies) check(cudaFree(copy));
  }
};

double read_microseconds(cudaStream_t handle, const std::vector<uint8_t*>& buffers, size_t bytes) {
  auto* sink = allocate<uint32_t>(1);
  double floor = 1e9;
  for (const int blocks : {528, 1056, 2112}) {
    floor = std::min(floor, microseconds(handle, 2 * static_cast<int>(buffers.size()), [&](int i) {
                       read<<<blocks, 512, 0, handle>>>(
                           reinterpret_cast<const uint4*>(buffers[static_cast<size_t>(i) % buffers.size()]), bytes / 16,
                           sink);
                     }));
  }
  check(cudaFree(sink));
  return floor;
}

void bench_layer(const flexq::Stream& stream, int64_t hidden, int64_t intermediate, flexq_scheme scheme,
                 const std::vector<int64_t>& tokens) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  constexpr size_t kLayers = 6;
  const Weight qkv(stream, 3 * hidden, hidden, scheme, kLayers), o(stream, hidden, hidden, scheme, kLayers),
      gate_up(stream, 2 * intermediate, hidden, scheme, kLayers), down(stream, hidden, intermediate, scheme, kLayers);
  const double floor = read_microseconds(handle, gate_up.copies, gate_up.bytes) *
                       static_cast<double>(qkv.bytes + o.bytes + gate_up.bytes + down.bytes) /
                       static_cast<double>(gate_up.bytes);
  std::printf("layer %lldx%lld %s: floor %.1f us\n", static_cast<long long>(hidden),
              static_cast<long long>(intermediate), scheme == FLEXQ_SCHEME_GROUP ? "group" : "channel", floor);
  auto* norm = allocate<uint16_t>(static_cast<size_t>(hidden));
  fill<<<64, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(norm), static_cast<size_t>(hidden) / 2, 0x000f000fu,
                               0x3c003c00u);
  for (const int64_t m : tokens) {
    const auto count = [&](int64_t width) { return static_cast<size_t>(m * width); };
    auto* sum = allocate<uint16_t>(count(hidden));
    auto* heads = allocate<uint16_t>(count(3 * hidden));
    auto* gates = allocate<uint16_t>(count(2 * intermediate));
    auto* out = allocate<uint16_t>(count(hidden));
    for (auto* p : {sum, out}) {
      fill<<<64, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(p), count(hidden) / 2, 0x80ff80ffu, 0x3f003f00u);
    }
    const flexq::ActivationDesc narrow(m, hidden, 8, scheme, qkv.desc.rotation),
        wide(m, intermediate, 8, scheme, down.desc.rotation);
    size_t act_bytes = 0, wide_bytes = 0, workspace_bytes = 0;
    flexq::check(flexq_activation_size(&stream, &narrow, &act_bytes));
    flexq::check(flexq_activation_size(&stream, &wide, &wide_bytes));
    act_bytes = std::max(act_bytes, wide_bytes);
    for (const Weight* weight : {&qkv, &o, &gate_up, &down}) {
      size_t bytes = 0;
      flexq::check(flexq_gemm_workspace_size(&stream, &weight->desc, 8, m, &bytes));
      workspace_bytes = std::max(workspace_bytes, bytes);
    }
    auto* quantized = allocate<uint8_t>(act_bytes);
    auto* workspace = allocate<uint8_t>(workspace_bytes);
    const auto gemm = [&](const Weight& weight, size_t layer, const flexq::ActivationDesc& act, uint16_t* y) {
      flexq::check(flexq_gemm(&stream, &weight.desc, weight.copies[layer], weight.bytes, &act, quantized, act_bytes,
                              nullptr, FLEXQ_F32, y, FLEXQ_BF16, weight.desc.n, workspace, workspace_bytes));
    };
    const auto add_norm_quantize = [&] {
      flexq::check(flexq_rms_norm_quantize(&stream, &narrow, out, hidden, sum, hidden, norm, 1e-5f, FLEXQ_BF16, sum,
                                           hidden, quantized, act_bytes));
    };
    const double layer = microseconds(handle, 4 * kLayers, [&](int i) {
      const size_t which = static_cast<size_t>(i) % kLayers;
      add_norm_quantize();
      gemm(qkv, which, narrow, heads);
      flexq::check(flexq_quantize_activation(&stream, &narrow, heads, FLEXQ_BF16, 3 * hidden, quantized, act_bytes));
      gemm(o, which, narrow, out);
      add_norm_quantize();
      gemm(gate_up, which, narrow, gates);
      flexq::check(flexq_silu_mul_quantize(&stream, &wide, gates, 2 * intermediate, gates + intermediate,
                                           2 * intermediate, FLEXQ_BF16, quantized, act_bytes));
      gemm(down, which, wide, out);
    });
    std::printf("  W6A8 M = %4lld: %7.2f us, %.3f of the floor\n", static_cast<long long>(m), layer, layer / floor);
    for (void* p : {static_cast<void*>(sum), static_cast<void*>(heads), static_cast<void*>(gates),
                    static_cast<void*>(out), static_cast<void*>(quantized), static_cast<void*>(workspace)}) {
      check(cudaFree(p));
    }
  }
  check(cudaFree(norm));
}

void bench(const flexq::Stream& stream, int64_t n, int64_t k, flexq_scheme scheme, const std::vector<int64_t>& tokens,
           bool kernels, int32_t weight_bits) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  constexpr size_t kRotatedBytes = 400'000'000;
  const auto about = static_cast<size_t>(n) * static_cast<size_t>(k) * static_cast<size_t>(weight_bits) / 8;
  const Weight packed(stream, n, k, scheme, std::max<size_t>(2, kRotatedBytes / about + 1), weight_bits);
  const flexq::WeightDesc& desc = packed.desc;
  const size_t bytes = packed.bytes;
  const std::vector<uint8_t*>& weights = packed.copies;
  const double floor = read_microseconds(handle, weights, bytes);
  const char* name = scheme == FLEXQ_SCHEME_GROUP ? "group" : "channel";
  std::printf("%lldx%lld %s W%d: floor %.1f us, %.2f TB/s\n", static_cast<long long>(n), static_cast<long long>(k),
              name, weight_bits, floor, static_cast<double>(bytes) / floor / 1e6);
  for (const int64_t m : tokens) {
    auto* x = allocate<uint16_t>(static_cast<size_t>(m * k));
    auto* y = allocate<uint16_t>(static_cast<size_t>(m * n));
    fill<<<256, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(x), static_cast<size_t>(m * k) / 2, 0x80ff80ffu,
                                  0x3f003f00u);
    if (kernels) {
      bench_kernels(stream, desc, m, bytes, weights, x, y);
      check(cudaFree(x));
      check(cudaFree(y));
      continue;
    }
    for (const int32_t bits : {8, 6}) {
      const Times times = times_of(stream, nullptr, desc, bits, m, bytes, weights, x, y, kRounds);
      size_t act_bytes = 0;
      const flexq::ActivationDesc act(m, k, bits, scheme, desc.rotation);
      flexq::check(flexq_activation_size(&stream, &act, &act_bytes));
      auto* quantized = allocate<uint8_t>(act_bytes);
      const double quantize = microseconds(handle, 20, [&](int) {
        flexq::check(flexq_quantize_activation(&stream, &act, x, FLEXQ_BF16, k, quantized, act_bytes));
      });
      std::printf("  W%dA%d M = %4lld: linear %7.2f us, %.3f of the floor; gemm %7.2f, quantize %5.2f\n", weight_bits,
                  bits, static_cast<long long>(m), times.linear, times.linear / floor, times.gemm, quantize);
      check(cudaFree(quantized));
    }
    check(cudaFree(x));
    check(cudaFree(y));
  }
}

}  // namespace

int main(int argc, char** argv) {
  flexq::check(flexq_device_available(FLEXQ_CUDA, 0));
  bool kernels = false, layer = false;
  std::vector<int64_t> tokens;
  std::vector<int32_t> widths;
  std::vector<std::pair<int64_t, int64_t>> shapes;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--kernels") == 0) {
      kernels = true;
    } else if (std::strcmp(argv[i], "--layer") == 0) {
      layer = true;
    } else if (argv[i][0] == 'W') {
      widths.push_back(std::atoi(argv[i] + 1));
    } else if (const char* x = std::strchr(argv[i], 'x')) {
      shapes.emplace_back(std::atoll(argv[i]), std::atoll(x + 1));
    } else {
      tokens.push_back(std::atoll(argv[i]));
    }
  }
  if (tokens.empty()) tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096};
  if (widths.empty()) widths = {6};
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s\n", properties.name);
  cudaStream_t handle;
  check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
  const flexq::Stream stream = flexq::Stream::cuda(0, handle);
  if (shapes.empty() && layer) {
    shapes = {{4096, 11008}, {4096, 14336}, {5120, 13824}};
  } else if (shapes.empty()) {
    shapes = {{8192, 28672}, {57344, 8192}, {8192, 8192}, {28672, 4096}, {10240, 8192}, {4096, 4096}, {6144, 4096}};
  }
  for (const auto& [n, k] : shapes) {
    for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
      if (layer) {
        bench_layer(stream, n, k, scheme, tokens);
      } else {
        for (const int32_t bits : widths) bench(stream, n, k, scheme, tokens, kernels, bits);
      }
    }
  }
  check(cudaStreamDestroy(handle));
  return 0;
}
