// One way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "cuda/kernels.h"

namespace flexq::cuda {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  // The kernel may start before the one ahead of it in the stream has finished (programmatic dependent launch, sm_90),
  // and itself waits for it before it touches what that one writes or reads. Weights are the exception: GEMMs fill
  // their pipelines with them at once, perhaps beside the kernel before the last, so that memory does not rest between
  // two layers. Whatever writes weights (prepack, copies) is launched without this and lets nobody start early.
  bool overlapped = false;
  unsigned cluster = 1;  // thread blocks along x that share their shared memory (sm_90)
};

// Where fewer thread blocks than the `most` that fit are a multiprocessor's even share, those that come first would
// crowd the multiprocessors that have room first: each claims so much shared memory that no more fit (sm_90).
inline void claim_share(Launch& how, int64_t share, int64_t most) {
  constexpr int64_t kOfMultiprocessor = 228 * 1024, kReserved = 1024;  // of each thread block
  if (share >= most) return;
  const int64_t claim = kOfMultiprocessor / (share + 1) - kReserved + 128;
  how.shared_bytes = std::max(how.shared_bytes, static_cast<size_t>(claim));
}

// Asks for dynamic shared memory: 48 KB need no asking, but what a kernel declares itself counts towards them too. The
// current device never allows less than was once asked for, since another thread may be about to launch the same kernel
// with more.
template <typename... Params>
void allow_shared(void (*kernel)(Params...), size_t bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{reinterpret_cast<const void*>(kernel), device}];
  const size_t wanted = std::max(most, bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(wanted)),
        "shared memory");
  most = wanted;
}

// The configuration and, in `attributes`, what it points to; asks for what the kernel must be allowed.
template <typename... Params>
cudaLaunchConfig_t configure(void (*kernel)(Params...), const Launch& how, cudaLaunchAttribute (&attributes)[2]) {
  constexpr unsigned kPortableCluster = 8;
  if (how.shared_bytes > 0) allow_shared(kernel, how.shared_bytes);
  if (how.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.attrs = attributes;
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {how.cluster, 1, 1};
  }
  if (how.overlapped) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

template <typename... Params, typename... Args>
void launch(cudaStream_t stream, const char* what, void (*kernel)(Params...), const Launch& how, Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = configure(kernel, how, attributes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

// How many clusters of such a launch, or single thread blocks, the current device runs at a time: how clusters fit its
// multiprocessors only the driver knows. Asked once. 0 for clusters that do not fit; at least 1 thread block.
template <typename... Params>
int clusters_at_once(void (*kernel)(Params...), const Launch& how) {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, unsigned, unsigned, size_t>, int> known;
  const std::tuple key{reinterpret_cast<const void*>(kernel), device, how.cluster, how.block.x, how.shared_bytes};
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  int count = 0;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = configure(kernel, how, attributes);
  if (how.cluster > 1) {
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "clusters at once");
  } else {
    const int threads = static_cast<int>(how.block.x);
    int multiprocessors = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, how.shared_bytes), "thread blocks");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    count = std::max(count * multiprocessors, 1);
  }
  return known[key] = count;
}

}  // namespace flexq::cuda
