// The B operand: activations in registers, from global or from shared memory.
#pragma once

#include "cuda/mma/warp.cuh"

namespace flexq::cuda::mma {

// B fragments of a group: word c of a token tile has this lane's four codes of chunk c.
template <typename W>
struct Activations {
  uint32_t codes[W::kC.token_tiles][8];
  float2 scales[W::kC.token_tiles];
};

// From global memory, through L1. Tokens past the last one keep their zeros: their codes were never written.
template <typename W>
__device__ void load_activations(const W& w, Activations<W>& act) {
#pragma unroll
  for (int t = 0; t < W::kC.token_tiles; ++t) {
    if ((w.first_tile + t) * kTokenTile + w.lane / 4 < w.p.m) {
      const uint8_t* tile = w.tile_of(w.group, t) + w.lane % 4 * 4;
#pragma unroll
      for (int c = 0; c < 8; ++c)
        act.codes[t][c] = *reinterpret_cast<const uint32_t*>(tile + chunk_offset(w.lane / 4, c));
    }
    if (W::kPerGroup && t < w.tiles)
      act.scales[t] = reinterpret_cast<const float2*>(w.scales_of(w.group, t))[w.lane % 4];
  }
}

// From shared memory, this warp's group of a step.
template <typename W>
__device__ void read_activations(const W& w, int stage, Activations<W>& act) {
  const uint8_t* step = w.act_ring + stage * W::kC.act_step_bytes(W::kPerGroup);
  const uint8_t* tiles = step + w.warp_k * W::kC.token_tiles * kTileGroupBytes;
  const auto* scales = reinterpret_cast<const float*>(step + W::kC.warps_k * W::kC.token_tiles * kTileGroupBytes) +
                       w.warp_k * W::kC.token_tiles * kTokenTile;
#pragma unroll
  for (int t = 0; t < W::kC.token_tiles; ++t) {
    const uint32_t tile = ptx::shared_address(tiles + t * kTileGroupBytes);
    ptx::ldmatrix_x4(&act.codes[t][0], tile + chunk_offset(w.lane % 8, w.lane / 8));
    ptx::ldmatrix_x4(&act.codes[t][4], tile + chunk_offset(w.lane % 8, w.lane / 8 + 4));
    if (W::kPerGroup) act.scales[t] = reinterpret_cast<const float2*>(scales + t * kTokenTile)[w.lane % 4];
  }
}

}  // namespace flexq::cuda::mma
