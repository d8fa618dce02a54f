// The producer warpgroup: one thread copies weights, one activations, by bulk copies that report to a stage's full
// barrier. Issuing a copy takes some 60 clocks, so a stage's weights are one copy and a group's activations another.
#pragma once

#include "cuda/wgmma/cta.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

template <typename Cta>
struct Producer {
  const Cta& cta;

  __device__ void run() const {
    const int role = cta.warp - 4 * kConsumers;
    if (role == 0) return copy_weights();
    if (role > 1) return;
    // Weights do not depend on the kernel before this one; activations do.
    ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    copy_activations();
  }

 private:
  // copy(linear, tile, its tiles of 8 tokens, step, stage) for every step of the CTA's work, as stages become empty.
  template <typename Copy>
  __device__ __forceinline__ void for_each_stage(const Copy& copy) const {
    auto state = producer_start<Cta::kStages>();
    cta.for_each_work([&](const Work& work, const typename Cta::TokenTile& tokens) {
      const Tile tile = cta.tile_at(work.tile);
      const auto& linear = cta.linear(tokens, tile);
      const int token_tiles = cta.token_tiles(tokens, tile);
      for (int step = work.begin; step < work.end; ++step) {
        cta.barriers().wait_empty(state);
        copy(linear, tile, token_tiles, step, state.stage);
        state.advance();
      }
    });
  }

  // Also announces all bytes of the stage, those of the activations and of the peers' copies included.
  __device__ void copy_weights() const {
    const Params& p = cta.p;
    const uint64_t policy = p.read_once ? ptx::evict_first_policy() : ptx::evict_normal_policy();
    const int64_t begin = clock64();
    int filled = 0;
    for_each_stage([&](const LinearParams& linear, const Tile& tile, int token_tiles, int step, int stage) {
      // The first stages are filled at the pace of memory: the quantizer, which still runs, waits behind each load.
      for (; filled < Cta::kStages && clock64() - begin < static_cast<int64_t>(filled) * p.clocks_per_stage;) {
      }
      filled = min(filled + 1, Cta::kStages);
      const int groups = cta.groups_of(step);
      const int blocks = max(0, min(kTileBlocks, p.row_blocks - tile.row_block));  // 0 past the last row
      const int act = token_tiles * (kTileGroupBytes + (Cta::kPerGroup ? kTokenTile * 4 : 0));
      const int bytes = groups * blocks * Cta::kRecord;
      const uint32_t full = cta.barriers().full(stage);
      ptx::mbarrier_arrive_expect(full, static_cast<uint32_t>(bytes + groups * act));
      if (blocks == 0) return;
      ptx::bulk_copy(cta.weights(stage),
                     linear.records + tile_offset(tile.row_block, step * Cta::kStageGroups, p.row_blocks, p.groups,
                                                  Cta::kBits, Cta::kPerGroup),
                     static_cast<uint32_t>(bytes), full, policy);
    });
  }

  // This CTA's share of each group's activations, to all its peers.
  __device__ void copy_activations() const {
    const Params& p = cta.p;
    const int first = cta.peer * cta.share;
    const auto peers = static_cast<uint16_t>(((1 << p.multicast) - 1) << (cta.part * p.multicast));
    const auto copy = [&](uint32_t to, const void* from, int bytes, int stage) {
      if (p.multicast == 1) {
        ptx::bulk_copy(to, from, static_cast<uint32_t>(bytes), cta.barriers().full(stage));
      } else {
        ptx::bulk_copy_multicast(to, from, static_cast<uint32_t>(bytes), cta.barriers().full(stage), peers);
      }
    };
    for_each_stage([&](const LinearParams&, const Tile& tile, int token_tiles, int step, int stage) {
      const int tiles = min(cta.share, token_tiles - first);
      if (tiles <= 0) return;
#pragma unroll
      for (int g = 0; g < Cta::kStageGroups; ++g) {
        if (g > 0 && g >= cta.groups_of(step)) break;
        const int64_t from =
            (step * Cta::kStageGroups + g) * static_cast<int64_t>(p.token_tiles) + tile.token_tile + first;
        const int to = g * (Cta::kTokens / kTokenTile) + first;
        copy(cta.acts(stage) + to * kTileGroupBytes, p.codes + from * kTileGroupBytes, tiles * kTileGroupBytes, stage);
        if constexpr (Cta::kPerGroup) {
          copy(cta.scales(stage) + to * kTokenTile * 4, p.act_scales + from * kTokenTile, tiles * kTokenTile * 4,
               stage);
        }
      }
    });
  }
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
