// The wgmma GEMM (wgmma/) of a mixture of experts, as its host side sees it.
#pragma once

#include "cuda/experts/params.h"
#include "cuda/wgmma/config.h"

namespace flexq::cuda::experts {

struct WgmmaParams : wgmma::Params {
  ExpertTable table;

  // The layer of a tile's expert.
  template <int kTokens>
  __device__ LinearParams linear_of(int token_tile) const;
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
