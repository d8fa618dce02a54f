// The model of cost that chooses a kernel, in one place. `flexq bench linear --explain` measures the candidates on a
// GPU and says where the model is wrong.
//
// A GEMM takes as long as the slower of reading the weights from memory and a multiprocessor's own work on its tiles,
// wave by wave. The constants are fitted to measurements on an H100 (docs/kernels.md); they are clocks where the work
// is a multiprocessor's, and scale with the device's bandwidth, clock and number of multiprocessors.
#include "cuda/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

// Up to so many tokens mma.sync was never behind.
constexpr int64_t kMmaTokens = 16;
constexpr double kMmaLaunchUs = 1.3, kWgmmaLaunchUs = 4.0;

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

double wgmma_us(const Problem& p, const GemmPlan& plan) {
  const WgmmaShape c = wgmma_shape(plan.config);
  const int64_t row_tiles = ceil_div(p.desc.n, static_cast<int64_t>(c.rows) * plan.multicast) * plan.multicast;
  const int64_t blocks = row_tiles * ceil_div(p.m, c.tokens) * plan.splits;
  const auto tokens = static_cast<double>(c.tokens);
  const auto work = static_cast<double>(ceil_div(p.groups, plan.splits));  // groups of a tile's part
  const auto waves = static_cast<double>(ceil_div(blocks, p.device.num_sms));
  // Of a group: under 4 clocks a token are the tensor cores' own, the rest is not hidden behind them.
  double group_clocks = p.per_group() ? 330 + 6.4 * tokens : 150 + 3.85 * tokens;
  // Multicast relieves L2 where tiles are large and many, and holds peers up elsewhere.
  const bool relief = c.tokens >= 128 && waves > 2;
  if (relief != (plan.multicast > 1)) group_clocks *= 1.04;
  const double output_clocks = 600 + 17 * tokens;
  const double parts_clocks = plan.splits > 1 ? 1500 + 40 * tokens : 0;
  const double sm_us = p.clocks_us(waves * (work * group_clocks + output_clocks) + parts_clocks);
  // Weights from memory, and what every tile brings in from L2.
  const double bytes = kRecordBytes * c.rows / kRecordRows + tokens * kGroup / plan.multicast;
  const double idle = std::max(0.0, 1 - static_cast<double>(blocks) / p.device.num_sms);
  const double memory_us = (1 + 0.1 * idle) * 0.87 * p.memory_us(p.weight_bytes) +
                           0.072 * p.memory_us(static_cast<double>(blocks) * work * bytes);
  const double output_us = p.memory_us(static_cast<double>(p.m * p.desc.n) * 2) / 4;
  return kWgmmaLaunchUs + std::max(sm_us, memory_us) + output_us + (plan.splits > 1 ? 1.0 : 0.0) +
         (plan.multicast > 1 && !relief ? 1.0 : 0.0);
}

// What differs between few tokens, whose single tile overlaps with the layer before, and several tiles of tokens.
struct MmaFit {
  double group_ops, channel_ops;  // a clock, of a multiprocessor beside unpacking
  double shared_act;              // weight of activations that a thread block waits for together
  double again, idle;             // shares of reading the weights: for each further tile, for an idle last wave
  double l2;                      // of its traffic, in terms of the memory's
  double row_us, split_us;
};
constexpr MmaFit kOneTile{1720, 4860, 5.5, 0.0, 0.48, 0.05, 0.018, 1.75};
constexpr MmaFit kTiles{1700, 2050, 1.0, 0.5, 0.3, 0.07, 0.02, 2.0};

double mma_us(const Problem& p, const GemmPlan& plan) {
  const MmaShape c = mma_shape(plan.config);
  const int64_t token_tiles = ceil_div(p.m, c.tokens);
  const MmaFit& fit = token_tiles == 1 ? kOneTile : kTiles;
  const int64_t tiles = ceil_div(p.desc.n, c.rows) * token_tiles;
  const double waves =
      static_cast<double>(tiles * plan.splits) / (static_cast<double>(p.device.num_sms) * c.ctas_per_sm);
  const double idle = waves <= 1 ? 1.0 : std::ceil(waves) / waves;  // of the last wave
  const double work = static_cast<double>(tiles * p.groups);
  const double rows = c.rows, tokens = c.tokens;
  // A tile's group: products at what mma.sync reaches; for bits, its MMAs and transposes.
  double clocks = 2 * rows * std::max(tokens, 16.0) * kGroup / (p.per_group() ? fit.group_ops : fit.channel_ops);
  if (c.act_bits != 0) clocks = rows / kRecordRows * (110 + 2.0 * kPlanes * c.act_bits);
  const double sm_us = p.clocks_us(work * clocks / p.device.num_sms) * idle;
  const double act_bytes = tokens * kGroup * (c.shared_act ? fit.shared_act : p.per_group() ? 1.0 : 0.5);
  const double bytes = work * (kRecordBytes * rows / kRecordRows + act_bytes) - p.weight_bytes;
  // Measured and not understood: over a long K this kernel for 16 tokens loses to the same one for 8 and for 32.
  const double depth = static_cast<double>(p.desc.k) / 28672;
  const double odd = c.tokens == 16 && !c.shared_act ? 0.1 * depth * depth : 0.0;
  const double empty = p.m <= kTokenTile && c.tokens > kTokenTile ? 0.06 : 0.0;  // columns without a token
  const double reads = 1 + odd + empty + fit.again * static_cast<double>(token_tiles - 1) + fit.idle * (idle - 1);
  const double memory_us = p.memory_us(p.weight_bytes) * reads + fit.l2 * p.memory_us(bytes);
  const double ramp_us = fit.row_us * rows + (tiles * plan.splits < p.device.num_sms ? 0.5 : 0.0);
  return kMmaLaunchUs + (p.m > kMmaTokens ? 1.5 : 0.0) + std::max(sm_us, memory_us) + ramp_us +
         (plan.splits > 1 ? fit.split_us : 0.0);
}

// Splitting K costs mma a second kernel: only where tiles leave a good part of the GPU idle.
int mma_splits(const Problem& p, const MmaShape& c) {
  const int64_t tiles = ceil_div(p.desc.n, c.rows) * ceil_div(p.m, c.tokens);
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
    add({GemmPlan::kMma, i, mma_splits(p, c), 1});
  }
  for (int i = 0; device.has_wgmma && m > kMmaTokens && i < num_wgmma_configs(); ++i) {
    const WgmmaShape c = wgmma_shape(i);
    if (!(p.per_group() ? c.group : c.channel)) continue;
    // Nobody wants more columns than there are tokens, nor few columns for many tokens.
    if (c.tokens >= 2 * m || (m >= 256 && c.tokens < 64)) continue;
    const int64_t tiles = ceil_div(desc.n, c.rows) * ceil_div(m, c.tokens);
    add({GemmPlan::kWgmma, i, 1, 1});
    if (tiles > 1 && desc.n > c.rows) add({GemmPlan::kWgmma, i, 1, 2});
    // Parts of K only while all of them are at work at once, and clusters of them fit.
    for (const int splits : {2, 3, 4}) {
      if (tiles * splits <= device.num_sms && splits * c.groups_a_stage <= groups)
        add({GemmPlan::kWgmma, i, splits, 1});
    }
  }
  std::sort(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(count_),
            [](const Candidate& a, const Candidate& b) { return a.microseconds < b.microseconds; });
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
    std::snprintf(name.text, sizeof name.text, "wgmma-s8 %dx%d split%d cast%d", c.rows, c.tokens, plan.splits,
                  plan.multicast);
  } else {
    const MmaShape c = mma_shape(plan.config);
    std::snprintf(name.text, sizeof name.text, "mma-%s %dx%d split%d", c.product, c.rows, c.tokens, plan.splits);
  }
  return name;
}

}  // namespace flexq::cuda
