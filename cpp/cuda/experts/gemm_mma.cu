// Host side of the mma.sync GEMM of a mixture of experts.
#include "cuda/experts/gemm_mma.h"

#include "core/error.h"
#include "cuda/experts/kernels.h"
#include "cuda/kernel_table.h"
#include "cuda/launch.h"

namespace flexq::cuda::experts {

bool has_experts_mma(const Device& device, int config, int32_t weight_bits, bool per_group) {
  return has_mma_kernel(config, weight_bits, per_group) && cuda::has_mma(device, config, weight_bits, per_group);
}

void gemm_mma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan) {
  const flexq_weight_desc& desc = args.gemm.desc;
  const mma::Config c = mma::config_for(plan.config, desc.weight_bits);
  const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  const int64_t groups = num_groups(desc.k);
  MmaParams params{};
  static_cast<LinearParams&>(params) = linear_params(args.gemm);
  params.row_blocks = num_row_blocks(desc);
  params.blocks = plan.blocks;
  params.groups = checked_int("the groups of k", groups);
  params.steps = static_cast<int>(ceil_div(groups, c.warps_k));
  params.token_tiles = ActivationLayout(args.gemm.act).tiles;
  params.table = args.table;
  params.read_once = args.read_once;
  const MmaFamily::Function kernel = kernel_of<MmaFamily>(desc.weight_bits, per_group, plan.config);
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
