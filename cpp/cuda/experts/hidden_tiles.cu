// What is between the two GEMMs of many pairs, quantized. A tile of 8 pairs are neighbours, and of one expert: a warp
// writes a tile's group whole. In scheme channel a cluster has a tile.
#include <algorithm>

#include "cuda/experts/hidden.cuh"
#include "cuda/experts/kernels.h"
#include "cuda/experts/table.cuh"
#include "cuda/launch.h"
#include "cuda/quantize/group_part.cuh"
#include "cuda/quantize/token_reduce.cuh"

namespace flexq::cuda::experts {
namespace {

using quantize::Scale;

constexpr int kMaxWarps = 8;  // of a CTA
constexpr int kKept = 16;     // groups that stay in its shared memory
constexpr int kMaxCluster = 8;

template <bool kSilu>
struct HiddenTilesParams : quantize::Params {
  HiddenRows<kSilu> rows;
  ExpertTable table;
};

template <typename T, bool kSilu>
__global__ void __launch_bounds__(32 * kMaxWarps, 3)
    hidden_tiles_kernel(const __grid_constant__ HiddenTilesParams<kSilu> p) {
  using Reduce = quantize::TokenReduce<4>;
  __shared__ Reduce::Table of_warps[2];
  extern __shared__ float4 kept[];  // [groups][a lane's][32]
  const int tile = static_cast<int>(blockIdx.x) / p.cluster, tiles = p.table.tile_tokens / kTokenTile;
  const ExpertTile at = load_tile(p.table, tile / tiles);
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const int first = tile % tiles * kTokenTile;
  if (first >= at.tokens) return;
  const int rank = quantize::join_cluster(p.cluster, of_warps);
  const TileLane part(static_cast<int>(threadIdx.x % 32));
  const int warp = rank * static_cast<int>(blockDim.x / 32) + static_cast<int>(threadIdx.x / 32);
  const int warps = p.cluster * static_cast<int>(blockDim.x / 32);
  const int part_of_warp = static_cast<int>(threadIdx.x % 32), within = part_of_warp / 4;
  const bool valid = first + within < at.tokens;
  const int64_t row = at.row + first + within, place = static_cast<int64_t>(tile) * kTokenTile + within;
  // This lane's largest of a group.
  const auto read = [&](int64_t group, TileValues& v) {
#pragma unroll
    for (float& value : v) value = 0.0f;
    if (valid) p.rows.template load<T>(p, part, row, group, v);
    return part.rotate_and_max(p, v);
  };
  if (p.per_group) {
#pragma unroll 1
    for (int64_t group = warp; group < p.groups; group += warps) {
      TileValues v;
      const int largest = quantize::largest_of_lanes<4>(read(group, v));
      if (valid) store_group(p, part, place, group, v, largest);
    }
    return;
  }
  // Values stay in shared memory until the scale of all is known; groups beyond those that fit are read again.
  const auto slot_of = [&](int64_t group) {
    return group / warps * static_cast<int>(blockDim.x / 32) + static_cast<int>(threadIdx.x / 32);
  };
  const auto kept_of = [&](int64_t group) {
    return kept + slot_of(group) * (32 * TileLane::kValues / 4) + part_of_warp;
  };
  int largest = 0;
#pragma unroll 1
  for (int64_t group = warp; group < p.groups; group += warps) {
    TileValues v;
    largest = max(largest, read(group, v));
    if (slot_of(group) >= kKept) continue;
#pragma unroll
    for (int i = 0; i < TileLane::kValues; i += 4) kept_of(group)[i / 4 * 32] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
  }
  const Scale scale = quantize::scale_of(Reduce(p.cluster, rank).largest(largest, of_warps, 0), p.rotate, p.qmax);
#pragma unroll 1
  for (int64_t group = warp; group < p.groups; group += warps) {
    TileValues v;
    if (slot_of(group) < kKept) {
#pragma unroll
      for (int i = 0; i < TileLane::kValues; i += 4) {
        const float4 four = kept_of(group)[i / 4 * 32];
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
      }
    } else {
      read(group, v);
    }
    if (valid) part.store_codes(p, place, group, v, scale.inverse);
  }
  if (valid && warp == 0 && part.lane == 0) p.scales[place] = scale.scale;
}

template <typename T, bool kSilu>
void launch_for(cudaStream_t stream, const Device& device, const HiddenArgs& args) {
  HiddenTilesParams<kSilu> params{quantize::params_for(args.act, args.quantized), hidden_rows<kSilu>(args.desc, args.u),
                                  args.table};
  params.vectors = hidden_rows_are_vectors(args.desc, args.u, args.dtype);
  const auto kernel = hidden_tiles_kernel<T, kSilu>;
  Launch how{.overlapped = device.has_sm90, .most_shared = true};
  int64_t most = 1;
  while (!params.per_group && device.has_wgmma && most < kMaxCluster && most * kKept < params.groups) most *= 2;
  // A part of a GPU may be too small for the largest clusters.
  for (; most > 0; most /= 2) {
    const int64_t groups = ceil_div(params.groups, most);  // of a CTA
    const int64_t rounds = ceil_div(groups, kMaxWarps), warps = ceil_div(groups, rounds);
    how.cluster = static_cast<unsigned>(most);
    how.grid = dim3(how.cluster);
    how.block = dim3(static_cast<unsigned>(32 * warps));
    if (!params.per_group) {
      how.shared_bytes = static_cast<size_t>(std::min<int64_t>(rounds * warps, kKept)) * 32 * sizeof(TileValues);
    }
    if (most == 1 || clusters_at_once(kernel, how) > 0) break;
  }
  params.cluster = static_cast<int>(how.cluster);
  how.grid = checked_grid("quantize_hidden", params.tiles * params.cluster);
  launch(stream, "quantize_hidden", kernel, how, params);
}

}  // namespace

void quantize_hidden_tiles(cudaStream_t stream, const Device& device, const HiddenArgs& args) {
  quantize::dispatch_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    is_plain_silu(args.desc) ? launch_for<T, true>(stream, device, args) : launch_for<T, false>(stream, device, args);
  });
}

}  // namespace flexq::cuda::experts
