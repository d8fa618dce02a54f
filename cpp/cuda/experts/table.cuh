// The linear layer that a tile of pairs is for.
#pragma once

#include "cuda/experts/params.h"

namespace flexq::cuda::experts {

// The expert that is here, or -1.
__device__ inline int expert_of(const Ids& p, int64_t pair) {
  const int64_t id = p.wide ? static_cast<const int64_t*>(p.ids)[pair] : static_cast<const int32_t*>(p.ids)[pair];
  if (id < 0 || id >= p.known) return -1;
  const int64_t expert = p.map == nullptr ? id : p.map[id];
  return expert >= 0 && expert < p.experts ? static_cast<int>(expert) : -1;
}

// These were written two kernels before a GEMM, which the one right before it has waited for: a GEMM may read them, and
// with them weights, before that one has finished. Past L1, which may hold those of another routing.
__device__ inline int load_num_tiles(const ExpertTable& table) { return __ldcg(table.num_tiles); }

__device__ inline ExpertTile load_tile(const ExpertTable& table, int tile) {
  const int4 words = __ldcg(reinterpret_cast<const int4*>(table.tiles) + tile);
  return {words.x, words.y, words.z, words.w};
}

// From the layer of expert 0, whose rows of y are all pairs', to that of a tile: tokens count from that of tile 0.
__device__ inline void move_to_tile(LinearParams& linear, const ExpertTable& table, int tile, const ExpertTile& at) {
  const int64_t weights = at.expert * table.weight_stride;
  linear.records += weights;
  linear.scales = reinterpret_cast<const uint16_t*>(reinterpret_cast<const uint8_t*>(linear.scales) + weights);
  if (linear.bias != nullptr) linear.bias = static_cast<const uint8_t*>(linear.bias) + at.expert * table.bias_stride;
  const int64_t first = static_cast<int64_t>(tile) * table.tile_tokens;
  linear.m = first + at.tokens;
  linear.y = static_cast<uint8_t*>(linear.y) + (at.row - first) * linear.ldy * (linear.y_dtype == FLEXQ_F32 ? 4 : 2);
}

}  // namespace flexq::cuda::experts
