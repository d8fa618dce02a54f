// Time of the activation quantizers on a GPU, plain and with what comes before a linear layer fused in (bf16), and the
// bytes that they move in it. CUDA graphs over copies of the inputs that L2 cannot hold; medians.
//
//   cmake --preset cuda -DFLEXQ_BUILD_BENCHMARKS=ON && cmake --build --preset cuda
//   build/cuda/benchmarks/cuda_quantizers [K ...] [xM ...]
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda_timing.cuh"
#include "flexq/flexq.hpp"

namespace {

using namespace timing;

constexpr size_t kRotatedBytes = 200'000'000;

struct Inputs {
  uint16_t *x, *other, *weight, *sum;
  uint8_t* quantized;
};

void bench(const flexq::Stream& stream, flexq_scheme scheme, int64_t k, int64_t m) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  const flexq::ActivationDesc act(m, k, 8, scheme, FLEXQ_ROTATION_HADAMARD128);
  size_t bytes = 0;
  flexq::check(flexq_activation_size(&stream, &act, &bytes));
  const auto count = static_cast<size_t>(m * k);
  const size_t copies = kRotatedBytes / (6 * count + bytes) + 2;
  std::vector<Inputs> inputs;
  for (size_t i = 0; i < copies; ++i) {
    const Inputs one{allocate<uint16_t>(count), allocate<uint16_t>(count), allocate<uint16_t>(static_cast<size_t>(k)),
                     allocate<uint16_t>(count), allocate<uint8_t>(bytes)};
    for (uint16_t* p : {one.x, one.other}) {
      fill<<<256, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(p), count / 2, 0x80ff80ffu, 0x3f003f00u);
    }
    fill<<<16, 256, 0, handle>>>(reinterpret_cast<uint32_t*>(one.weight), static_cast<size_t>(k) / 2, 0x007f007fu,
                                 0x3f003f00u);
    inputs.push_back(one);
  }
  const auto time = [&](const char* what, size_t read_and_written, const auto& quantize) {
    const double us = microseconds(handle, static_cast<int>(2 * copies),
                                   [&](int i) { flexq::check(quantize(inputs[static_cast<size_t>(i) % copies])); });
    std::printf("  %-8s %9.2f us, %5.2f TB/s", what, us, static_cast<double>(read_and_written) / us / 1e6);
  };
  std::printf("%s K %6lld M %5lld", scheme == FLEXQ_SCHEME_GROUP ? "group  " : "channel", static_cast<long long>(k),
              static_cast<long long>(m));
  time("plain", 2 * count + bytes, [&](const Inputs& in) {
    return flexq_quantize_activation(&stream, &act, in.x, FLEXQ_BF16, k, in.quantized, bytes);
  });
  time("rms norm", 6 * count + bytes, [&](const Inputs& in) {
    return flexq_rms_norm_quantize(&stream, &act, in.x, k, in.other, k, in.weight, 1e-5f, FLEXQ_BF16, in.sum, k,
                                   in.quantized, bytes);
  });
  time("silu", 4 * count + bytes, [&](const Inputs& in) {
    return flexq_silu_mul_quantize(&stream, &act, in.x, k, in.other, k, FLEXQ_BF16, in.quantized, bytes);
  });
  std::printf("\n");
  std::fflush(stdout);
  for (const Inputs& in : inputs) {
    for (void* p : {static_cast<void*>(in.x), static_cast<void*>(in.other), static_cast<void*>(in.weight),
                    static_cast<void*>(in.sum), static_cast<void*>(in.quantized)}) {
      check(cudaFree(p));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  flexq::check(flexq_device_available(FLEXQ_CUDA, 0));
  cudaStream_t handle;
  check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking));
  const flexq::Stream stream = flexq::Stream::cuda(0, handle);
  std::vector<int64_t> features, tokens;
  for (int i = 1; i < argc; ++i) {
    const bool of_tokens = argv[i][0] == 'x';
    const int64_t number = std::atoll(argv[i] + of_tokens);
    if (number < 1) {
      std::fprintf(stderr, "neither a number of features nor x and one of tokens: %s\n", argv[i]);
      return 2;
    }
    (of_tokens ? tokens : features).push_back(number);
  }
  if (features.empty()) features = {4096, 14336};
  if (tokens.empty()) tokens = {1, 16, 64, 128, 256, 1024, 4096};
  for (const int64_t k : features) {
    for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
      for (const int64_t m : tokens) bench(stream, scheme, k, m);
    }
  }
  check(cudaStreamDestroy(handle));
  return 0;
}
