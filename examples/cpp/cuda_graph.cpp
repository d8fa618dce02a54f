// FlexQ on a CUDA stream, and captured in a CUDA graph: calls queue their work and return, without allocations or
// synchronization, so a graph of them can be replayed with new inputs in the same memory.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <flexq/flexq.hpp>
#include <random>
#include <vector>

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void* on_device(size_t bytes, const void* from = nullptr) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));  // aligned to 256 bytes
  if (from != nullptr) check(cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice));
  return memory;
}

}  // namespace

int main() {
  if (flexq_device_available(FLEXQ_CUDA, 0) != FLEXQ_OK) {
    std::printf("skipped: %s\n", flexq_last_error());
    return 77;
  }
  const int64_t m = 4, n = 512, k = 1024;
  std::vector<float> w(static_cast<size_t>(n * k)), x(static_cast<size_t>(m * k)), y(static_cast<size_t>(m * n));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : w) value = normal(random);
  for (float& value : x) value = normal(random);

  // Weights are quantized on the host, and prepacked on the GPU from planes and scales in its memory.
  const flexq::Weight weight = flexq::Weight::quantize(flexq::Stream::cpu(), {n, k}, w.data());
  cudaStream_t cuda_stream;
  check(cudaStreamCreate(&cuda_stream));
  const flexq::Stream stream = flexq::Stream::cuda(0, cuda_stream);
  const auto* planes = static_cast<const uint8_t*>(on_device(weight.planes().size(), weight.planes().data()));
  const auto* scales = static_cast<const uint16_t*>(on_device(weight.scales().size() * 2, weight.scales().data()));
  size_t packed_bytes = 0, workspace_bytes = 0;
  flexq::check(flexq_prepack_size(&stream, &weight.desc(), &packed_bytes));
  void* packed = on_device(packed_bytes);
  flexq::check(flexq_prepack(&stream, &weight.desc(), planes, scales, packed, packed_bytes));
  flexq::check(flexq_linear_workspace_size(&stream, &weight.desc(), 8, m, &workspace_bytes));
  void* workspace = on_device(workspace_bytes + 1);
  auto* device_x = static_cast<float*>(on_device(x.size() * sizeof(float)));
  auto* device_y = static_cast<float*>(on_device(y.size() * sizeof(float)));

  check(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal));
  flexq::check(flexq_linear(&stream, &weight.desc(), packed, packed_bytes, 8, m, device_x, FLEXQ_F32, k, nullptr,
                            FLEXQ_F32, device_y, FLEXQ_F32, n, workspace, workspace_bytes));
  cudaGraph_t graph;
  check(cudaStreamEndCapture(cuda_stream, &graph));
  cudaGraphExec_t replay;
  check(cudaGraphInstantiate(&replay, graph, 0));

  double worst = 0;
  for (int round = 0; round < 3; ++round) {  // new inputs, the same graph
    for (float& value : x) value = -value * 0.5f;
    check(cudaMemcpyAsync(device_x, x.data(), x.size() * sizeof(float), cudaMemcpyHostToDevice, cuda_stream));
    check(cudaGraphLaunch(replay, cuda_stream));
    check(cudaMemcpyAsync(y.data(), device_y, y.size() * sizeof(float), cudaMemcpyDeviceToHost, cuda_stream));
    check(cudaStreamSynchronize(cuda_stream));
    double error = 0, norm = 0;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double exact = 0;
        for (int64_t l = 0; l < k; ++l) {
          exact += double{x[static_cast<size_t>(i * k + l)]} * double{w[static_cast<size_t>(j * k + l)]};
        }
        error += (y[static_cast<size_t>(i * n + j)] - exact) * (y[static_cast<size_t>(i * n + j)] - exact);
        norm += exact * exact;
      }
    }
    worst = error / norm > worst ? error / norm : worst;
  }
  std::printf("three replays of a graph, relative error at most %.4f\n", std::sqrt(worst));
  return worst < 0.01 ? 0 : 1;
}
