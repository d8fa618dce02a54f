// Host side of the wgmma GEMM of a mixture of experts.
#include "cuda/experts/gemm_wgmma.h"

#include <algorithm>

#include "core/error.h"
#include "cuda/experts/kernels.h"
#include "cuda/kernel_table.h"
#include "cuda/launch.h"

namespace flexq::cuda::experts {

bool has_experts_wgmma(int config) { return has_wgmma_kernel(config, true) || has_wgmma_kernel(config, false); }

void gemm_wgmma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan) {
  const flexq_weight_desc& desc = args.gemm.desc;
  const wgmma::Config c = wgmma::config_for(plan.config, desc.weight_bits);
  const WgmmaFamily::Function kernel =
      kernel_of<WgmmaFamily>(desc.weight_bits, desc.scheme == FLEXQ_SCHEME_GROUP, plan.config);
  Launch how{.grid = dim3(static_cast<unsigned>(plan.multicast)),
             .block = dim3(static_cast<unsigned>(wgmma::kThreads)),
             .shared_bytes = static_cast<size_t>(c.shared_bytes()),
             .overlapped = true,
             .cluster = static_cast<unsigned>(plan.multicast)};
  const int64_t at_once = std::clamp(clusters_at_once(kernel, how), 1, device.num_sms);
  // CTAs at work at once share an expert's rows, and tokens. Those of more experts share nothing.
  constexpr int kRasterTokens = 1024;
  const int64_t row_tiles = ceil_div(num_row_blocks(desc), kTileBlocks * plan.multicast),
                raster_width = kRasterTokens / c.tokens;
  checked_int("experts_wgmma's groups of k", num_groups(desc.k));
  checked_int("experts_wgmma's rows x tokens of tiles",
              plan.multicast * std::max(row_tiles * args.max_tiles, row_tiles * raster_width));
  how.grid = checked_grid("experts_wgmma", plan.multicast * std::min(row_tiles * args.max_tiles, at_once));

  WgmmaParams params{};
  static_cast<LinearParams&>(params) = linear_params(args.gemm);
  params.row_blocks = static_cast<int>(num_row_blocks(desc));
  params.groups = static_cast<int>(num_groups(desc.k));
  params.token_tiles = static_cast<int>(ActivationLayout(args.gemm.act).tiles);
  params.row_tiles = static_cast<int>(row_tiles);
  params.multicast = plan.multicast;
  params.raster_width = static_cast<int>(raster_width);
  params.clocks_per_stage = static_cast<int>(c.weight_bytes() * static_cast<double>(how.grid.x) /
                                             device.dram_bytes_per_us * device.clocks_per_us);
  params.table = args.table;
  params.read_once = args.read_once;
  launch(stream, "experts_wgmma", kernel, how, params);
}

}  // namespace flexq::cuda::experts
