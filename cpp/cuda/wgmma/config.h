// The tile shapes of the wgmma GEMM, and what a launch passes to its kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "cuda/layout.h"
#include "cuda/params.h"
#include "cuda/tiles.cuh"

namespace flexq::cuda::wgmma {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // consumer warpgroups, one above the other along a tile's rows
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kRows = 64 * kConsumers;  // of a tile
static_assert(kRows == kTileBlocks * kRecordRows, "one bulk copy brings a stage's weights");
constexpr int kMaxChunkTokens = 32;  // that the epilogue stores at a time
constexpr int kSharedLimit = 227 * 1024;

struct Config {
  int tokens;             // of a tile
  int mma_n;              // tokens of one wgmma instruction
  int stage_groups;       // groups of 128 k in a stage
  int stages;             // of the pipeline
  bool group, channel;    // schemes of scales that it is instantiated for
  bool stream_k = false;  // tiles that fill no whole wave are shared along K
  int weight_bits = 6;

  // All threads start with the same number of registers, of 65,536 in steps of 8; consumers then take what the producer
  // gives back. Few tokens leave room for the next layer's quantizer, which starts while this kernel runs.
  constexpr int launch_registers() const { return 65536 / (kThreads + (tokens <= 32 ? 128 : 0)) / 8 * 8; }
  constexpr size_t sums_bytes() const { return static_cast<size_t>(kRows * tokens) * 4; }  // of a tile
  constexpr int chunk_tokens() const { return std::min(tokens, kMaxChunkTokens); }
  constexpr int weight_bytes() const { return kTileBlocks * stage_groups * record_and_scale_bytes(weight_bits, true); }
  constexpr int act_bytes() const { return stage_groups * tokens * kGroup; }
  constexpr int scale_bytes() const { return stage_groups * tokens * 4; }  // of the activations
  constexpr int stage_bytes() const { return weight_bytes() + act_bytes(); }
  constexpr int staging_bytes() const { return kTileBlocks * chunk_tokens() * kRecordRows * 4; }  // of outputs
  constexpr int shared_bytes() const { return stages * (stage_bytes() + scale_bytes() + 2 * 8) + staging_bytes(); }
};

// dispatch.cpp chooses among these by their costs; the index is GemmPlan::config.
constexpr Config kConfigs[] = {
    {.tokens = 16, .mma_n = 16, .stage_groups = 2, .stages = 7, .group = true, .channel = true},
    {.tokens = 32, .mma_n = 32, .stage_groups = 2, .stages = 6, .group = true, .channel = true},
    {.tokens = 64, .mma_n = 64, .stage_groups = 2, .stages = 5, .group = true, .channel = true},
    {.tokens = 128, .mma_n = 64, .stage_groups = 2, .stages = 3, .group = true, .channel = false},
    {.tokens = 128, .mma_n = 64, .stage_groups = 2, .stages = 3, .group = true, .channel = false, .stream_k = true},
    {.tokens = 128, .mma_n = 128, .stage_groups = 1, .stages = 7, .group = false, .channel = true},
    {.tokens = 256, .mma_n = 256, .stage_groups = 1, .stages = 4, .group = false, .channel = true},
};

// Of weights of so many bits: as many stages as there is room for.
constexpr Config config_for(int index, int weight_bits) {
  Config c = kConfigs[index];
  c.weight_bits = weight_bits;
  while (c.shared_bytes() > kSharedLimit) --c.stages;
  return c;
}

struct Params : LinearParams {
  int row_blocks;   // of 16 rows
  int groups;       // of 128 k
  int token_tiles;  // of 8
  int row_tiles;    // of kRows * multicast
  int tiles;        // row_tiles times those along tokens
  int raster_width;
  int multicast;         // CTAs of a cluster that share activations
  int splits;            // parts of K, each with CTAs of its own in the cluster
  int clocks_per_stage;  // to read a stage's weights from memory
  int whole_tiles;       // computed by one CTA or cluster each; the others are stream-K's
  int steps_per_cta, longer_ctas;
  float* partials;  // of each CTA: [sums of a thread][consumer threads]
  uint64_t* ready;  // of each CTA: `token` while its partials are there
  uint64_t token;

  // What is looked up for a tile of tokens, and the layer that the tile is for. There is one layer here; a mixture of
  // experts has several (experts/gemm_wgmma.cuh).
  struct TokenTile {};
  static constexpr bool kPartTiles = false;  // tiles with few tokens are so frequent that it pays to compute only those
  template <int kTokens>
  __device__ TokenTile look_up(int) const {
    return {};
  }
  template <int kTokens>
  __device__ const Params& linear_of(const TokenTile&, int) const {
    return *this;
  }
  // Tiles of 8 tokens that there are from this one on.
  __device__ int token_tiles_from(const TokenTile&, int token_tile) const { return token_tiles - token_tile; }
};

// kernel_table.h
struct Family {
  using Function = void (*)(Params);
  static constexpr size_t kCount = std::size(kConfigs);
  template <int kConfig, bool kPerGroup, int kBits>
  static Function kernel();
};

}  // namespace flexq::cuda::wgmma
