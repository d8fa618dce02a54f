// How much of a GPU a quantizer takes: warps, clusters, resident CTAs. As measured on an H100.
#pragma once

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "cuda/quantize/params.h"

namespace flexq::cuda::quantize {

// Up to so many tokens a warp has a group of one token; of more, a group of 8 tokens. A norm takes single ones while an
// SM has few values: all of a tile must be reduced before any of it is written.
inline bool takes_tiles(const Device& device, const Params& p, bool of_tokens) {
  if (p.source.kind == ActivationSource::kRmsNorm) {
    const int64_t single_values = device.has_wgmma ? 16384 : 32768;  // for each SM
    return p.m * p.k > single_values * device.num_sms;
  }
  return p.m > max_single_tokens(of_tokens);
}

// Where the whole token decides and rows are whole vectors of 16-bit values: two tokens a CTA rather than a tile of 8,
// or one, by clusters. From so many values on it takes less time, but where rows are so short that their CTAs have
// little to do besides starting: a norm reads them twice. Longer rows leave an SM room for one such CTA, where nothing
// hides what its threads wait for: many of them are for clusters, unless something is fused in.
inline bool takes_pairs(const Device& device, const Params& p) {
  constexpr int64_t kLeastValues = 12288, kMostOfPlain = 65536;  // for each SM
  constexpr int64_t kLeastGroups = 5;                            // but of norms
  const int64_t values = p.m * p.k;
  const bool alone = p.groups > kMaxPairGroups / 2, plain = p.source.kind == ActivationSource::kPlain;
  return (p.groups >= kLeastGroups || p.source.kind == ActivationSource::kRmsNorm) && p.groups <= kMaxPairGroups &&
         values > kLeastValues * device.num_sms && (!alone || !plain || values <= kMostOfPlain * device.num_sms);
}

struct ClusterShape {
  int ctas, warps;
};

// Of a cluster that shares the groups of a tile of tokens or of one token: at most `most` CTAs of at most `warps`
// warps. Large enough to keep its groups in registers, `kept` a warp, and larger where tiles are few.
inline ClusterShape cluster_shape(const Device& device, int64_t tiles, int64_t groups, int warps, int kept, int most) {
  int ctas = 1;
  if (device.has_wgmma) {
    while (ctas < most && groups > ctas * warps * kept) ctas *= 2;
    while (2 * ctas <= std::min(most, 8) && groups > ctas * warps && tiles * ctas * 2 <= device.num_sms) ctas *= 2;
  }
  const int64_t rounds = ceil_div(groups, ctas * warps);
  return {ctas, static_cast<int>(ceil_div(groups, ctas * rounds))};
}

// Small CTAs start sooner where there is little to do; many tiles are done sooner by few large CTAs.
inline int token_warps(const Device& device, bool plain, bool tiles, int64_t count) {
  const bool small = device.has_wgmma && (tiles ? count <= device.num_sms : plain && 2 * count < device.num_sms);
  return small ? 8 : kMaxTokenThreads / 32;
}

// While tiles are few, small CTAs reach more SMs.
inline int group_warps(const Device& device, bool tiles, const Params& p) {
  return tiles && p.tiles * p.groups < 8 * device.num_sms ? 2 : kWarps;
}

struct Residency {
  int64_t ctas_per_sm, iterations;  // of the CTA with the most tiles
};

// Persistent CTAs, `across` of which take a tile's groups: the number on an SM that gives the fullest SM the least to
// do, and of those the largest.
inline Residency residency(const Device& device, int64_t tiles, int64_t across, int64_t most) {
  Residency best{0, 0};
  for (int64_t ctas = 1; ctas <= most; ++ctas) {
    const int64_t iterations = ceil_div(tiles, std::max<int64_t>(1, ctas * device.num_sms / across));
    if (best.ctas_per_sm == 0 || ctas * iterations <= best.ctas_per_sm * best.iterations) best = {ctas, iterations};
  }
  return best;
}

}  // namespace flexq::cuda::quantize
