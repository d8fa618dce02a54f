// The model of cost that chooses a kernel, in one place. `flexq bench linear --explain` measures the candidates on a
// GPU and shows where the model is wrong.
//
// A GEMM takes as long as the slowest of: reading the weights from memory; bringing weights and activations from L2 to
// the multiprocessors, which every tile does anew; a multiprocessor's own work on its tiles, wave by wave. Figures are
// fitted to measurements on an H200 (docs/kernels.md) and scale with the device's memory bandwidth, clock and size.
#include "cuda/dispatch.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

struct Costs {
  double launch = 2.2;              // us before the first and after the last byte
  double l2_over_dram = 1.45;       // bandwidth
  double sm_bytes_per_clock = 50;   // that a multiprocessor takes in at most
  double tensor_efficiency = 0.80;  // of the peak under load
  double group_clocks = 330;        // at least, for a tile's group of 128 k in wgmma
  double scale_clocks_per_token = 2.6;  // beyond the products, scheme group
  double split_launch = 0.6;        // us for parts of K to meet in a cluster
  double reduction = 2.0;           // us for a second kernel to add up
};
constexpr Costs kCosts;

struct Problem {
  const Device& device;
  const flexq_weight_desc& desc;
  int64_t m;
  int64_t groups;
  double weight_bytes;

  bool per_group() const { return desc.scheme == FLEXQ_SCHEME_GROUP; }
  double dram_us() const { return weight_bytes / device.dram_bytes_per_us; }
  double clocks_us(double clocks) const { return clocks / device.clocks_per_us; }
};

double wgmma_us(const Problem& p, const GemmPlan& plan) {
  const WgmmaShape c = wgmma_shape(plan.config);
  const int64_t row_tiles = ceil_div(p.desc.n, static_cast<int64_t>(c.rows) * plan.multicast) * plan.multicast;
  const int64_t tiles = row_tiles * ceil_div(p.m, c.tokens);
  const int64_t blocks = tiles * plan.splits;
  const auto tokens = static_cast<double>(c.tokens);
  const double work = static_cast<double>(ceil_div(p.groups, plan.splits));  // groups of a tile's part

  // A multiprocessor's work on a group: 4096 products a clock, or what its instructions take, or its bytes.
  double clocks = 4 * tokens / kCosts.tensor_efficiency;
  if (p.per_group()) clocks = std::max(clocks, kCosts.scale_clocks_per_token * tokens + 4 * tokens);
  clocks = std::max(clocks, kCosts.group_clocks);
  const double bytes = kRecordBytes * c.rows / kRecordRows + tokens * kGroup / plan.multicast;
  clocks = std::max(clocks, bytes / kCosts.sm_bytes_per_clock);
  const double waves = static_cast<double>(ceil_div(blocks, p.device.num_sms));
  const double sm_us = p.clocks_us(waves * work * clocks);
  const double l2_us = static_cast<double>(blocks) * work * bytes / (p.device.dram_bytes_per_us * kCosts.l2_over_dram);
  const double output_us =
      static_cast<double>(p.m * p.desc.n) * 2 / p.device.dram_bytes_per_us + p.clocks_us(20 * tokens);
  const double parts_us = plan.splits > 1 ? kCosts.split_launch + p.clocks_us(6 * tokens) : 0.0;
  return kCosts.launch + std::max({sm_us, l2_us, p.dram_us()}) + output_us + parts_us;
}

double mma_us(const Problem& p, const GemmPlan& plan) {
  const MmaShape c = mma_shape(plan.config);
  const int64_t row_tiles = ceil_div(p.desc.n, c.rows), token_tiles = ceil_div(p.m, c.tokens);
  const auto blocks = static_cast<double>(row_tiles * token_tiles * plan.splits);
  const double slots = static_cast<double>(p.device.num_sms) * c.ctas_per_sm;
  const double waves = blocks <= slots ? 1.0 : static_cast<double>(ceil_div(static_cast<int64_t>(blocks), static_cast<int64_t>(slots))) * slots / blocks;
  const double tokens = c.tokens;
  const double bytes = kRecordBytes * c.rows / kRecordRows + tokens * kGroup;
  const double tiles_groups = static_cast<double>(row_tiles * token_tiles * p.groups);
  const double l2_us = tiles_groups * bytes / (p.device.dram_bytes_per_us * kCosts.l2_over_dram);
  // Instructions of a record: unpacking, products and scaling, on four schedulers.
  const double products = c.act_bits == 0 ? 90.0 + 16.0 * tokens / 8 + (p.per_group() ? 16.0 * tokens / 8 : 0.0)
                                          : 330.0 + 8.0 * kPlanes * c.act_bits;
  const double sm_us = p.clocks_us(tiles_groups * c.rows / kRecordRows * products / (4.0 * p.device.num_sms)) * waves;
  return kCosts.launch + std::max({l2_us * waves, sm_us, p.dram_us() * waves}) + (plan.splits > 1 ? kCosts.reduction : 0.0);
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
  for (int i = 0; i < num_mma_configs(); ++i) {
    const MmaShape c = mma_shape(i);
    const bool bits = c.act_bits != 0;
    if (bits && (c.act_bits != act_bits || m > c.tokens)) continue;
    const GemmPlan plan{GemmPlan::kMma, i, mma_splits(p, c), 1};
    add(plan, mma_us(p, plan));
  }
  for (int i = 0; device.has_wgmma && i < num_wgmma_configs(); ++i) {
    const WgmmaShape c = wgmma_shape(i);
    if (p.per_group() && !c.per_group) continue;
    // Nobody wants more columns than there are tokens, nor the narrowest for many.
    if (c.tokens >= 2 * m && c.tokens > 8) continue;
    if (m >= 256 && c.tokens < 64) continue;
    for (const int multicast : {1, 2}) {
      if (c.tokens / kTokenTile % multicast != 0 || (multicast > 1 && desc.n <= c.rows)) continue;
      for (const int splits : {1, 2, 3, 4}) {
        if (multicast * splits > 4 || splits * c.groups_a_stage > groups) continue;
        const GemmPlan plan{GemmPlan::kWgmma, i, splits, multicast};
        add(plan, wgmma_us(p, plan));
      }
    }
  }
  std::sort(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(count_),
            [](const Candidate& a, const Candidate& b) { return a.microseconds < b.microseconds; });
}

void Candidates::add(const GemmPlan& plan, double microseconds) {
  if (count_ < items_.size()) items_[count_++] = {plan, microseconds};
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
