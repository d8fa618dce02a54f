// The wgmma GEMM (wgmma/) of a mixture of experts: persistent CTAs over the tiles that routing gave, each tile's tokens
// being of one expert.
#pragma once

#include "cuda/experts/gemm_wgmma.h"
#include "cuda/experts/table.cuh"
#include "cuda/wgmma/kernel.cuh"

namespace flexq::cuda::experts {

template <int kTokens>
__device__ ExpertTile WgmmaParams::look_up(int token_tile) const {
  return load_tile(table, token_tile / (kTokens / kTokenTile));
}

template <int kTokens>
__device__ LinearParams WgmmaParams::linear_of(const ExpertTile& at, int token_tile) const {
  LinearParams linear = *this;
  move_to_tile(linear, table, token_tile / (kTokens / kTokenTile), at);
  return linear;
}

template <int kConfig, bool kPerGroup, int kBits>
__global__ void __launch_bounds__(65536 / wgmma::kConfigs[kConfig].launch_registers() / wgmma::kWarpgroup *
                                      wgmma::kWarpgroup,
                                  1) experts_wgmma_kernel(const __grid_constant__ WgmmaParams params) {
#if FLEXQ_SM90A
  extern __shared__ __align__(1024) uint8_t shared[];
  WgmmaParams p = params;
  p.tiles = p.row_tiles * load_num_tiles(params.table);
  p.whole_tiles = p.tiles;
  p.splits = 1;  // known to the compiler
  wgmma::run(wgmma::Cta<kConfig, kPerGroup, kBits, WgmmaParams>(p, shared));
#endif
}

template <int kConfig, bool kPerGroup, int kBits>
WgmmaFamily::Function WgmmaFamily::kernel() {
  if constexpr (has_wgmma_kernel(kConfig, kPerGroup)) {
    return experts_wgmma_kernel<kConfig, kPerGroup, kBits>;
  } else {
    return nullptr;
  }
}

}  // namespace flexq::cuda::experts
