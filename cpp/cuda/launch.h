// One way to launch a kernel, and the checks of what goes into a launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "cuda/kernels.h"

namespace flexq::cuda {

constexpr int64_t kMaxGridY = 65535, kMaxGridZ = 65535;

// A count that a kernel takes as an int.
inline int checked_int(const char* what, int64_t count) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (count > kMost) {
    fail(FLEXQ_UNSUPPORTED, what, " must be at most ", kMost, " on a GPU, got ", count, "; split the call");
  }
  return static_cast<int>(count);
}

inline dim3 checked_grid(const char* kernel, int64_t x, int64_t y = 1, int64_t z = 1) {
  const auto checked = [&](const char* axis, int64_t ctas, int64_t most) {
    if (ctas > most) {
      fail(FLEXQ_UNSUPPORTED, kernel, " needs ", ctas, " CTAs along ", axis, " of its grid, a GPU takes ", most,
           "; split the call");
    }
    return static_cast<unsigned>(ctas);
  };
  return dim3(checked("x", x, std::numeric_limits<int>::max()), checked("y", y, kMaxGridY), checked("z", z, kMaxGridZ));
}

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  // Programmatic dependent launch (sm_90): the kernel may start before the one ahead of it in the stream has finished,
  // and waits for it before it touches what that one reads or writes. Weights are the exception: a GEMM fills its
  // pipeline with them at once. What writes weights (prepack, copies) is launched without this.
  bool overlapped = false;
  unsigned cluster = 1;  // CTAs along x (sm_90)
  // Wants an SM's memory divided as for the most shared memory: kernels that are to run side by side must agree on
  // that, since an SM divides it anew only when it is idle.
  bool most_shared = false;
};

// Where an SM's even share is fewer CTAs than the `most` that fit, early CTAs would crowd the SMs that have room first.
// So each claims as much shared memory as lets no more than the share fit (sm_90).
inline void claim_share(Launch& how, int64_t share, int64_t most) {
  constexpr int64_t kSharedPerSm = 228 * 1024, kReserved = 1024;  // for each CTA
  if (share >= most) return;
  const int64_t claim = kSharedPerSm / (share + 1) - kReserved + 128;
  how.shared_bytes = std::max(how.shared_bytes, static_cast<size_t>(claim));
}

// Raises a kernel's limit of dynamic shared memory on the current device. It is never lowered: another thread may be
// about to launch the same kernel with more.
template <typename... Params>
void allow_shared(void (*kernel)(Params...), size_t bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{reinterpret_cast<const void*>(kernel), device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "shared memory");
  most = bytes;
}

// Sets an attribute of a kernel, always to the same value, on the current device.
template <typename... Params>
void set_once(void (*kernel)(Params...), cudaFuncAttribute attribute, int value, const char* what) {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  static std::mutex mutex;
  static std::set<std::tuple<const void*, int, cudaFuncAttribute>> done;
  const std::tuple key{reinterpret_cast<const void*>(kernel), device, attribute};
  const std::lock_guard lock(mutex);
  if (done.contains(key)) return;
  check(cudaFuncSetAttribute(kernel, attribute, value), what);
  done.insert(key);
}

// The configuration, which points into `attributes`; also raises the limits that the kernel needs.
template <typename... Params>
cudaLaunchConfig_t configure(void (*kernel)(Params...), const Launch& how, cudaLaunchAttribute (&attributes)[2]) {
  constexpr unsigned kPortableCluster = 8;
  if (how.shared_bytes > 0) allow_shared(kernel, how.shared_bytes);
  if (how.most_shared) {
    set_once(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared,
             "shared memory's share");
  }
  if (how.cluster > kPortableCluster) {
    set_once(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1, "cluster");
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

// Reports this launch's own error only, not one that others have left behind.
template <typename... Params, typename... Args>
void launch(cudaStream_t stream, const char* what, void (*kernel)(Params...), const Launch& how, Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = configure(kernel, how, attributes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

// How many clusters, or single CTAs, of such a launch the current device runs at a time; 0 if clusters do not fit. Only
// the driver knows how clusters fit on the SMs, and it is asked once.
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
    int sms = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, how.shared_bytes), "CTAs at once");
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "SM count");
    count = std::max(count * sms, 1);
  }
  return known[key] = count;
}

}  // namespace flexq::cuda
