// What a warp of the mma.sync GEMM knows: its part of the tile, where its copies stand, its sums.
#pragma once

#include <type_traits>

#include "cuda/mma/config.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda::mma {

template <int kConfig, bool kGroupScheme, int kWeightBits>
struct Warp {
  static constexpr int kBits = kWeightBits;
  static constexpr Config kC = config_for(kConfig, kBits);
  static constexpr bool kPerGroup = kGroupScheme;
  static constexpr int kSlotBytes = record_and_scale_bytes(kBits, kPerGroup);
  // A warp's records may lie in two tiles of 128 rows.
  static constexpr bool kTwoTiles = !kC.shared_act && kC.blocks > 2;
  static_assert(kC.blocks <= kTileBlocks && (kTwoTiles || kTileBlocks % kC.blocks == 0));
  // fp32 sums of scaled groups, or int32 sums over all of K.
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;

  // A tile of 128 rows: the next group's records, and how many records a group has.
  struct RecordTile {
    const uint8_t* from;
    int blocks;

    __device__ void advance() { from += kC.warps_k * blocks * kSlotBytes; }
  };

  __device__ Warp(const Params& params, uint8_t* shared)
      : p(params),
        lane(threadIdx.x % 32),
        warp_n(threadIdx.x / 32 / kC.warps_k),
        warp_k(threadIdx.x / 32 % kC.warps_k) {
    ring = shared + static_cast<int>(threadIdx.x / 32) * kC.slots * kSlotBytes;
    act_ring = shared + kC.ring_bytes(kPerGroup);
    sums = reinterpret_cast<Sum*>(shared);
  }

  // Where part i of K begins, in steps.
  __device__ int part_begin(int i) const {
    return static_cast<int>(static_cast<int64_t>(p.steps) * i / static_cast<int>(gridDim.y));
  }

  __device__ void start(int begin, int end) {
    const int64_t block = (static_cast<int64_t>(blockIdx.x) * kC.warps_n + warp_n) * p.blocks;
    blocks = static_cast<int>(min(static_cast<int64_t>(p.blocks), max(p.row_blocks - block, int64_t{0})));
    group = begin * kC.warps_k + warp_k;
    act_copy_group = begin * kC.warps_k;
    // The last step may have no group for this warp.
    steps = begin == end || blocks == 0 ? 0 : end - begin - (group + (end - begin - 1) * kC.warps_k >= p.groups);
    copies_left = steps * blocks;
    copy_block = 0;
    policy = p.read_once ? ptx::evict_first_policy() : ptx::evict_normal_policy();
    first_in_tile = static_cast<int>(block % kTileBlocks);
    copy_tile = record_tile_of(block);
    if constexpr (kTwoTiles) next_copy_tile = record_tile_of(min(block + kTileBlocks, p.row_blocks - 1));
    first_tile = static_cast<int64_t>(blockIdx.z) * kC.token_tiles;
    tiles = static_cast<int>(min(static_cast<int64_t>(kC.token_tiles), p.token_tiles - first_tile));
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[b][t][i] = 0;
      }
    }
  }

  __device__ RecordTile record_tile_of(int64_t block) const {
    return {p.records + tile_offset(block, group, p.row_blocks, p.groups, kBits, kPerGroup),
            static_cast<int>(blocks_of_tile(block, p.row_blocks))};
  }

  // Codes and scales of a group and one of the CTA's tiles of 8 tokens.
  __device__ const uint8_t* tile_of(int of_group, int tile) const {
    return p.codes + (of_group * p.token_tiles + first_tile + tile) * kTileGroupBytes;
  }
  __device__ const float* scales_of(int of_group, int tile) const {
    return p.act_scales + (of_group * p.token_tiles + first_tile + tile) * kTokenTile;
  }

  const Params& p;
  int lane, warp_n, warp_k;
  uint8_t* ring;      // this warp's
  uint8_t* act_ring;  // the CTA's
  Sum* sums;          // the CTA's, once the rings are done with
  int blocks;         // of 16 rows, within n
  int steps;          // that have a group for this warp
  int group;          // whose activations come next
  // The next copies.
  RecordTile copy_tile, next_copy_tile;
  int first_in_tile;  // this warp's first record among those of copy_tile
  int copy_block, copies_left, act_copy_group;
  uint64_t policy;     // of the weights in L2
  int64_t first_tile;  // of 8 tokens
  int tiles;           // how many the CTA has
  Sum acc[kC.blocks][kC.token_tiles][4];
};

}  // namespace flexq::cuda::mma
