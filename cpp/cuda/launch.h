// One way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace flexq::cuda {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  // The kernel may start before the one ahead of it in the stream has finished (programmatic dependent launch, sm_90),
  // and itself waits for it before it touches what that one writes or reads.
  bool overlapped = false;
  unsigned cluster = 1;  // thread blocks along x that share their shared memory (sm_90)
};

template <typename... Params, typename... Args>
void launch(cudaStream_t stream, const char* what, void (*kernel)(Params...), const Launch& how, Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (how.overlapped) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {how.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.block;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

}  // namespace flexq::cuda
