// The wgmma GEMM (wgmma/) of a mixture of experts, as its host side sees it.
#pragma once

#include "cuda/experts/params.h"
#include "cuda/wgmma/config.h"

namespace flexq::cuda::experts {

struct WgmmaParams : wgmma::Params {
  ExpertTable table;

  // A tile is for its expert's layer.
  using TokenTile = ExpertTile;
  static constexpr bool kPartTiles = true;
  template <int kTokens>
  __device__ ExpertTile look_up(int token_tile) const;
  template <int kTokens>
  __device__ LinearParams linear_of(const ExpertTile& at, int token_tile) const;
  __device__ int token_tiles_from(const ExpertTile& at, int) const { return (at.tokens + kTokenTile - 1) / kTokenTile; }
};

constexpr bool has_wgmma_kernel(int config, bool per_group) {
  const wgmma::Config& c = wgmma::kConfigs[config];
  return !c.stream_k && (per_group ? c.group : c.channel);
}

// kernel_table.h
struct WgmmaFamily {
  using Function = void (*)(WgmmaParams);
  static constexpr size_t kCount = wgmma::Family::kCount;
  template <int kConfig, bool kPerGroup, int kBits>
  static Function kernel();
};

}  // namespace flexq::cuda::experts
