// The mma.sync GEMM (mma/) of a mixture of experts: a CTA's tile of tokens is of one expert.
#include <array>
#include <iterator>
#include <utility>

#include "core/error.h"
#include "cuda/experts/kernels.h"
#include "cuda/experts/table.cuh"
#include "cuda/launch.h"
#include "cuda/mma/kernel.cuh"

namespace flexq::cuda::experts {
namespace {

struct Params : mma::Params {
  ExpertTable table;
};
using KernelFunction = void (*)(Params);

// Of mma::kConfigs, those that are worth their code: one to three for each number of tokens.
constexpr bool instantiated(size_t config) {
  constexpr size_t kAll[] = {0, 1, 2, 4, 5, 6, 9, 10, 13, 14};
  for (const size_t one : kAll) {
    if (one == config) return true;
  }
  return false;
}

template <int kConfig, bool kPerGroup>
__global__ void __launch_bounds__(mma::kConfigs[kConfig].threads(), mma::kConfigs[kConfig].ctas_per_sm)
    experts_mma_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  const auto tile = static_cast<int>(blockIdx.z);
  const ExpertTile at = load_tile(params.table, tile);
  if (at.tokens == 0) {
    ptx::wait_for_previous_kernel();  // no kernel ends before the one ahead of it
    return;
  }
  mma::Params p = params;
  move_to_tile(p, params.table, tile, at);
  mma::Warp<kConfig, kPerGroup> warp(p, shared);
  mma::run(warp);
}

template <bool kPerGroup, size_t kConfig>
constexpr KernelFunction kernel_if_any() {
  if constexpr (instantiated(kConfig)) {
    return experts_mma_kernel<static_cast<int>(kConfig), kPerGroup>;
  } else {
    return nullptr;
  }
}

template <bool kPerGroup, size_t... kConfig>
std::array<KernelFunction, sizeof...(kConfig)> kernels_of(std::index_sequence<kConfig...>) {
  return {kernel_if_any<kPerGroup, kConfig>()...};
}

template <bool kPerGroup>
KernelFunction kernel_of(int config) {
  return kernels_of<kPerGroup>(std::make_index_sequence<std::size(mma::kConfigs)>{})[static_cast<size_t>(config)];
}

}  // namespace

bool has_mma(int config) { return instantiated(static_cast<size_t>(config)); }

void gemm_mma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan) {
  const mma::Config& c = mma::kConfigs[plan.config];
  const flexq_weight_desc& desc = args.gemm.desc;
  const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  const int64_t groups = num_groups(desc.k);
  Params params{};
  static_cast<LinearParams&>(params) = linear_params(args.gemm);
  params.row_blocks = num_row_blocks(desc);
  params.blocks = plan.blocks;
  params.groups = checked_int("the groups of k", groups);
  params.steps = static_cast<int>(ceil_div(groups, c.warps_k));
  params.token_tiles = ActivationLayout(args.gemm.act).tiles;
  params.table = args.table;
  params.read_once = args.read_once;
  const KernelFunction kernel = per_group ? kernel_of<true>(plan.config) : kernel_of<false>(plan.config);
  const int64_t row_tiles = ceil_div(params.row_blocks, c.warps_n * plan.blocks);
  Launch how{.grid = checked_grid("experts_mma", row_tiles, 1, args.max_tiles),
             .block = dim3(static_cast<unsigned>(c.threads())),
             .shared_bytes = static_cast<size_t>(c.shared_bytes(per_group)),
             .overlapped = device.has_sm90};
  if (device.has_sm90) {
    claim_share(how, ceil_div(row_tiles * args.max_tiles, device.num_sms),
                clusters_at_once(kernel, how) / device.num_sms);
  }
  launch(stream, "experts_mma", kernel, how, params);
}

}  // namespace flexq::cuda::experts
