// cp.async copies that run ahead of the mainloop: a warp's weight records, and the CTA's activations if they are
// shared.
#pragma once

#include "cuda/mma/warp.cuh"
#include "cuda/records.cuh"

namespace flexq::cuda::mma {

// The warp's next record, block by block of a group, then group by group, into a slot of its ring.
template <typename W>
__device__ void copy_record(W& w, int slot) {
  if (w.copies_left == 0) return;
  --w.copies_left;
  typename W::RecordTile tile = w.copy_tile;
  int record = w.first_in_tile + w.copy_block;
  if (W::kTwoTiles && record >= kTileBlocks) {
    tile = w.next_copy_tile;
    record -= kTileBlocks;
  }
  using Copied = Record<W::kBits>;
  const uint8_t* from = tile.from + record * Copied::kBytes;
  const uint32_t to = ptx::shared_address(w.ring + slot * W::kSlotBytes);
  Copied::for_each_copy(w.lane, [&](int at) { ptx::cp_async_16(to + at, from + at, w.policy); });
  if (W::kPerGroup && w.lane < 2) {
    ptx::cp_async_16(to + Copied::kBytes + w.lane * 16,
                     tile.from + tile.blocks * Copied::kBytes + record * kRecordScaleBytes + w.lane * 16, w.policy);
  }
  if (++w.copy_block < w.blocks) return;
  w.copy_block = 0;
  w.copy_tile.advance();
  if constexpr (W::kTwoTiles) w.next_copy_tile.advance();
}

// All threads of the CTA: codes and scales of a step's groups, [warps_k][token tiles].
template <typename W>
__device__ void copy_activations(W& w, int stage) {
  constexpr int kTileVectors = kTileGroupBytes / 16;
  constexpr int kVectors = W::kC.warps_k * W::kC.token_tiles * kTileVectors;
  const uint32_t to = ptx::shared_address(w.act_ring + stage * W::kC.act_step_bytes(W::kPerGroup));
#pragma unroll
  for (int i = 0; i < (kVectors + W::kC.threads() - 1) / W::kC.threads(); ++i) {
    const int vector = i * W::kC.threads() + static_cast<int>(threadIdx.x);
    const int tile = vector / kTileVectors % W::kC.token_tiles;
    const int group = w.act_copy_group + vector / (kTileVectors * W::kC.token_tiles);
    if (vector < kVectors && group < w.p.groups && tile < w.tiles) {
      ptx::cp_async_16(to + vector * 16, w.tile_of(group, tile) + vector % kTileVectors * 16);
    }
  }
  if constexpr (W::kPerGroup) {
    constexpr int kScaleVectors = W::kC.warps_k * W::kC.token_tiles * 2;
    static_assert(kScaleVectors <= W::kC.threads(), "one vector of scales a thread");
    const int vector = static_cast<int>(threadIdx.x);
    const int tile = vector / 2 % W::kC.token_tiles;
    const int group = w.act_copy_group + vector / (2 * W::kC.token_tiles);
    if (vector < kScaleVectors && group < w.p.groups && tile < w.tiles) {
      ptx::cp_async_16(to + (kVectors + vector) * 16, w.scales_of(group, tile) + vector % 2 * 4);
    }
  }
  w.act_copy_group += W::kC.warps_k;
}

}  // namespace flexq::cuda::mma
