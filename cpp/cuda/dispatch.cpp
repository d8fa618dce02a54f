// The model of cost that chooses a kernel, in one place. `flexq bench linear --explain` measures the candidates on a
// GPU and says where the model is wrong.
//
// A GEMM takes as long as the slower of reading the weights from memory and a multiprocessor's own work on its tiles,
// wave by wave. The constants are fitted to measurements on an H100 (docs/kernels.md), of GEMMs in linear layers,
// between their quantizers; they are clocks where the work is a multiprocessor's, and scale with the device's
// bandwidth, clock and number of multiprocessors.
#include "cuda/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

// Up to so many tokens, a tile of mma.sync's, wgmma is not asked; from so many on mma.sync runs only by its name.
constexpr int64_t kMmaTokens = kTokenTile, kWgmmaTokens = 256;

struct Problem {
  const Device& device;
  const flexq_weight_desc& desc;
  int64_t m;
  int64_t groups;
  double weight_bytes;

  bool per_group() const { return desc.scheme == FLEXQ_SCHEME_GROUP; }
  double memory_us(double bytes) const { return bytes / device.dram_bytes_per_us; }
  double clocks_us(double clocks) const { return clocks / device.clocks_per_us; }
};

// Of a tile of 128 rows and so many tokens, a group of 128 k: the tensor cores' work and what is not hidden behind it.
double clocks_of_group(int tokens, bool per_group) {
  switch (tokens) {
    case 16:
      return per_group ? 385.2 : 265.6;
    case 32:
      return per_group ? 478.3 : 509.7;
    case 64:
      return per_group ? 632.3 : 614.7;
    case 128:
      return per_group ? 1029 : 667.7;
    default:
      return 1161;  // of 256, channel only
  }
}

double wgmma_us(const Problem& p, const GemmPlan& plan) {
  const WgmmaShape c = wgmma_shape(plan.config);
  const int64_t row_tiles = ceil_div(p.desc.n, static_cast<int64_t>(c.rows) * plan.multicast) * plan.multicast;
  const int64_t tiles = row_tiles * ceil_div(p.m, c.tokens);
  const auto blocks = static_cast<double>(tiles * plan.splits);
  const auto tokens = static_cast<double>(c.tokens);
  const auto work = static_cast<double>(ceil_div(p.groups, plan.splits));  // groups of a tile's part
  const auto waves = static_cast<double>(ceil_div(tiles, p.device.clusters[plan.splits]));
  double group_clocks = clocks_of_group(c.tokens, p.per_group());
  // Multicast relieves L2 where tiles are large and many, and holds peers up elsewhere. Streamed, tiles that read the
  // same weights do so at different times; of weights that are read once, less is lost by it than by whole waves.
  const bool relief = c.tokens >= 128 && waves > 2, again = p.m > c.tokens;
  if (c.stream_k) {
    if (again) group_clocks *= relief ? 1.06 : 1.02;
  } else if (relief != (plan.multicast > 1) || (relief && !again)) {
    group_clocks *= 1.125;
  }
  const double output_clocks = 282.4 + 21.95 * tokens;
  const double parts_clocks = plan.splits > 1 ? 2600 + 10.83 * tokens : 0;
  // Of more tokens the quantizers around it do not fit beside it and wait for multiprocessors that have none of it.
  const bool wait = p.m > max_single_tokens(!p.per_group());
  const double values = wait ? static_cast<double>(p.m * p.desc.k) : 0.0;
  const double quantize_us = std::min(5.0, 1e-6 * values * (p.per_group() ? 1.961 : 0.8672));
  double tile_clocks = waves * (work * group_clocks + output_clocks) + parts_clocks;
  if (c.stream_k) {
    // As even as steps of K allow; sums meet through L2, those of more than two parts one after the other.
    const double even = blocks / p.device.num_sms;
    tile_clocks = even * work * group_clocks + waves * output_clocks + 8000 + 4000 * std::max(1.0, 1 / even);
  }
  const double sm_us = p.clocks_us(tile_clocks) + quantize_us * std::min(1.0, blocks / p.device.num_sms);
  // Weights from memory, and what every tile brings in from L2, which has a limit of its own.
  const double l2_bytes = blocks * work * (kRecordBytes * c.rows / kRecordRows + tokens * kGroup / plan.multicast);
  const double idle = std::max(0.0, 1 - blocks / p.device.num_sms);
  constexpr double kL2BytesAClock = 29.69;  // of a multiprocessor
  const double memory_us =
      std::max((1 + 0.1925 * idle) * 0.7072 * p.memory_us(p.weight_bytes) + 0.2536 * p.memory_us(l2_bytes),
               p.clocks_us(l2_bytes / kL2BytesAClock / p.device.num_sms));
  const double output_us = p.memory_us(static_cast<double>(p.m * p.desc.n) * 2) / 4;
  constexpr double kLaunchUs = 2.25;
  return kLaunchUs + std::max(sm_us, memory_us) + output_us + (plan.splits > 1 ? 0.6029 : 0.0) +
         (plan.multicast > 1 && !relief ? 1.184 : 0.0);
}

// What differs between one tile of tokens, of 8 or more, and several.
struct MmaFit {
  double launch_us;
  double group_ops, channel_ops;  // a clock, of a multiprocessor beside unpacking
  // Shares of reading the weights that are lost:
  double idle_wave;     // to the idle part of the last wave
  double idle_sms = 0;  // to multiprocessors without a thread block
  double wide;          // to warps with many sums, whose activations come late
  double again = 0;     // to each further tile of tokens
  double l2;            // weight of L2's traffic, in terms of the memory's
  double l1_misses;     // of activations that warps load for themselves in scheme channel
  double shared_act;    // and of activations that a thread block waits for together
  double row_us, split_us;
};
constexpr MmaFit kEightTokens{
    .launch_us = 1.328,
    .group_ops = 898.2,
    .channel_ops = 1365,
    .idle_wave = 0.1635,
    .idle_sms = 0.5566,
    .wide = 0.1012,
    .l2 = 0.126,
    .l1_misses = 0.5952,
    .shared_act = 0.4608,
    .row_us = 0.009818,
    .split_us = 3.316,
};
constexpr MmaFit kOneTile{
    .launch_us = 1.967,
    .group_ops = 834.8,
    .channel_ops = 948.7,
    .idle_wave = 0.3065,
    .idle_sms = 0.4339,
    .wide = 0.1284,
    .l2 = 0.1004,
    .l1_misses = 0.2538,
    .shared_act = 0.4936,
    .row_us = 0.01118,
    .split_us = 2.848,
};
constexpr MmaFit kTiles{
    .launch_us = 1.681,
    .group_ops = 804.5,
    .channel_ops = 984.3,
    .idle_wave = 1.287,
    .wide = 0.3449,
    .again = 0.1551,
    .l2 = 0.3014,
    .l1_misses = 0.1786,
    .shared_act = 0.7523,
    .row_us = 0.009714,
    .split_us = 2.748,
};

double mma_us(const Problem& p, const GemmPlan& plan) {
  const MmaShape c = mma_shape(plan.config);
  const int64_t token_tiles = ceil_div(p.m, c.tokens);
  const MmaFit& fit = p.m <= kTokenTile ? kEightTokens : token_tiles == 1 ? kOneTile : kTiles;
  const int blocks = c.warps_n * plan.blocks;
  const double rows = kRecordRows * blocks, tokens = c.tokens;
  const int64_t row_blocks = num_row_blocks(p.desc);
  const int64_t tiles = ceil_div(row_blocks, blocks) * token_tiles, ctas = tiles * plan.splits;
  const auto sms = static_cast<double>(p.device.num_sms);
  const double waves = static_cast<double>(ctas) / (sms * c.ctas_per_sm);
  const double idle = waves <= 1 ? 1.0 : std::ceil(waves) / waves;
  const double idle_sms = std::max(0.0, sms / static_cast<double>(ctas) - 1);
  const double work = static_cast<double>(tiles * p.groups);
  // A tile's group: products at what mma.sync reaches; for bits, its MMAs and transposes.
  double clocks = 2 * rows * std::max(tokens, 16.0) * kGroup / (p.per_group() ? fit.group_ops : fit.channel_ops);
  if (c.act_bits != 0) clocks = rows / kRecordRows * (110 + 2.0 * kPlanes * c.act_bits);
  const double sm_us = p.clocks_us(work * clocks / sms) * idle;
  const double act_bytes = tokens * kGroup;
  // Without a barrier between them, warps of a multiprocessor find some of what they load in its L1.
  const double l1_misses = c.shared_act || p.per_group() ? 1.0 : fit.l1_misses;
  const double bytes = work * (kRecordBytes * rows / kRecordRows + l1_misses * act_bytes) - p.weight_bytes;
  const double lost = fit.idle_wave * (idle - 1) + fit.idle_sms * idle_sms +
                      (!c.shared_act && c.max_blocks * c.tokens > 8 * kTokenTile ? fit.wide : 0.0) +
                      fit.again * static_cast<double>(token_tiles - 1);
  const double memory_us = p.memory_us(p.weight_bytes) * (1 + lost) + fit.l2 * p.memory_us(bytes) +
                           (c.shared_act ? fit.shared_act * p.memory_us(work * act_bytes) : 0.0);
  constexpr double kWaveUs = 0.3;
  return fit.launch_us + kWaveUs * std::max(0.0, std::ceil(waves) - 1) + std::max(sm_us, memory_us) +
         fit.row_us * rows + (plan.splits > 1 ? fit.split_us : 0.0);
}

// Splitting K costs mma a second kernel: only where tiles leave a good part of the GPU idle.
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
    if (bits && (c.act_bits != act_bits || m > c.tokens)) continue;
    const int splits = mma_splits(p, c);
    add({GemmPlan::kMma, i, splits, 1, c.max_blocks});
    // Fewer rows where they fill the GPU evenly.
    for (int blocks = c.min_blocks; splits == 1 && blocks < c.max_blocks; ++blocks) {
      const int64_t slots = static_cast<int64_t>(device.num_sms) * c.warps_n;
      const int64_t turns = ceil_div(num_row_blocks(desc), slots * blocks);
      if (ceil_div(num_row_blocks(desc), slots * turns) == blocks) add({GemmPlan::kMma, i, 1, 1, blocks});
    }
  }
  for (int i = 0; device.has_wgmma && m > kMmaTokens && i < num_wgmma_configs(); ++i) {
    const WgmmaShape c = wgmma_shape(i);
    if (!(p.per_group() ? c.group : c.channel)) continue;
    // Nobody wants more columns than there are tokens, nor few columns for many tokens.
    if (c.tokens >= 2 * m || (m >= 64 && c.tokens < 32) || (m >= 256 && c.tokens < 64)) continue;
    const int64_t tiles = ceil_div(desc.n, c.rows) * ceil_div(m, c.tokens);
    if (c.stream_k) {
      if (tiles % device.num_sms != 0) add({GemmPlan::kWgmma, i, 1, 1});
      continue;
    }
    add({GemmPlan::kWgmma, i, 1, 1});
    if (tiles > 1 && desc.n > c.rows) add({GemmPlan::kWgmma, i, 1, 2});
    // Parts of K only while all of them are at work at once.
    for (int splits = 2; splits <= kMaxSplits; ++splits) {
      if (tiles <= device.clusters[splits] && splits * c.stage_groups <= groups) {
        add({GemmPlan::kWgmma, i, splits, 1});
      }
    }
  }
  // Of many tokens the model knows wgmma alone.
  const auto last = [&](const Candidate& c) {
    return c.plan.family == GemmPlan::kMma && device.has_wgmma && m >= kWgmmaTokens;
  };
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
