// Host side of the quantizers: instantiations, grid, launch.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/quantize/groups.cuh"
#include "cuda/quantize/pairs.cuh"
#include "cuda/quantize/schedule.h"
#include "cuda/quantize/tokens.cuh"

namespace flexq::cuda {
namespace quantize {
namespace {

template <typename T, ActivationSource::Kind kKind>
void launch_pairs(cudaStream_t stream, const Device& device, const Params& params) {
  Launch how{.overlapped = device.has_sm90};
  how.grid = checked_grid("quantize_activation", ceil_div(params.m, int64_t{kPairTokens}));
  how.block = dim3(static_cast<unsigned>(32 * ceil_div(params.groups, int64_t{kPairWarpGroups})));
  launch(stream, "quantize_activation", quantize_pairs<T, kKind>, how, params);
}

template <typename T, ActivationSource::Kind kKind>
void launch_tokens(cudaStream_t stream, const Device& device, Params params) {
  constexpr int kInputs = inputs_of(kKind);
  if constexpr (sizeof(T) == 2) {
    const bool whole_vectors = params.vectors && params.k % Part<4>::kCount == 0;
    if (whole_vectors && takes_pairs(device, params)) {
      return launch_pairs<T, kKind>(stream, device, params);
    }
  }
  const bool tiles = takes_tiles(device, params, true);
  const int64_t count = tiles ? params.tiles : params.m;
  const int warps = token_warps(device, kKind == ActivationSource::kPlain, tiles, count);
  const int kept = kept_groups(kKind, tiles ? 4 : 32);
  const auto kernel = tiles ? quantize_tokens<T, kKind, 4> : quantize_tokens<T, kKind, 32>;
  Launch how{.overlapped = device.has_sm90};
  int at_once = 0;
  // A part of a GPU may be too small for the largest clusters.
  for (int most = kMaxCluster; at_once == 0; most = static_cast<int>(how.cluster) / 2) {
    const ClusterShape shape = cluster_shape(device, count, params.groups, warps, kept, most);
    how.cluster = static_cast<unsigned>(shape.ctas);
    how.grid = dim3(how.cluster);
    how.block = dim3(static_cast<unsigned>(32 * shape.warps));
    const size_t next_tile = how.block.x * sizeof(T) * Part<4>::kValues * kept * kInputs;
    // Beside the tables of reductions. 99 KB are too few for many floats.
    const bool fits = next_tile + 4 * sizeof(TokenReduce<4>::Table) <= static_cast<size_t>(device.shared_per_cta);
    how.shared_bytes = tiles && params.vectors && fits ? next_tile : 0;
    at_once = clusters_at_once(kernel, how);
  }
  params.cluster = static_cast<int>(how.cluster);
  params.prefetch = how.shared_bytes > 0 && at_once < count;
  if (!params.prefetch) how.shared_bytes = 0;
  how.grid.x *= static_cast<unsigned>(std::min<int64_t>(count, at_once));
  launch(stream, "quantize_activation", kernel, how, params);
}

template <typename T, ActivationSource::Kind kKind>
void launch_groups(cudaStream_t stream, const Device& device, Params params) {
  constexpr int kStages = 2;
  const bool tiles = takes_tiles(device, params, false);
  const int warps = group_warps(device, tiles, params);
  const int64_t across = ceil_div(params.groups, warps);
  int64_t down = std::min(tiles ? params.tiles : params.m, kMaxGridY);
  const auto kernel = tiles ? quantize_groups<T, kKind, 4> : quantize_groups<T, kKind, 32>;
  Launch how{.block = dim3(static_cast<unsigned>(32 * warps)), .overlapped = device.has_sm90};
  if (tiles && params.vectors && device.has_sm90) {
    Launch persistent = how;
    persistent.shared_bytes = how.block.x * sizeof(T) * Part<4>::kValues * inputs_of(kKind) * kStages;
    const int64_t most = clusters_at_once(kernel, persistent) / device.num_sms;
    const Residency resident = residency(device, params.tiles, across, most);
    if (resident.iterations > 1) {
      params.prefetch = true;
      how = persistent;
      down = ceil_div(params.tiles, resident.iterations);
      claim_share(how, resident.ctas_per_sm, most);
    }
  }
  how.grid = checked_grid("quantize_activation", across, down);
  launch(stream, "quantize_activation", kernel, how, params);
}

template <typename T, ActivationSource::Kind kKind>
void launch_for(cudaStream_t stream, const Device& device, const Params& params) {
  if constexpr (kKind != ActivationSource::kRmsNorm) {
    if (params.per_group) return launch_groups<T, kKind>(stream, device, params);
  }
  launch_tokens<T, kKind>(stream, device, params);
}

template <typename T>
void launch_for(cudaStream_t stream, const Device& device, const Params& params) {
  switch (params.source.kind) {
    case ActivationSource::kRmsNorm:
      return launch_for<T, ActivationSource::kRmsNorm>(stream, device, params);
    case ActivationSource::kSiluMul:
      return launch_for<T, ActivationSource::kSiluMul>(stream, device, params);
    default:
      return launch_for<T, ActivationSource::kPlain>(stream, device, params);
  }
}

bool source_is_vectors(const ActivationSource& s) {
  return rows_are_vectors(s.x, s.ldx, s.dtype) && rows_are_vectors(s.other, s.ld_other, s.dtype) &&
         rows_are_vectors(s.weight, 0, s.dtype) && rows_are_vectors(s.sum, s.ld_sum, s.dtype);
}

}  // namespace
}  // namespace quantize

void quantize_activation(cudaStream_t stream, const Device& device, const flexq_activation_desc& desc,
                         const ActivationSource& source, void* quantized) {
  quantize::Params params = quantize::params_for(desc, quantized);
  params.source = source;
  params.vectors = quantize::source_is_vectors(source);
  quantize::dispatch_type(source.dtype,
                          [&](auto type) { quantize::launch_for<decltype(type)>(stream, device, params); });
}

}  // namespace flexq::cuda
