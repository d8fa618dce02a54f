// The wgmma GEMM (wgmma/) of a mixture of experts: persistent CTAs over the tiles that routing gave, each tile's tokens
// being of one expert.
#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "core/error.h"
#include "cuda/experts/kernels.h"
#include "cuda/experts/table.cuh"
#include "cuda/launch.h"
#include "cuda/wgmma/kernel.cuh"

namespace flexq::cuda::experts {
namespace {

struct Params : wgmma::Params {
  ExpertTable table;

  template <int kTokens>
  __device__ LinearParams linear_of(int token_tile) const {
    LinearParams linear = *this;
    const int tile = token_tile / (kTokens / kTokenTile);
    move_to_tile(linear, table, tile, load_tile(table, tile));
    return linear;
  }
};
using KernelFunction = void (*)(Params);

constexpr bool instantiated(size_t config, bool per_group) {
  const wgmma::Config& c = wgmma::kConfigs[config];
  return !c.stream_k && (per_group ? c.group : c.channel);
}

template <int kConfig, bool kPerGroup>
__global__ void __launch_bounds__(65536 / wgmma::kConfigs[kConfig].launch_registers() / wgmma::kWarpgroup *
                                      wgmma::kWarpgroup,
                                  1) experts_wgmma_kernel(const __grid_constant__ Params params) {
#if FLEXQ_SM90A
  extern __shared__ __align__(1024) uint8_t shared[];
  Params p = params;
  p.tiles = p.row_tiles * load_num_tiles(params.table);
  p.whole_tiles = p.tiles;
  p.multicast = p.splits = 1;  // known to the compiler
  wgmma::run(wgmma::Cta<kConfig, kPerGroup, Params>(p, shared));
#endif
}

template <bool kPerGroup, size_t kConfig>
constexpr KernelFunction kernel_if_any() {
  if constexpr (instantiated(kConfig, kPerGroup)) {
    return experts_wgmma_kernel<static_cast<int>(kConfig), kPerGroup>;
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
  return kernels_of<kPerGroup>(std::make_index_sequence<std::size(wgmma::kConfigs)>{})[static_cast<size_t>(config)];
}

}  // namespace

bool has_wgmma(int config) {
  return instantiated(static_cast<size_t>(config), true) || instantiated(static_cast<size_t>(config), false);
}

void gemm_wgmma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan) {
  const wgmma::Config& c = wgmma::kConfigs[plan.config];
  const flexq_weight_desc& desc = args.gemm.desc;
  const KernelFunction kernel =
      desc.scheme == FLEXQ_SCHEME_GROUP ? kernel_of<true>(plan.config) : kernel_of<false>(plan.config);
  Launch how{.block = dim3(static_cast<unsigned>(wgmma::kThreads)),
             .shared_bytes = static_cast<size_t>(c.shared_bytes()),
             .overlapped = true};
  const int64_t at_once = std::clamp(clusters_at_once(kernel, how), 1, device.num_sms);
  // CTAs at work at once share an expert's rows, and tokens.
  constexpr int kRasterTokens = 4096;
  const int64_t row_tiles = ceil_div(num_row_blocks(desc), kTileBlocks), raster_width = kRasterTokens / c.tokens;
  checked_int("experts_wgmma's groups of k", num_groups(desc.k));
  checked_int("experts_wgmma's rows x tokens of tiles", std::max(row_tiles * args.max_tiles, row_tiles * raster_width));
  how.grid = checked_grid("experts_wgmma", std::min(row_tiles * args.max_tiles, at_once));

  Params params{};
  static_cast<LinearParams&>(params) = linear_params(args.gemm);
  params.row_blocks = static_cast<int>(num_row_blocks(desc));
  params.groups = static_cast<int>(num_groups(desc.k));
  params.token_tiles = static_cast<int>(ActivationLayout(args.gemm.act).tiles);
  params.row_tiles = static_cast<int>(row_tiles);
  params.raster_width = static_cast<int>(raster_width);
  params.clocks_per_stage = static_cast<int>(c.weight_bytes() * static_cast<double>(how.grid.x) /
                                             device.dram_bytes_per_us * device.clocks_per_us);
  params.table = args.table;
  params.read_once = args.read_once;
  launch(stream, "experts_wgmma", kernel, how, params);
}

}  // namespace flexq::cuda::experts
