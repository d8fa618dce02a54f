// The model of cost that chooses a kernel, in one place. `flexq bench linear --explain` measures the candidates on a
// GPU and says where the model is wrong.
//
// A GEMM takes as long as the slower of reading the weights from memory and a multiprocessor's own work on its tiles,
// wave by wave. The constants are fitted to measurements on an H100 (docs/kernels.md); they are clocks where the work is
// a multiprocessor's, and scale with the device's bandwidth, clock and number of multiprocessors.
#include "cuda/dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

constexpr double kMmaLaunchUs = 3.0, kWgmmaLaunchUs = 5.0;
// Bytes that tiles bring in from L2 compete with the weights from memory: so much of the time to read them from there.
constexpr double kL2Share = 0.24;

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
  // Of a group: 4 clocks a token are the tensor cores', the rest is not hidden behind them.
  double group_clocks = p.per_group() ? 250 + 5 * tokens : 130 + 4 * tokens;
  // Multicast relieves L2 where tiles are large and many, and holds peers up elsewhere.
  const bool relief = c.tokens == 256 && waves > 1;
  if (relief != (plan.multicast > 1)) group_clocks *= 1.05;
  const double output_clocks = 600 + 17 * tokens;
  const double parts_clocks = plan.splits > 1 ? 600 + 44 * tokens : 0;
  const double sm_us = p.clocks_us(waves * (work * group_clocks + output_clocks) + parts_clocks);
  const double bytes = kRecordBytes * c.rows / kRecordRows + tokens * kGroup / plan.multicast;
  const double l2_us = kL2Share * p.memory_us(static_cast<double>(blocks) * work * bytes);
  return kWgmmaLaunchUs + std::max({sm_us, l2_us, p.memory_us(p.weight_bytes)}) +
         p.memory_us(static_cast<double>(p.m * p.desc.n) * 2) / 4 + (plan.splits > 1 ? 1.0 : 0.0);
}

double mma_us(const Problem& p, const GemmPlan& plan) {
  const MmaShape c = mma_shape(plan.config);
  const int64_t tiles = ceil_div(p.desc.n, c.rows) * ceil_div(p.m, c.tokens);
  const double waves = static_cast<double>(tiles * plan.splits) / (static_cast<double>(p.device.num_sms) * c.ctas_per_sm);
  const double idle = waves <= 1 ? 1.0 : std::ceil(waves) / waves;  // of the last wave
  const double work = static_cast<double>(tiles * p.groups);
  const double rows = c.rows, tokens = c.tokens;
  // A tile's group: products at what mma.sync reaches beside unpacking; for bits, its MMAs and transposes.
  double clocks = 2 * rows * std::max(tokens, 16.0) * kGroup / (p.per_group() ? 1700 : 2050);
  if (c.act_bits != 0) clocks = rows / kRecordRows * (110 + 2.0 * kPlanes * c.act_bits);
  const double sm_us = p.clocks_us(work * clocks / p.device.num_sms) * idle;
  // Activations that each warp loads for itself weigh less than those that the block waits for together.
  const double act_bytes = tokens * kGroup * (p.per_group() ? 1.0 : 0.5);
  const double bytes = work * (kRecordBytes * rows / kRecordRows + act_bytes) - p.weight_bytes;
  const double memory_us = p.memory_us(p.weight_bytes) * (1 + 0.3 * (idle - 1)) + 0.07 * p.memory_us(bytes);
  const double ramp_us = 0.02 * rows + (tiles * plan.splits < p.device.num_sms ? 0.5 : 0.0);
  return kMmaLaunchUs + std::max(sm_us, memory_us) + ramp_us + (plan.splits > 1 ? 2.0 : 0.0);
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
