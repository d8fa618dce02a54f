// The model of cost that chooses a kernel; its constants are a table for each GPU (costs.h).
//
// A GEMM takes as long as the slower of reading the weights from memory and an SM's own work on its tiles, wave by
// wave. Costs that are clocks or shares scale with the device's bandwidth, clock and number of SMs.
#include "cuda/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

struct Problem {
  const Device& device;
  const flexq_weight_desc& desc;
  int64_t m;
  int64_t groups;
  double weight_bytes;

  const CostTable& costs() const { return device.costs; }
  bool per_group() const { return desc.scheme == FLEXQ_SCHEME_GROUP; }
  double memory_us(double bytes) const { return bytes / device.dram_bytes_per_us; }
  double clocks_us(double clocks) const { return clocks / device.clocks_per_us; }
};

// Of a tile of 128 rows and so many tokens, a group of 128 k.
double clocks_of_group(const CostTable& costs, int tokens, bool per_group) {
  switch (tokens) {
    case 16:
      return per_group ? costs.wgmma_group_clocks_16 : costs.wgmma_channel_clocks_16;
    case 32:
      return per_group ? costs.wgmma_group_clocks_32 : costs.wgmma_channel_clocks_32;
    case 64:
      return per_group ? costs.wgmma_group_clocks_64 : costs.wgmma_channel_clocks_64;
    case 128:
      return per_group ? costs.wgmma_group_clocks_128 : costs.wgmma_channel_clocks_128;
    default:
      return costs.wgmma_channel_clocks_256;
  }
}

// From so many tokens a tile on, in more than two waves, multicast relieves L2; elsewhere peers hold each other up.
constexpr int kReliefTokens = 128, kReliefWaves = 2;

double wgmma_us(const Problem& p, const GemmPlan& plan) {
  const CostTable& costs = p.costs();
  const WgmmaShape c = wgmma_shape(plan.config);
  const int64_t row_tiles = ceil_div(p.desc.n, static_cast<int64_t>(c.rows) * plan.multicast) * plan.multicast;
  const int64_t tiles = row_tiles * ceil_div(p.m, c.tokens);
  const auto ctas = static_cast<double>(tiles * plan.splits);
  const auto tokens = static_cast<double>(c.tokens);
  const auto work = static_cast<double>(ceil_div(p.groups, plan.splits));  // groups of a tile's part
  const auto waves = static_cast<double>(ceil_div(tiles, p.device.clusters[plan.splits]));
  const bool relief = c.tokens >= kReliefTokens && waves > kReliefWaves;
  const bool reread = p.m > c.tokens;  // weights are read by several tiles
  double group_clocks = clocks_of_group(costs, c.tokens, p.per_group());
  if (c.stream_k) {
    // Tiles that read the same weights do so at different times.
    if (reread) group_clocks *= relief ? costs.wgmma_stream_relief : costs.wgmma_stream_reread;
  } else if (relief != (plan.multicast > 1) || (relief && !reread)) {
    group_clocks *= costs.wgmma_misfit;
  }
  const double output_clocks = costs.wgmma_output_clocks + costs.wgmma_output_token_clocks * tokens;
  double tile_clocks = waves * (work * group_clocks + output_clocks);
  if (plan.splits > 1) tile_clocks += costs.wgmma_parts_clocks + costs.wgmma_parts_token_clocks * tokens;
  if (c.stream_k) {
    // As even as steps of K allow; parts of a tile beyond the second are added one after the other.
    const double even = ctas / p.device.num_sms;
    tile_clocks = even * work * group_clocks + waves * output_clocks + costs.wgmma_stream_clocks +
                  costs.wgmma_stream_fixup_clocks * std::max(1.0, 1 / even);
  }
  // Quantizers of more tokens do not fit beside the GEMM, and wait for SMs without it.
  const bool wait = p.m > max_single_tokens(!p.per_group());
  const double values = wait ? static_cast<double>(p.m * p.desc.k) : 0.0;
  const double quantize_us =
      std::min(costs.wgmma_quantize_most_us,
               1e-6 * values * (p.per_group() ? costs.wgmma_quantize_group_us : costs.wgmma_quantize_channel_us));
  const double sm_us = p.clocks_us(tile_clocks) + quantize_us * std::min(1.0, ctas / p.device.num_sms);
  // Weights from memory, and what every tile brings in from L2, which has a limit of its own.
  const double l2_bytes =
      ctas * work * (record_bytes(p.desc.weight_bits) * c.rows / kRecordRows + tokens * kGroup / plan.multicast);
  const double idle = std::max(0.0, 1 - ctas / p.device.num_sms);
  const double memory_us = std::max((1 + costs.wgmma_idle * idle) * costs.wgmma_weights * p.memory_us(p.weight_bytes) +
                                        costs.wgmma_l2 * p.memory_us(l2_bytes),
                                    p.clocks_us(l2_bytes / costs.wgmma_l2_bytes / p.device.num_sms));
  const double output_us = costs.wgmma_output * p.memory_us(static_cast<double>(p.m * p.desc.n) * 2);
  return costs.wgmma_launch_us + std::max(sm_us, memory_us) + output_us +
         (plan.splits > 1 ? costs.wgmma_split_us : 0.0) +
         (plan.multicast > 1 && !relief ? costs.wgmma_multicast_us : 0.0);
}

double mma_us(const Problem& p, const GemmPlan& plan) {
  const MmaShape c = mma_shape(plan.config);
  const int64_t token_tiles = ceil_div(p.m, c.tokens);
  const MmaCosts& costs = p.m <= kTokenTile  ? p.costs().mma_8
                          : token_tiles == 1 ? p.costs().mma_tile
                                             : p.costs().mma_tiles;
  const int blocks = c.warps_n * plan.blocks;
  const double rows = kRecordRows * blocks, tokens = c.tokens;
  const int64_t row_blocks = num_row_blocks(p.desc);
  const int64_t tiles = ceil_div(row_blocks, blocks) * token_tiles, ctas = tiles * plan.splits;
  const auto sms = static_cast<double>(p.device.num_sms);
  const double waves = static_cast<double>(ctas) / (sms * c.ctas_per_sm);
  const double idle = waves <= 1 ? 1.0 : std::ceil(waves) / waves;
  const double idle_sms = std::max(0.0, sms / static_cast<double>(ctas) - 1);
  const double work = static_cast<double>(tiles * p.groups);
  // A tile's group: products at the rate that mma.sync reaches; of bits, MMAs and transposes.
  double clocks = 2 * rows * std::max(tokens, 16.0) * kGroup / (p.per_group() ? costs.group_ops : costs.channel_ops);
  if (c.act_bits != 0) {
    clocks = rows / kRecordRows *
             (p.costs().mma_bits_clocks + p.costs().mma_bit_product_clocks * p.desc.weight_bits * c.act_bits);
  }
  const double sm_us = p.clocks_us(work * clocks / sms) * idle;
  const double act_bytes = tokens * kGroup;
  // Without a barrier between them, warps of an SM find some of what they load in its L1.
  const double l1_misses = c.shared_act || p.per_group() ? 1.0 : costs.l1_misses;
  const double bytes =
      work * (record_bytes(p.desc.weight_bits) * rows / kRecordRows + l1_misses * act_bytes) - p.weight_bytes;
  const double lost = costs.idle_wave * (idle - 1) + costs.idle_sms * idle_sms +
                      (!c.shared_act && c.max_blocks * c.tokens > 8 * kTokenTile ? costs.wide : 0.0) +
                      costs.again * static_cast<double>(token_tiles - 1);
  const double memory_us = p.memory_us(p.weight_bytes) * (1 + lost) + costs.l2 * p.memory_us(bytes) +
                           (c.shared_act ? costs.shared_act * p.memory_us(work * act_bytes) : 0.0);
  return costs.launch_us + p.costs().mma_wave_us * std::max(0.0, std::ceil(waves) - 1) + std::max(sm_us, memory_us) +
         costs.row_us * rows + (plan.splits > 1 ? costs.split_us : 0.0);
}

// Split-K costs mma a second kernel: only where tiles leave a quarter of the GPU idle.
int mma_splits(const Problem& p, const MmaShape& c) {
  const int64_t tiles = ceil_div(num_row_blocks(p.desc), int64_t{c.warps_n} * c.max_blocks) * ceil_div(p.m, c.tokens);
  if (4 * tiles >= 3 * p.device.num_sms) return 1;
  const int64_t slots = static_cast<int64_t>(p.device.num_sms) * c.ctas_per_sm;
  return static_cast<int>(std::max<int64_t>(1, std::min(ceil_div(p.groups, c.warps_k), slots / tiles)));
}

}  // namespace

Candidates::Candidates(const Device& device, const flexq_weight_desc& desc, int32_t act_bits, int64_t m) {
  const int64_t groups = num_groups(desc.k);
  const Problem p{device, desc, m, groups, static_cast<double>(WeightLayout(desc).size)};
  const auto add = [&](const GemmPlan& plan) {
    items_[count_++] = {plan, plan.family == GemmPlan::kMma ? mma_us(p, plan) : wgmma_us(p, plan)};
  };
  for (int i = 0; i < num_mma_configs(); ++i) {
    const MmaShape c = mma_shape(i);
    const bool bits = c.act_bits != 0;
    if ((bits && (c.act_bits != act_bits || m > c.tokens)) || !has_mma(device, i, desc.weight_bits, p.per_group()))
      continue;
    const int splits = mma_splits(p, c);
    add({GemmPlan::kMma, i, splits, 1, c.max_blocks});
    // Fewer rows where they fill the GPU evenly.
    for (int blocks = c.min_blocks; splits == 1 && blocks < c.max_blocks; ++blocks) {
      const int64_t slots = static_cast<int64_t>(device.num_sms) * c.warps_n;
      const int64_t waves = ceil_div(num_row_blocks(desc), slots * blocks);
      if (ceil_div(num_row_blocks(desc), slots * waves) == blocks) add({GemmPlan::kMma, i, 1, 1, blocks});
    }
  }
  const bool wgmma = device.has_wgmma && static_cast<double>(m) > device.costs.mma_only_tokens;
  for (int i = 0; wgmma && i < num_wgmma_configs(); ++i) {
    const WgmmaShape c = wgmma_shape(i);
    if (!(p.per_group() ? c.group : c.channel)) continue;
    // No tile has twice the tokens that there are, nor few of very many.
    if (c.tokens >= 2 * m || (m >= 64 && c.tokens < 32) || (m >= 256 && c.tokens < 64)) continue;
    const int64_t tiles = ceil_div(desc.n, c.rows) * ceil_div(m, c.tokens);
    if (c.stream_k) {
      if (tiles % device.num_sms != 0) add({GemmPlan::kWgmma, i, 1, 1});
      continue;
    }
    add({GemmPlan::kWgmma, i, 1, 1});
    if (tiles > 1 && desc.n > c.rows) add({GemmPlan::kWgmma, i, 1, 2});
    // K is split only so far that all parts run at once.
    for (int splits = 2; splits <= kMaxSplits; ++splits) {
      if (tiles <= device.clusters[splits] && splits * c.stage_groups <= groups) {
        add({GemmPlan::kWgmma, i, splits, 1});
      }
    }
  }
  const bool only_wgmma = device.has_wgmma && static_cast<double>(m) >= device.costs.wgmma_only_tokens;
  const auto last = [&](const Candidate& c) { return c.plan.family == GemmPlan::kMma && only_wgmma; };
  std::sort(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(count_),
            [&](const Candidate& a, const Candidate& b) {
              return last(a) != last(b) ? last(b) : a.microseconds < b.microseconds;
            });
}

const Candidate& Candidates::named(const char* name) const {
  for (const Candidate& candidate : *this) {
    if (std::strcmp(name_of(candidate.plan).text, name) == 0) return candidate;
  }
  fail(FLEXQ_INVALID_ARGUMENT, "stream.kernel ", name, " does not run this GEMM; flexq_gemm_kernels lists what does");
}

PlanName name_of(const GemmPlan& plan) {
  PlanName name;
  if (plan.family == GemmPlan::kWgmma) {
    const WgmmaShape c = wgmma_shape(plan.config);
    if (c.stream_k) {
      std::snprintf(name.text, sizeof name.text, "wgmma-s8 %dx%d stream", c.rows, c.tokens);
    } else {
      std::snprintf(name.text, sizeof name.text, "wgmma-s8 %dx%d split%d cast%d", c.rows, c.tokens, plan.splits,
                    plan.multicast);
    }
  } else {
    const MmaShape c = mma_shape(plan.config);
    std::snprintf(name.text, sizeof name.text, "mma-%s %dx%d split%d%s", c.product,
                  kRecordRows * c.warps_n * plan.blocks, c.tokens, plan.splits, c.shared_act ? " shared" : "");
  }
  return name;
}

}  // namespace flexq::cuda
