// What every thread of a wgmma CTA knows: its role, the shared memory map, and the CTA's work.
#pragma once

#include <type_traits>

#include "cuda/pipeline.cuh"
#include "cuda/ptx.cuh"
#include "cuda/wgmma/config.h"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

// Hardware barriers of the CTA: one for each consumer warpgroup from kWarpgroupBarrier on, one for all consumers.
constexpr int kWarpgroupBarrier = 1, kConsumerBarrier = kWarpgroupBarrier + kConsumers;

struct Tile {
  int row_block;   // the CTA's first
  int blocks;      // how many there are, at least 1
  int token_tile;  // first, of 8 tokens
};

template <int kConfig, bool kGroupScheme, int kWeightBits, typename P = Params>
struct Cta {
  static constexpr int kBits = kWeightBits;
  static constexpr Config kC = config_for(kConfig, kBits);
  static constexpr bool kPerGroup = kGroupScheme;
  static constexpr bool kPartTiles = P::kPartTiles;
  static constexpr int kTokens = kC.tokens;
  static constexpr int kStages = kC.stages;
  static constexpr int kStageGroups = kC.stage_groups;
  static constexpr int kLaunchRegisters = kC.launch_registers();
  static constexpr int kProducerRegisters = kTokens < 128 ? 56 : 40;
  static constexpr int kConsumerRegisters =
      kLaunchRegisters + (kLaunchRegisters - kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kSums = kTokens / 2;  // a consumer thread's
  static constexpr int kRecord = record_and_scale_bytes(kBits, kPerGroup);
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;
  using State = PipelineState<kStages>;

  // Shared memory: stages of weights and activations, the activations' scales, staged outputs, barriers.
  static constexpr int kScalesAt = kStages * kC.stage_bytes();
  static constexpr int kStagingAt = kScalesAt + kStages * kC.scale_bytes();
  static constexpr int kBarriersAt = kStagingAt + kC.staging_bytes();

  __device__ Cta(const P& params, uint8_t* shared_memory)
      : p(params),
        shared(shared_memory),
        base(ptx::shared_address(shared_memory)),
        warp(__shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0)),  // tells the compiler it is uniform in a warp
        lane(threadIdx.x % 32),
        block(warp % kTileBlocks) {
    const uint32_t rank = ptx::cluster_rank();
    peer = static_cast<int>(rank) % p.multicast;
    part = static_cast<int>(rank) / p.multicast;
    share = kTokens / kTokenTile / p.multicast;
    steps = (p.groups + kStageGroups - 1) / kStageGroups;
    const int released = part * p.multicast + (lane < p.multicast ? lane : 0);
    peer_empty = ptx::remote_address(barriers().empty(0), static_cast<uint32_t>(released));
    first_tile = static_cast<int>(blockIdx.x) / (p.multicast * p.splits);
    tile_stride = static_cast<int>(gridDim.x) / (p.multicast * p.splits);
  }

  __device__ uint32_t weights(int stage) const { return base + stage * kC.stage_bytes(); }
  __device__ uint32_t acts(int stage) const { return weights(stage) + kC.weight_bytes(); }
  __device__ uint32_t scales(int stage) const { return base + kScalesAt + stage * kC.scale_bytes(); }
  __device__ PipelineBarriers<kStages> barriers() const { return {base + kBarriersAt}; }

  __device__ Tile tile_at(int index) const {
    const TileCoordinates at = tile_coordinates(p, index);
    const int row_block = (at.row_tile * p.multicast + peer) * kTileBlocks;
    return {row_block, max(1, min(kTileBlocks, p.row_blocks - row_block)), at.token_tile * (kTokens / kTokenTile)};
  }
  // What the tile's tokens are is memory's to say where there are several layers: so ask for it ahead.
  using TokenTile = typename P::TokenTile;
  __device__ TokenTile look_up(int index) const {
    return index < p.whole_tiles ? p.template look_up<kTokens>(tile_at(index).token_tile) : TokenTile{};
  }
  __device__ decltype(auto) linear(const TokenTile& tokens, const Tile& tile) const {
    return p.template linear_of<kTokens>(tokens, tile.token_tile);
  }
  // Of 8 tokens, with anybody's token in them.
  __device__ int token_tiles(const TokenTile& tokens, const Tile& tile) const {
    return min(kTokens / kTokenTile, p.token_tiles_from(tokens, tile.token_tile));
  }
  __device__ int groups_of(int step) const { return min(kStageGroups, p.groups - step * kStageGroups); }

  // use(work, token tile): whole tiles, or this part's share of them, then this CTA's range of the stream-K steps, its
  // last tile first (stream_k.cuh).
  template <typename Use>
  __device__ __forceinline__ void for_each_work(const Use& use) const {
    const int begin = steps * part / p.splits, end = steps * (part + 1) / p.splits;
    int left = stream_k_begin(p, static_cast<int>(blockIdx.x) + 1);  // the range's end, as it shrinks
    TokenTile next = look_up(first_tile);
    for (int tile = first_tile;;) {
      Work work{tile, begin, end};
      const TokenTile tokens = next;
      if (tile < p.whole_tiles) {
        tile += tile_stride;
        next = look_up(tile);
      } else if (!kC.stream_k) {
        return;
      } else {
        const int first = stream_k_begin(p, static_cast<int>(blockIdx.x));
        if (left <= first) return;
        const int index = (left - 1) / steps;
        work.tile = p.whole_tiles + index;
        work.begin = max(first - index * steps, 0);
        work.end = left - index * steps;
        left -= work.steps();
      }
      use(work, tokens);
    }
  }

  const P& p;
  uint8_t* shared;
  uint32_t base;  // shared memory address of `shared`
  int warp, lane;
  int block;            // of a consumer warp: its 16 rows in the tile
  int peer;             // rank among the CTAs that share activations
  int share;            // tiles of 8 tokens that it copies for all of them
  int part;             // of K
  uint32_t peer_empty;  // of a lane: the first stage's empty barrier at the peer that it releases stages to
  int steps;            // of a tile
  int first_tile, tile_stride;
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
