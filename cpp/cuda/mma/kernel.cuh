// y = x * w^T by mma.sync on int8 codes (sm_80 and later), for few tokens, where reading the weights sets the time.
//
// A CTA has a tile of rows and all of K, or a part of it. Each warp copies its weight records with cp.async into a ring
// of its own and reads back only what it copied itself, so that the weights' stream needs no barrier. The CTA's warps
// share K, and each loads the activations of its own groups; or they have rows of their own and share activations
// through shared memory.
#pragma once

#include "cuda/mma/epilogue.cuh"
#include "cuda/mma/mainloop.cuh"

namespace flexq::cuda::mma {

template <typename W>
__device__ void run(W& warp) {
  const int begin = warp.part_begin(blockIdx.y);
  const int end = warp.part_begin(blockIdx.y + 1);
  warp.start(begin, end);
  if constexpr (W::kC.shared_act) {
    run_shared(warp, end - begin);
  } else {
    run_independent(warp);
  }
  finish(warp);
}

template <int kConfig, bool kPerGroup, int kBits>
__global__ void __launch_bounds__(kConfigs[kConfig].threads(), kConfigs[kConfig].ctas_per_sm)
    gemm_mma_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  Warp<kConfig, kPerGroup, kBits> warp(params, shared);
  run(warp);
}

template <int kConfig, bool kPerGroup, int kBits>
Family::Function Family::kernel() {
  if constexpr (has_kernel(kConfig, kBits, kPerGroup)) {
    return gemm_mma_kernel<kConfig, kPerGroup, kBits>;
  } else {
    return nullptr;
  }
}

}  // namespace flexq::cuda::mma
