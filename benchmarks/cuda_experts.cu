// Time of a whole mixture-of-experts layer on a GPU (bf16 in, bf16 out, W6A8), against the time to read the weights of
// the distinct experts that were chosen once, measured here on the same buffers. CUDA graphs over random routings and
// copies of the layer that L2 cannot hold; medians.
//
//   cmake --preset cuda -DFLEXQ_BUILD_BENCHMARKS=ON && cmake --build --preset cuda
//   build/cuda/benchmarks/cuda_experts [--kernels] [--group | --channel] [MODEL ...] [M ...]
//
// MODEL: qwen3, mixtral, deepseek, gpt-oss.
// --kernels: also the layer by each kernel that could run both of its GEMMs.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_timing.cuh"
#include "flexq/flexq.hpp"

namespace {

using namespace timing;

template <typename T>
T* uploaded(const std::vector<T>& values) {
  T* p = allocate<T>(values.size());
  check(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

struct Model {
  const char* name;
  int64_t experts, top_k, hidden, intermediate;
};
constexpr Model kModels[] = {
    {"qwen3", 128, 8, 2048, 768},      // Qwen3-30B-A3B
    {"mixtral", 8, 2, 4096, 14336},    // Mixtral-8x7B
    {"deepseek", 256, 8, 7168, 2048},  // DeepSeek-V3
    {"gpt-oss", 32, 4, 2880, 2880},    // gpt-oss-20b
};

// Copies of both projections of all experts. All experts have the same pseudo-random codes.
struct Layer {
  flexq::ExpertsDesc desc;
  size_t bytes[2] = {};
  std::vector<uint8_t*> copies[2];

  Layer(const flexq::Stream& stream, const Model& model, flexq_scheme scheme)
      : desc(model.experts, model.hidden, model.intermediate) {
    constexpr size_t kRotatedBytes = 1'000'000'000;
    const auto handle = static_cast<cudaStream_t>(stream.handle);
    desc.gate_up.scheme = desc.down.scheme = scheme;
    for (const flexq_projection p : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      flexq::check(flexq_experts_prepack_size(&stream, &desc, p, &bytes[p]));
    }
    const size_t count = kRotatedBytes / (bytes[0] + bytes[1]) + 1;
    for (const flexq_projection p : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      const flexq::WeightDesc single = desc.weight(p);
      size_t planes_bytes = 0, scales_bytes = 0;
      flexq::check(flexq_weight_size(&single, &planes_bytes, &scales_bytes));
      auto* planes = allocate<uint8_t>(planes_bytes);
      auto* scales = allocate<uint16_t>(scales_bytes / 2);
      fill<<<1024, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(planes), planes_bytes / 4, ~0u, 0);
      fill<<<1024, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(scales), scales_bytes / 4, 0x03ff03ffu, 0x10001000u);
      for (size_t i = 0; i < count; ++i) {
        copies[p].push_back(allocate<uint8_t>(bytes[p]));
        for (int64_t e = 0; e < model.experts; ++e) {
          flexq::check(flexq_experts_prepack(&stream, &desc, p, e, 1, planes, scales, copies[p].back(), bytes[p]));
        }
      }
      check(cudaStreamSynchronize(handle));
      check(cudaFree(planes));
      check(cudaFree(scales));
    }
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;
  ~Layer() {
    for (auto& of_projection : copies) {
      for (auto* copy : of_projection) check(cudaFree(copy));
    }
  }
};

double read_bytes_per_microsecond(cudaStream_t handle, const std::vector<uint8_t*>& buffers, size_t bytes) {
  auto* sink = allocate<uint32_t>(1);
  bytes = std::min<size_t>(bytes, 400'000'000);
  double least = 1e9;
  for (const int blocks : {528, 1056, 2112}) {
    least = std::min(least, microseconds(handle, 4, [&](int i) {
                       read<<<blocks, 512, 0, handle>>>(
                           reinterpret_cast<const uint4*>(buffers[static_cast<size_t>(i) % buffers.size()]), bytes / 16,
                           sink);
                     }));
  }
  check(cudaFree(sink));
  return static_cast<double>(bytes) / least;
}

// Every token chooses top_k different experts at random.
std::vector<int32_t> random_ids(const Model& model, int64_t m, std::mt19937& rng) {
  std::vector<int32_t> all(static_cast<size_t>(model.experts)), ids;
  std::iota(all.begin(), all.end(), 0);
  for (int64_t t = 0; t < m; ++t) {
    for (size_t j = 0; j < static_cast<size_t>(model.top_k); ++j) {
      std::swap(all[j], all[j + rng() % (all.size() - j)]);
      ids.push_back(all[j]);
    }
  }
  return ids;
}

// Names of kernels that may run the GEMMs of experts.
std::set<std::string> kernel_names(const flexq::Stream& stream, const flexq::ExpertsDesc& desc) {
  std::set<std::string> names;
  for (const flexq_projection p : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
    flexq::WeightDesc single = desc.weight(p);
    single.n *= 8;
    for (const int64_t m : {8, 16, 32, 64, 128, 256}) {
      int32_t count = 0;
      flexq::check(flexq_gemm_kernels(&stream, &single, 8, m, nullptr, 0, &count));
      std::vector<flexq_kernel_info> infos(static_cast<size_t>(count), FLEXQ_KERNEL_INFO_INIT);
      flexq::check(flexq_gemm_kernels(&stream, &single, 8, m, infos.data(), count, &count));
      for (const flexq_kernel_info& info : infos) names.insert(info.name);
    }
  }
  return names;
}

struct Batch {
  const Layer& layer;
  const Model& model;
  int64_t m;
  const std::vector<int32_t*>& ids;
  const float* weights;
  const uint16_t* x;
  uint16_t* y;

  // By `kernel` or the library's choice; below 0 if the kernel does not run the layer.
  double microseconds_by(const flexq::Stream& stream, const char* kernel) const {
    flexq_stream with = stream;
    with.kernel = kernel;
    size_t bytes = 0;
    const flexq_status status = flexq_experts_workspace_size(&with, &layer.desc, m, model.top_k, FLEXQ_BF16, &bytes);
    if (kernel != nullptr && status == FLEXQ_INVALID_ARGUMENT) return -1;
    flexq::check(status);
    auto* workspace = allocate<uint8_t>(bytes);
    const double time =
        microseconds(static_cast<cudaStream_t>(stream.handle), static_cast<int>(ids.size()), [&](int i) {
          const auto which = static_cast<size_t>(i), copy = which % layer.copies[0].size();
          flexq_routing routing = FLEXQ_ROUTING_INIT;
          routing.m = m;
          routing.top_k = model.top_k;
          routing.ids = ids[which];
          routing.weights = weights;
          flexq::check(flexq_experts_forward(&with, &layer.desc, layer.copies[0][copy], layer.bytes[0],
                                             layer.copies[1][copy], layer.bytes[1], &routing, x, FLEXQ_BF16,
                                             model.hidden, nullptr, nullptr, FLEXQ_F32, y, FLEXQ_BF16, model.hidden,
                                             workspace, bytes));
        });
    check(cudaFree(workspace));
    return time;
  }
};

void bench(const flexq::Stream& stream, const Model& model, flexq_scheme scheme, const std::vector<int64_t>& tokens,
           bool kernels) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const Layer layer(stream, model, scheme);
  const double bandwidth = read_bytes_per_microsecond(handle, layer.copies[0], layer.bytes[0]);
  const double expert_bytes = static_cast<double>(layer.bytes[0] + layer.bytes[1]) / static_cast<double>(model.experts);
  std::printf("%s %s: %lld experts, top %lld, %lld x %lld, %.2f TB/s\n", model.name,
              scheme == FLEXQ_SCHEME_GROUP ? "group" : "channel", static_cast<long long>(model.experts),
              static_cast<long long>(model.top_k), static_cast<long long>(model.hidden),
              static_cast<long long>(model.intermediate), bandwidth / 1e6);
  std::mt19937 rng(1);
  for (const int64_t m : tokens) {
    const size_t routings = m <= 64 ? 24 : m <= 1024 ? 8 : 4;
    std::vector<int32_t*> ids;
    double distinct = 0;
    for (size_t i = 0; i < routings; ++i) {
      const std::vector<int32_t> chosen = random_ids(model, m, rng);
      distinct += static_cast<double>(std::set<int32_t>(chosen.begin(), chosen.end()).size());
      ids.push_back(uploaded(chosen));
    }
    distinct /= static_cast<double>(routings);
    const auto values = static_cast<size_t>(m * model.hidden);
    auto* x = allocate<uint16_t>(values);
    auto* y = allocate<uint16_t>(values);
    auto* weights = uploaded(std::vector<float>(static_cast<size_t>(m * model.top_k), 0.125f));
    fill<<<256, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(x), values / 2, 0x80ff80ffu, 0x3f003f00u);
    const Batch batch{layer, model, m, ids, weights, x, y};
    const double time = batch.microseconds_by(stream, nullptr), floor = distinct * expert_bytes / bandwidth;
    const double operations =
        6.0 * static_cast<double>(m * model.top_k) * static_cast<double>(model.hidden * model.intermediate);
    std::printf("  M = %4lld: %9.2f us, floor %9.2f (%5.1f experts), %6.3f of it, %7.1f TOPS\n",
                static_cast<long long>(m), time, floor, distinct, time / floor, operations / time / 1e6);
    if (kernels) {
      for (const std::string& name : kernel_names(stream, layer.desc)) {
        const double by = batch.microseconds_by(stream, name.c_str());
        if (by >= 0) std::printf("      %-32s %9.2f us\n", name.c_str(), by);
      }
    }
    std::fflush(stdout);
    for (void* p : {static_cast<void*>(x), static_cast<void*>(y), static_cast<void*>(weights)}) check(cudaFree(p));
    for (auto* p : ids) check(cudaFree(p));
  }
}

}  // namespace

int main(int argc, char** argv) {
  flexq::check(flexq_device_available(FLEXQ_CUDA, 0));
  cudaStream_t handle;
  check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
  const flexq::Stream stream = flexq::Stream::cuda(0, handle);
  bool kernels = false;
  std::vector<flexq_scheme> schemes;
  std::vector<Model> models;
  std::vector<int64_t> tokens;
  for (int i = 1; i < argc; ++i) {
    const auto named = std::find_if(std::begin(kModels), std::end(kModels),
                                    [&](const Model& model) { return std::strcmp(model.name, argv[i]) == 0; });
    if (named != std::end(kModels)) {
      models.push_back(*named);
    } else if (std::strcmp(argv[i], "--kernels") == 0) {
      kernels = true;
    } else if (std::strcmp(argv[i], "--group") == 0) {
      schemes.push_back(FLEXQ_SCHEME_GROUP);
    } else if (std::strcmp(argv[i], "--channel") == 0) {
      schemes.push_back(FLEXQ_SCHEME_CHANNEL);
    } else if (std::atoll(argv[i]) > 0) {
      tokens.push_back(std::atoll(argv[i]));
    } else {
      std::fprintf(stderr, "neither a model, an option nor a number of tokens: %s\n", argv[i]);
      return 2;
    }
  }
  if (schemes.empty()) schemes = {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL};
  if (models.empty()) models.assign(std::begin(kModels), std::end(kModels));
  if (tokens.empty()) tokens = {1, 4, 16, 64, 256, 1024, 4096};
  for (const Model& model : models) {
    for (const flexq_scheme scheme : schemes) bench(stream, model, scheme, tokens, kernels);
  }
  check(cudaStreamDestroy(handle));
  return 0;
}
