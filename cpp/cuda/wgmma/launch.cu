// Host side of the wgmma GEMM: grid, workspace, launch.
#include <algorithm>
#include <array>
#include <atomic>
#include <iterator>
#include <random>

#include "core/error.h"
#include "cuda/kernel_table.h"
#include "cuda/launch.h"
#include "cuda/wgmma/config.h"

namespace flexq::cuda {
namespace wgmma {
namespace {

// Marks a launch's partial sums in a workspace that may hold anything: 64 random bits are not there by chance, and
// whoever reads the mark clears it.
uint64_t next_token() {
  static std::atomic<uint64_t> state = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15);  // splitmix64, Steele et al. 2014
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

struct Tiles {
  int rows, all;  // along rows, and times those along tokens
  int raster_width;
};

Tiles tiles_of(const GemmPlan& plan, const flexq_weight_desc& desc, int64_t m) {
  // CTAs at work at once then share about as many bytes of weights as of activations.
  constexpr int kRasterTokens = 4096;
  const int tokens = kConfigs[plan.config].tokens, raster_width = kRasterTokens / tokens;
  const int64_t rows = ceil_div(num_row_blocks(desc), kTileBlocks * plan.multicast);
  const int64_t all = rows * ceil_div(m, tokens);
  // Kernels compute with these in 32 bits.
  checked_int("gemm_wgmma's rows x tokens of tiles", std::max(all * plan.multicast * plan.splits, rows * raster_width));
  checked_int("gemm_wgmma's tiles of 8 tokens", ceil_div(m, kTokenTile));
  checked_int("gemm_wgmma's groups of k", num_groups(desc.k) * kMaxSplits);
  return {static_cast<int>(rows), static_cast<int>(all), raster_width};
}

Launch launch_of(const Config& c, int64_t cluster) {
  return {.grid = dim3(static_cast<unsigned>(cluster)),
          .block = dim3(static_cast<unsigned>(kThreads)),
          .shared_bytes = static_cast<size_t>(c.shared_bytes()),
          .overlapped = true,
          .cluster = static_cast<unsigned>(cluster)};
}

}  // namespace
}  // namespace wgmma

using namespace wgmma;

int num_wgmma_configs() { return static_cast<int>(std::size(kConfigs)); }

WgmmaShape wgmma_shape(int config) {
  const Config& c = kConfigs[config];
  return {kRows, c.tokens, c.stage_groups, c.group, c.channel, c.stream_k};
}

// Only the driver knows: it depends on which SMs of which part of the GPU there are.
std::array<int, kMaxSplits + 1> wgmma_clusters() {
  std::array<int, kMaxSplits + 1> clusters{};
  for (int size = 1; size <= kMaxSplits; ++size) {
    clusters[static_cast<size_t>(size)] =
        clusters_at_once(kernel_of<Family>(6, true, 0), launch_of(config_for(0, 6), size));
  }
  return clusters;
}

size_t wgmma_workspace_size(const Device& device, const GemmPlan& plan, const flexq_weight_desc& desc, int64_t m) {
  tiles_of(plan, desc, m);  // checks them before anything is queued
  if (!kConfigs[plan.config].stream_k) return 0;
  return align_up(static_cast<size_t>(device.num_sms) * (kConfigs[plan.config].sums_bytes() + sizeof(uint64_t)));
}

void gemm_wgmma(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan) {
  const Config c = config_for(plan.config, args.desc.weight_bits);
  const Tiles tiles = tiles_of(plan, args.desc, args.act.m);
  const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
  const Family::Function kernel = kernel_of<Family>(args.desc.weight_bits, per_group, plan.config);
  const int cluster = plan.multicast * plan.splits;
  Launch how = launch_of(c, cluster);
  const auto at_once = [&] { return int64_t{std::clamp(clusters_at_once(kernel, how), 1, device.num_sms)}; };
  int64_t clusters = tiles.all, whole = tiles.all;
  const int64_t steps = ceil_div(num_groups(args.desc.k), c.stage_groups);
  if (c.stream_k) {
    // Stream-K takes the partial wave and the wave before it: one to two tiles of work for each CTA.
    clusters = std::min(at_once(), tiles.all * steps);
    whole = std::max<int64_t>(tiles.all / clusters - 1, 0) * clusters;
  } else if (plan.splits == 1) {
    clusters = std::min<int64_t>(tiles.all, at_once());
  }
  how.grid = checked_grid("gemm_wgmma", clusters * cluster);
  const int64_t stream_steps = (tiles.all - whole) * steps;

  Params params{linear_params(args)};
  params.row_blocks = static_cast<int>(num_row_blocks(args.desc));
  params.groups = static_cast<int>(num_groups(args.desc.k));
  params.token_tiles = static_cast<int>(ActivationLayout(args.act).tiles);
  params.row_tiles = tiles.rows;
  params.tiles = tiles.all;
  params.read_once = tiles.all == tiles.rows;
  params.raster_width = tiles.raster_width;
  params.multicast = plan.multicast;
  params.splits = plan.splits;
  params.clocks_per_stage =
      static_cast<int>(c.weight_bytes() * static_cast<double>(std::min<int64_t>(how.grid.x, device.num_sms)) /
                       device.dram_bytes_per_us * device.clocks_per_us);
  params.whole_tiles = static_cast<int>(whole);
  params.steps_per_cta = static_cast<int>(stream_steps / clusters);
  params.longer_ctas = static_cast<int>(stream_steps % clusters);
  if (c.stream_k) {
    auto* workspace = static_cast<uint8_t*>(args.workspace);
    params.partials = reinterpret_cast<float*>(workspace);
    params.ready = reinterpret_cast<uint64_t*>(workspace + static_cast<size_t>(clusters) * c.sums_bytes());
    params.token = next_token();
  }
  launch(stream, "gemm_wgmma", kernel, how, params);
}

}  // namespace flexq::cuda
