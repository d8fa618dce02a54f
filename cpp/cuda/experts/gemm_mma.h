// The mma.sync GEMM (mma/) of a mixture of experts, as its host side sees it.
#pragma once

#include "cuda/experts/params.h"
#include "cuda/mma/config.h"

namespace flexq::cuda::experts {

struct MmaParams : mma::Params {
  ExpertTable table;
};

// Of mma::kConfigs, those that are worth their code: one to three for each number of tokens.
constexpr bool has_mma_kernel(int config, int weight_bits, bool per_group) {
  constexpr int kAll[] = {0, 1, 2, 4, 5, 6, 9, 10, 13, 14};
  for (const int one : kAll) {
    if (one == config) return mma::has_kernel(config, weight_bits, per_group);
  }
  return false;
}

// kernel_table.h
struct MmaFamily {
  using Function = void (*)(MmaParams);
  static constexpr size_t kCount = mma::Family::kCount;
  template <int kConfig, bool kPerGroup, int kBits>
  static Function kernel();
};

}  // namespace flexq::cuda::experts
