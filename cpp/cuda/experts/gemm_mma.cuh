// The mma.sync GEMM (mma/) of a mixture of experts: a CTA's tile of tokens is of one expert.
#pragma once

#include "cuda/experts/gemm_mma.h"
#include "cuda/experts/table.cuh"
#include "cuda/mma/kernel.cuh"

namespace flexq::cuda::experts {

template <int kConfig, bool kPerGroup, int kBits>
__global__ void __launch_bounds__(mma::kConfigs[kConfig].threads(), mma::kConfigs[kConfig].ctas_per_sm)
    experts_mma_kernel(const __grid_constant__ MmaParams params) {
  extern __shared__ __align__(128) uint8_t shared[];
  const auto tile = static_cast<int>(blockIdx.z);
  const ExpertTile at = load_tile(params.table, tile);
  if (at.tokens == 0) {
    ptx::wait_for_previous_kernel();  // no kernel ends before the one ahead of it
    return;
  }
  mma::Params p = params;
  move_to_tile(p, params.table, tile, at);
  mma::Warp<kConfig, kPerGroup, kBits> warp(p, shared);
  mma::run(warp);
}

template <int kConfig, bool kPerGroup, int kBits>
MmaFamily::Function MmaFamily::kernel() {
  if constexpr (has_mma_kernel(kConfig, kBits, kPerGroup)) {
    return experts_mma_kernel<kConfig, kPerGroup, kBits>;
  } else {
    return nullptr;
  }
}

}  // namespace flexq::cuda::experts
