// Host side of the mma.sync GEMM: grid, workspace, launch.
#include <iterator>

#include "core/error.h"
#include "cuda/kernel_table.h"
#include "cuda/launch.h"
#include "cuda/mma/epilogue.cuh"

namespace flexq::cuda {
namespace mma {
namespace {

struct Grids {
  int64_t row_tiles, tiles;
  dim3 gemm, reduction;
};

Grids grids_of(const GemmPlan& plan, const flexq_weight_desc& desc, int64_t m) {
  const Config& c = kConfigs[plan.config];
  const int64_t row_tiles = ceil_div(num_row_blocks(desc), c.warps_n * plan.blocks);
  const int64_t token_tiles = ceil_div(m, c.tokens()), tiles = row_tiles * token_tiles;
  Grids grids{row_tiles, tiles, checked_grid("gemm_mma", row_tiles, plan.splits, token_tiles), dim3(0)};
  if (plan.splits > 1)
    grids.reduction = checked_grid("gemm_mma's reduction", ceil_div(tiles * c.sums(), kReduceThreads));
  return grids;
}

const char* product_name(Product product) { return product == Product::kS8 ? "s8" : "b1"; }

}  // namespace
}  // namespace mma

using namespace mma;

int num_mma_configs() { return static_cast<int>(std::size(kConfigs)); }

MmaShape mma_shape(int config) {
  const Config& c = kConfigs[config];
  const int act_bits = c.product == Product::kB1A6 ? 6 : c.product == Product::kB1A8 ? 8 : 0;
  return {
      product_name(c.product), act_bits,  c.warps_n,   c.shared_act ? c.blocks : c.blocks / 2 + 1, c.blocks, c.tokens(),
      c.ctas_per_sm,           c.warps_k, c.shared_act};
}

size_t mma_workspace_size(const GemmPlan& plan, const flexq_weight_desc& desc, int64_t m) {
  const Grids grids = grids_of(plan, desc, m);  // checks them, too, before anything is queued
  if (plan.splits == 1) return 0;
  return align_up(static_cast<size_t>(plan.splits * grids.tiles * kConfigs[plan.config].sums() * 4));
}

bool has_mma(const Device& device, int config, int32_t weight_bits, bool per_group) {
  return has_kernel(config, weight_bits, per_group) &&
         config_for(config, weight_bits).shared_bytes(per_group) <= device.shared_per_cta;
}

void gemm_mma(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan) {
  const Config c = config_for(plan.config, args.desc.weight_bits);
  const Grids grids = grids_of(plan, args.desc, args.act.m);
  const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
  const int64_t groups = num_groups(args.desc.k);
  Params params{linear_params(args)};
  params.row_blocks = num_row_blocks(args.desc);
  params.blocks = plan.blocks;
  params.groups = checked_int("the groups of k", groups);
  params.steps = static_cast<int>(ceil_div(groups, c.warps_k));
  params.token_tiles = ActivationLayout(args.act).tiles;
  params.partials = args.workspace;
  params.read_once = grids.gemm.z == 1;
  const Family::Function kernel = kernel_of<Family>(args.desc.weight_bits, per_group, plan.config);
  Launch how{.grid = grids.gemm,
             .block = dim3(static_cast<unsigned>(c.threads())),
             .shared_bytes = static_cast<size_t>(c.shared_bytes(per_group)),
             .overlapped = device.has_sm90};
  if (device.has_sm90) {
    // Even shares of the SMs: the next GEMM's CTAs start while these run.
    const int64_t share = ceil_div(grids.tiles * plan.splits, device.num_sms);
    claim_share(how, share, clusters_at_once(kernel, how) / device.num_sms);
  }
  launch(stream, "gemm_mma", kernel, how, params);
  if (plan.splits == 1) return;
  launch(stream, "gemm_mma's reduction", per_group ? reduce_kernel<true> : reduce_kernel<false>,
         {.grid = grids.reduction, .block = dim3(kReduceThreads), .overlapped = device.has_sm90}, params, c.rows(),
         c.tokens(), grids.row_tiles, grids.tiles, plan.splits);
}

}  // namespace flexq::cuda
