// y = x * w^T by a warp group's tensor core instructions (wgmma, sm_90a) on int8 codes: 16 tokens to many thousands.
//
// A thread block has tiles of 128 rows and up to 256 tokens. Producer warps fill a ring of stages with weight records
// and activation tiles just as they lie in memory, by bulk copies that report their bytes to the stage's barrier. One
// copy is a stage's weights and one a group's activations: issuing a copy takes a warp some 60 clocks, and the stages
// must come faster than the tensor cores use them up.
// A consumer warp group has 64 rows: a warp reads its own records, turns them into A fragments in registers (nine
// instructions for 16 codes), and the activations are the B operand straight from shared memory, core matrices without
// swizzle. It unpacks while the tensor cores work on what it unpacked before; in scheme group, whose sums of every
// group of 128 are scaled, it scales one product's while they have the next one.
//
// A cluster is `multicast` thread blocks side by side along N, which each copy a share of the activations to all of
// them, times the parts of K, whose sums meet through distributed shared memory in a fixed order. Thread blocks without
// a part of K to share stay and take tile after tile; or they share evenly, step of K by step, what does not fill whole
// waves (stream-K, arXiv 2301.03598): the sums of a tile's later parts go through the workspace to the thread block
// that has its first one.
//
// Weights do not depend on the kernel before this one: the ring is full of them before the activations are there.
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <iterator>
#include <random>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda {
namespace {

constexpr int kWarpGroup = 128;
constexpr int kConsumers = 2;  // warp groups along a tile's rows
constexpr int kThreads = (kConsumers + 1) * kWarpGroup;
constexpr int kRows = 64 * kConsumers;
static_assert(kRows == kTileBlocks * kRecordRows, "a tile's records are one copy");
constexpr int kMaxChunkTokens = 32;  // that the epilogue stores at a time
constexpr int kSharedLimit = 227 * 1024;

struct Config {
  int tokens;          // of a tile
  int turns;           // in which scheme group multiplies them: a turn's are wgmma's n
  int groups_a_stage;  // of 128 k
  int stages;
  bool group, channel;    // the schemes of scales that it is for
  bool streamed = false;  // tiles that fill no whole wave are

  // At launch all threads have the same number of registers, of 65,536 in steps of 8; the consumers then take what the
  // producer gives back. Where tokens are few a part is left for the quantizer of the layer after: it starts while this
  // kernel is at work, and where it had to wait, so would the GEMM behind it.
  constexpr int launch_registers() const { return 65536 / (kThreads + (tokens <= 32 ? 128 : 0)) / 8 * 8; }
  constexpr size_t sums_bytes() const { return static_cast<size_t>(kRows * tokens) * 4; }  // of a tile
  constexpr int chunk_tokens() const { return std::min(tokens, kMaxChunkTokens); }
  constexpr int weight_bytes() const { return kTileBlocks * groups_a_stage * record_and_scale_bytes(true); }
  constexpr int act_bytes() const { return groups_a_stage * tokens * kGroup; }
  constexpr int scale_bytes() const { return groups_a_stage * tokens * 4; }  // of the activations
  constexpr int stage_bytes() const { return weight_bytes() + act_bytes(); }
  constexpr int staging_bytes() const { return kTileBlocks * chunk_tokens() * kRecordRows * 4; }
  constexpr int shared_bytes() const { return stages * (stage_bytes() + scale_bytes() + 2 * 8) + staging_bytes(); }
};

// Of these, dispatch.cpp picks.
constexpr Config kConfigs[] = {
    {.tokens = 16, .turns = 1, .groups_a_stage = 2, .stages = 7, .group = true, .channel = true},
    {.tokens = 32, .turns = 1, .groups_a_stage = 2, .stages = 6, .group = true, .channel = true},
    {.tokens = 64, .turns = 1, .groups_a_stage = 2, .stages = 5, .group = true, .channel = true},
    {.tokens = 128, .turns = 2, .groups_a_stage = 2, .stages = 3, .group = true, .channel = false},
    {.tokens = 128, .turns = 2, .groups_a_stage = 2, .stages = 3, .group = true, .channel = false, .streamed = true},
    {.tokens = 128, .turns = 1, .groups_a_stage = 1, .stages = 7, .group = false, .channel = true},
    {.tokens = 256, .turns = 1, .groups_a_stage = 1, .stages = 4, .group = false, .channel = true},
};

struct Params {
  const uint8_t* records;
  const uint16_t* scales;  // scheme channel's, fp16
  const uint8_t* codes;
  const float* act_scales;
  const void* bias;
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  bool vectors;  // rows of y are aligned for 16 bytes at a time
  int64_t n;
  int64_t m;
  int row_blocks;
  int groups;
  int token_tiles;    // of 8
  int row_tiles;      // of kRows * multicast
  int tiles;          // times those along tokens
  int tokens_a_turn;  // tiles along tokens that are taken before the next rows
  int multicast;
  int splits;
  int clocks_a_stage;                  // to read its weights from memory
  int whole_tiles;                     // that one thread block or cluster has; the rest are streamed
  int streamed_steps, longer_streams;  // of each thread block, and how many have one more
  float* partials;                     // a thread block's, [sums of a thread][consumer threads]
  uint64_t* ready;                     // is `token` while a thread block's partial sums are there
  uint64_t token;
};

#if FLEXQ_SM90A

template <int kConfig, bool kPerGroup>
class Kernel {
 public:
  static constexpr Config kC = kConfigs[kConfig];
  static constexpr int kTokens = kC.tokens;
  static constexpr int kLaunchRegisters = kC.launch_registers();
  static constexpr int kProducerRegisters = kTokens < 128 ? 56 : 40;
  static constexpr int kConsumerRegisters =
      kLaunchRegisters + (kLaunchRegisters - kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kSums = kTokens / 2;  // a thread's
  static constexpr int kGroupsAStage = kC.groups_a_stage;
  static constexpr int kRecord = record_and_scale_bytes(kPerGroup);
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;

  __device__ Kernel(const Params& params, uint8_t* shared)
      : p_(params),
        shared_(shared),
        base_(ptx::shared_address(shared)),
        warp_(__shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0)),  // for the compiler: the same in all lanes
        lane_(threadIdx.x % 32),
        block_(warp_ % kTileBlocks) {
    const uint32_t rank = ptx::cluster_rank();
    peer_ = static_cast<int>(rank) % p_.multicast;
    part_ = static_cast<int>(rank) / p_.multicast;
    share_ = kTokens / kTokenTile / p_.multicast;
    steps_ = (p_.groups + kGroupsAStage - 1) / kGroupsAStage;
    const int told = part_ * p_.multicast + (lane_ < p_.multicast ? lane_ : 0);
    peer_empty_ = ptx::remote_address(empty(0), static_cast<uint32_t>(told));
    first_tile_ = static_cast<int>(blockIdx.x) / (p_.multicast * p_.splits);
    tile_stride_ = static_cast<int>(gridDim.x) / (p_.multicast * p_.splits);
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kC.stages; ++stage) {
        ptx::mbarrier_init(full(stage), 1);
        ptx::mbarrier_init(empty(stage), static_cast<uint32_t>(kConsumers * 4 * p_.multicast));
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::cluster_meet();
    if (warp_ >= 4 * kConsumers) {
      ptx::set_fewer_registers<kProducerRegisters>();
      if (lane_ == 0) produce();
      __syncwarp();
      if (p_.splits > 1) ptx::cluster_sync();  // add_up_parts'
    } else {
      ptx::set_more_registers<kConsumerRegisters>();
      consume();
    }
    // Nobody leaves while a peer may still copy to it, arrive at its barriers or read its sums.
    ptx::cluster_meet();
  }

 private:
  struct Tile {
    int row_block;   // first of this thread block's
    int blocks;      // how many there are, at least 1
    int token_tile;  // first, of 8
  };

  __device__ Tile tile_at(int index) const {
    // Turns of tokens_a_turn tiles along tokens, so that what is under way at once shares rows and tokens alike.
    const int of_tokens = p_.tiles / p_.row_tiles;
    const int a_turn = p_.tokens_a_turn * p_.row_tiles;
    const int turn = index / a_turn;
    const int width = min(p_.tokens_a_turn, of_tokens - turn * p_.tokens_a_turn);
    const int within = index - turn * a_turn;
    const int row_tile = within / width;
    const int token = turn * p_.tokens_a_turn + within % width;
    const int row_block = (row_tile * p_.multicast + peer_) * kTileBlocks;
    return {row_block, max(1, min(kTileBlocks, p_.row_blocks - row_block)), token * (kTokens / kTokenTile)};
  }

  // What this thread block does of a tile: its steps begin ... end - 1.
  struct Work {
    int tile, begin, end;
    __device__ int steps() const { return end - begin; }
  };

  // Where thread block `block`'s part of the streamed tiles' steps begins.
  __device__ int stream_begin(int block) const { return block * p_.streamed_steps + min(block, p_.longer_streams); }

  // use(work): whole tiles, or a part's share of them, then the steps that are this thread block's of the rest.
  template <typename Use>
  __device__ __forceinline__ void each_work(const Use& use) const {
    const int begin = steps_ * part_ / p_.splits, end = steps_ * (part_ + 1) / p_.splits;
    int at = stream_begin(static_cast<int>(blockIdx.x));
    for (int tile = first_tile_;;) {
      Work work{tile, begin, end};
      if (tile < p_.whole_tiles) {
        tile += tile_stride_;
      } else if (!kC.streamed) {
        return;
      } else {
        const int left = stream_begin(static_cast<int>(blockIdx.x) + 1) - at;
        if (left <= 0) return;
        work.tile = p_.whole_tiles + at / steps_;
        work.begin = at % steps_;
        work.end = min(steps_, work.begin + left);
        at += work.steps();
      }
      use(work);
    }
  }

  // ---- Shared memory: stages (records, activations), their scales, staging of outputs, barriers ----

  __device__ uint32_t weights(int stage) const { return base_ + stage * kC.stage_bytes(); }
  __device__ uint32_t acts(int stage) const { return weights(stage) + kC.weight_bytes(); }
  static constexpr int kScalesAt = kC.stages * kC.stage_bytes();
  __device__ uint32_t scales(int stage) const { return base_ + kScalesAt + stage * kC.scale_bytes(); }
  static constexpr int kStagingAt = kScalesAt + kC.stages * kC.scale_bytes();
  static constexpr int kBarriersAt = kStagingAt + kC.staging_bytes();
  __device__ uint32_t full(int stage) const { return base_ + kBarriersAt + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(stage) + kC.stages * 8; }

  // A place in the ring and the parity of its barriers' current phase.
  struct Place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void advance() {
      if (++stage < kC.stages) return;
      stage = 0;
      parity ^= 1;
    }
  };

  // ---- Producer: a thread each for the weights and the activations ----

  __device__ int groups_of(int step) const { return min(kGroupsAStage, p_.groups - step * kGroupsAStage); }

  // copy(tile, step, stage) for every step of every tile, as stages fall free.
  template <typename Copy>
  __device__ __forceinline__ void produce(const Copy& copy) const {
    Place place{.parity = 1};  // an empty stage's wait passes at once
    each_work([&](const Work& work) {
      const Tile tile = tile_at(work.tile);
      for (int step = work.begin; step < work.end; ++step) {
        ptx::mbarrier_wait(empty(place.stage), place.parity);
        copy(tile, step, place.stage);
        place.advance();
      }
    });
  }

  // Announces the bytes of the step, its peers' shares included. It does not wait for the kernel before this one.
  __device__ void produce_weights() const {
    const uint64_t policy = p_.tiles == p_.row_tiles ? ptx::read_once_policy() : ptx::usual_policy();
    const int64_t begin = clock64();
    int filled = 0;
    produce([&](const Tile& tile, int step, int stage) {
      // The ring fills at the pace of memory: more on its way at once would only make the quantizer, which is at work
      // meanwhile, wait longer for its answers.
      for (; filled < kC.stages && clock64() - begin < static_cast<int64_t>(filled) * p_.clocks_a_stage;) {
      }
      filled = min(filled + 1, kC.stages);
      const int groups = groups_of(step);
      const int blocks = max(0, min(kTileBlocks, p_.row_blocks - tile.row_block));  // none past the last
      const int act_tiles = min(kTokens / kTokenTile, p_.token_tiles - tile.token_tile);
      const int act = act_tiles * (kTileGroupBytes + (kPerGroup ? kTokenTile * 4 : 0));
      const int bytes = groups * blocks * kRecord;
      ptx::mbarrier_arrive_expect(full(stage), static_cast<uint32_t>(bytes + groups * act));
      if (blocks == 0) return;
      ptx::bulk_copy(
          weights(stage),
          p_.records + tile_offset(tile.row_block, step * kGroupsAStage, p_.row_blocks, p_.groups, kPerGroup),
          static_cast<uint32_t>(bytes), full(stage), policy);
    });
  }

  // This thread block's share of each group's activations, to all its peers.
  __device__ void produce_activations() const {
    const int first = peer_ * share_;
    const auto peers = static_cast<uint16_t>(((1 << p_.multicast) - 1) << (part_ * p_.multicast));
    const auto copy = [&](uint32_t to, const void* from, int bytes, int stage) {
      if (p_.multicast == 1) {
        ptx::bulk_copy(to, from, static_cast<uint32_t>(bytes), full(stage));
      } else {
        ptx::bulk_copy_multicast(to, from, static_cast<uint32_t>(bytes), full(stage), peers);
      }
    };
    produce([&](const Tile& tile, int step, int stage) {
      const int tiles = min(share_, p_.token_tiles - tile.token_tile - first);
      if (tiles <= 0) return;
#pragma unroll
      for (int g = 0; g < kGroupsAStage; ++g) {
        if (g > 0 && g >= groups_of(step)) break;
        const int64_t from =
            (step * kGroupsAStage + g) * static_cast<int64_t>(p_.token_tiles) + tile.token_tile + first;
        const int to = g * (kTokens / kTokenTile) + first;
        copy(acts(stage) + to * kTileGroupBytes, p_.codes + from * kTileGroupBytes, tiles * kTileGroupBytes, stage);
        if constexpr (kPerGroup) {
          copy(scales(stage) + to * kTokenTile * 4, p_.act_scales + from * kTokenTile, tiles * kTokenTile * 4, stage);
        }
      }
    });
  }

  __device__ void produce() const {
    const int which = warp_ - 4 * kConsumers;
    if (which == 0) return produce_weights();
    if (which > 1) return;
    ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    produce_activations();
  }

  // ---- Consumers ----

  struct Fragments {
    uint32_t a[kGroupsAStage][4][4];
  };

  // Where this lane's part of a stage's first record is in the stage.
  __device__ int record_place() const { return block_ * kRecordBytes + lane_ * 16; }

  template <int g>
  __device__ __forceinline__ void unpack_group(const Tile& tile, int stage, int record_place,
                                               Fragments& fragments) const {
    const uint8_t* record = shared_ + stage * kC.stage_bytes() + record_place + g * tile.blocks * kRecord;
    const auto* vectors = reinterpret_cast<const uint4*>(record);
    const uint4 v[3] = {vectors[0], vectors[32], vectors[64]};
#pragma unroll
    for (int s = 0; s < 4; ++s) unpack(word(v[0], s), word(v[1], s), word(v[2], s), fragments.a[g][s]);
  }

  // wgmma's description of k step s of a stage's group: core matrices 128 bytes apart along k, 1 KB along tokens.
  __device__ __forceinline__ uint64_t b_operand(int stage, int g, int s, int first_token) const {
    // Addresses are in units of 16 bytes, the bits above them say whose of a cluster; nothing that is added carries
    // over.
    const uint64_t first = static_cast<uint64_t>(acts(0) >> 4 & 0x3fff) |
                           static_cast<uint64_t>(kCoreMatrixBytes >> 4) << 16 |
                           static_cast<uint64_t>(kTileGroupBytes >> 4) << 32;
    const uint32_t offset = static_cast<uint32_t>(stage) * (kC.stage_bytes() / 16);
    const int within = (g * kTokens + first_token) * kGroup + s * 2 * kCoreMatrixBytes;
    return first + offset + static_cast<uint32_t>(within / 16);
  }

  // This warp is done with a stage, here and at the peers that filled it too: a lane tells each of them.
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane_ < p_.multicast) ptx::mbarrier_arrive_cluster(peer_empty_ + stage * 8);
  }

  // ---- Scheme channel: sums over all of K, in the tensor cores ----

  // Waits for a stage and unpacks this warp's rows of it; zeros past the last group.
  __device__ __forceinline__ void unpack_stage(const Tile& tile, const Place& place, int step,
                                               Fragments& fragments) const {
    ptx::mbarrier_wait(full(place.stage), place.parity);
    unpack_group<0>(tile, place.stage, record_place(), fragments);
    if constexpr (kGroupsAStage == 2) {
      unpack_group<1>(tile, place.stage, record_place(), fragments);
      const bool there = groups_of(step) == 2;
#pragma unroll
      for (int i = 0; i < 16; ++i) fragments.a[1][i / 4][i % 4] = there ? fragments.a[1][i / 4][i % 4] : 0;
    }
  }

  // Starts the products of `now`, and unpacks the next step's fragments beside them.
  __device__ __forceinline__ void advance(const Tile& tile, const Work& work, int step, Place& place,
                                          const Fragments& now, Fragments& next, Sum (&sums)[kSums]) const {
    const int stage = place.stage;
    place.advance();
    ptx::wgmma_fence();
#pragma unroll
    for (int g = 0; g < kGroupsAStage; ++g) {
#pragma unroll
      for (int s = 0; s < 4; ++s) ptx::wgmma_s8<true>(sums, now.a[g][s], b_operand(stage, g, s, 0));
    }
    ptx::wgmma_commit();
    // The tensor cores have this step's products to do while those of the step before are seen off.
    ptx::wgmma_wait<1>();
    if (step > work.begin) release(stage == 0 ? kC.stages - 1 : stage - 1);
    if (step + 1 < work.end) unpack_stage(tile, place, step + 1, next);
  }

  __device__ __forceinline__ void add_up_channel(const Tile& tile, const Work& work, Place& place, Fragments& even,
                                                 Fragments& odd, Sum (&sums)[kSums]) const {
    for (int step = work.begin; step < work.end; step += 2) {
      advance(tile, work, step, place, even, odd, sums);
      if (step + 1 < work.end) advance(tile, work, step + 1, place, odd, even, sums);
    }
    ptx::wgmma_wait<0>();
    ptx::hold(sums);
    release(place.stage == 0 ? kC.stages - 1 : place.stage - 1);
  }

  // ---- Scheme group: every group's sums are scaled ----

  // A stage's products are each of its groups by each turn's tokens.
  static constexpr int kTurns = kC.turns, kTurnTokens = kTokens / kTurns, kTurnSums = kTurnTokens / 2;

  template <int product>
  __device__ __forceinline__ void start(int stage, const Fragments& fragments, int32_t (&dots)[kTurnSums]) const {
    constexpr int g = product / kTurns, kFirstToken = product % kTurns * kTurnTokens;
    ptx::wgmma_fence();
    ptx::wgmma_s8<false>(dots, fragments.a[g][0], b_operand(stage, g, 0, kFirstToken));
#pragma unroll
    for (int s = 1; s < 4; ++s) {
      ptx::wgmma_s8<true>(dots, fragments.a[g][s], b_operand(stage, g, s, kFirstToken));
    }
    ptx::wgmma_commit();
  }

  // Where this lane's part of a stage's first group is: its record and its rows' scales in the stage, the tokens'
  // scales in shared memory.
  struct Places {
    int record, rows, tokens;
  };
  __device__ Places places_of(const Tile& tile) const {
    return {ptx::keep(record_place()), ptx::keep(tile.blocks * kRecordBytes + (block_ * kRecordRows + lane_ / 4) * 2),
            ptx::keep(kScalesAt + lane_ % 4 * 8)};
  }

  // sums come out kCodeFactor times too large.
  template <int product>
  __device__ __forceinline__ void scale(const Tile& tile, const Places& places, int stage,
                                        const int32_t (&dots)[kTurnSums], Sum (&sums)[kSums]) const {
    constexpr int g = product / kTurns, kFirstToken = product % kTurns * kTurnTokens;
    const auto* of_rows =
        reinterpret_cast<const __half*>(shared_ + stage * kC.stage_bytes() + places.rows + g * tile.blocks * kRecord);
    const float low = __half2float(of_rows[0]), high = __half2float(of_rows[8]);
    const auto* of_tokens = reinterpret_cast<const float2*>(shared_ + stage * kC.scale_bytes() + places.tokens +
                                                            (g * kTokens + kFirstToken) * 4);
#pragma unroll
    for (int j = 0; j < kTurnTokens / 8; ++j) {
      const float2 act = of_tokens[4 * j];
      const int32_t* from = dots + 4 * j;
      Sum* to = sums + kFirstToken / 2 + 4 * j;
      to[0] += static_cast<float>(from[0]) * (low * act.x);
      to[1] += static_cast<float>(from[1]) * (low * act.y);
      to[2] += static_cast<float>(from[2]) * (high * act.x);
      to[3] += static_cast<float>(from[3]) * (high * act.y);
    }
  }

  // The products of a stage: while one's sums are scaled, the tensor cores have the next one and the one after that is
  // unpacked. The first one's sums are there when it begins, and the next stage's first ones when it returns: no
  // product is under way where the loop turns around, which the compiler would not take. Past the last group, sums of
  // whatever was there are left alone.
  template <bool kLast>
  __device__ __forceinline__ void advance_group(const Tile& tile, const Places& places, int step, Place& place,
                                                Fragments& fragments, int32_t (&dots)[2][kTurnSums],
                                                Sum (&sums)[kSums]) const {
    constexpr int kProducts = kGroupsAStage * kTurns;
    static_assert(kProducts % 2 == 0, "every stage begins with the same dots");
    const int stage = place.stage;
    place.advance();
    const int groups = kLast ? groups_of(step) : kGroupsAStage;
    const auto product = [&]<int p>(std::integral_constant<int, p>) {
      constexpr int kNext = (p + 1) % kProducts, kAfter = (p + 2) % kProducts;
      constexpr bool kNextHere = p + 1 < kProducts, kAfterHere = p + 2 < kProducts;
      if constexpr (kNextHere || !kLast) start<kNext>(kNextHere ? stage : place.stage, fragments, dots[kNext % 2]);
      if constexpr (kAfter % kTurns == 0 && (kAfterHere || !kLast)) {
        if constexpr (kAfter == 0) ptx::mbarrier_wait(full(place.stage), place.parity);
        constexpr int g = kAfter / kTurns;
        unpack_group<g>(tile, kAfterHere ? stage : place.stage, places.record, fragments);
      }
      if (p / kTurns < groups) scale<p>(tile, places, stage, dots[p % 2], sums);
      ptx::wgmma_wait<0>();
      ptx::hold(dots[kNext % 2]);
    };
    [&]<int... p>(std::integer_sequence<int, p...>) {
      (product(std::integral_constant<int, p>{}), ...);
    }(std::make_integer_sequence<int, kProducts>{});
    release(stage);
  }

  __device__ __forceinline__ void add_up_groups(const Tile& tile, const Work& work, Place& place,
                                                Sum (&sums)[kSums]) const {
    const Places places = places_of(tile);
    Fragments fragments;
    int32_t dots[2][kTurnSums];
    // The records of the first two products.
    ptx::mbarrier_wait(full(place.stage), place.parity);
    unpack_group<0>(tile, place.stage, places.record, fragments);
    if constexpr (kTurns == 1) unpack_group<1>(tile, place.stage, places.record, fragments);
    start<0>(place.stage, fragments, dots[0]);
    ptx::wgmma_wait<0>();
    ptx::hold(dots[0]);
#pragma unroll 1
    for (int step = work.begin; step + 1 < work.end; ++step) {
      advance_group<false>(tile, places, step, place, fragments, dots, sums);
    }
    advance_group<true>(tile, places, work.end - 1, place, fragments, dots, sums);
  }

  // Barriers of the thread block: a consumer's warps alone, all consumers.
  static constexpr int kAlone = 1, kAllConsumers = kAlone + kConsumers;

  __device__ void consume() {
    Place place;
    each_work([&](const Work& work) {
      const Tile tile = tile_at(work.tile);
      Sum sums[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0;
      if constexpr (kPerGroup) {
        add_up_groups(tile, work, place, sums);
      } else {
        Fragments even, odd;
        unpack_stage(tile, place, work.begin, even);
        // Only now, when the first activations have come, are their scales there.
        float token_scales[kTokenScales];
        load_token_scales(tile, token_scales);
        add_up_channel(tile, work, place, even, odd, sums);
        share_token_scales(token_scales);
      }
      if constexpr (kPerGroup && kC.streamed) {
        if (work.steps() < steps_) {
          if (work.begin > 0) return give(sums);
          take_the_rest(work, sums);
        }
      }
      store_all(tile_at(ptx::keep(work.tile)), sums);  // computed again: registers are few before
    });
  }

  // ---- Tiles that are streamed: the thread block that begins one stores it, and adds the others' sums in order ----

  // A thread block's sums, of the one tile that it may have a later part of: the first work it has of them, so that
  // they are ready when they are waited for, after the last one.
  __device__ float* partials_of(int block) const {
    return p_.partials + static_cast<int64_t>(block) * kSums * kConsumers * kWarpGroup + threadIdx.x;
  }

  __device__ __forceinline__ void give(const float (&sums)[kSums]) const {
    float* to = partials_of(static_cast<int>(blockIdx.x));
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(to + i * kConsumers * kWarpGroup, sums[i]);
    __threadfence();
    ptx::named_barrier(kAllConsumers, kConsumers * kWarpGroup);
    if (threadIdx.x == 0) ptx::store_release(p_.ready + blockIdx.x, p_.token);
    __syncwarp();  // else the compiler takes warps for divided from here on, and has no uniform registers in the loops
  }

  // Thread blocks start in order, and a later one's first work waits for nobody: it is done, or at work, or starts when
  // any other ends.
  __device__ __forceinline__ void take_the_rest(const Work& work, float (&sums)[kSums]) const {
    const int end = (work.tile - p_.whole_tiles + 1) * steps_;  // of the tile, in the stream
    for (int block = static_cast<int>(blockIdx.x) + 1; stream_begin(block) < end; ++block) {
      // All lanes alike, so that the compiler keeps what is the same for a warp in uniform registers.
      while (!__all_sync(~0u, ptx::load_acquire(p_.ready + block) == p_.token)) {
      }
      ptx::named_barrier(kAllConsumers, kConsumers * kWarpGroup);
      if (threadIdx.x == 0) p_.ready[block] = 0;  // so that it is not mistaken for the next launch's
      const float* from = partials_of(block);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += __ldcg(from + i * kConsumers * kWarpGroup);
    }
  }

  // ---- Outputs, a chunk of tokens at a time ----

  static constexpr int kChunkSums = kC.chunk_tokens() / 2;

  __device__ __forceinline__ void store_all(const Tile& tile, const Sum (&sums)[kSums]) const {
    if (p_.splits > 1) return add_up_parts(tile, sums);
    const Rows rows = rows_of(tile);
#pragma unroll
    for (int c = 0; c < kTokens / kC.chunk_tokens(); ++c) {
      Sum chunk[kChunkSums];
#pragma unroll
      for (int i = 0; i < kChunkSums; ++i) chunk[i] = sums[c * kChunkSums + i];
      store(tile, rows, c, chunk);
    }
  }

  // Scheme channel: the tokens' scales, asked for ahead of time, a few a thread, and then shared by the warp group
  // where scheme group has those of the stages.
  static constexpr int kTokenScales = (kTokens + kWarpGroup - 1) / kWarpGroup;

  __device__ float* shared_token_scales() const {
    return reinterpret_cast<float*>(shared_ + kScalesAt) + warp_ / 4 * kTokens;
  }
  __device__ __forceinline__ void load_token_scales(const Tile& tile, float (&scales)[kTokenScales]) const {
#pragma unroll
    for (int i = 0; i < kTokenScales; ++i) {
      const int64_t token =
          static_cast<int64_t>(tile.token_tile) * kTokenTile + i * kWarpGroup + threadIdx.x % kWarpGroup;
      scales[i] = token < p_.m ? __ldcg(p_.act_scales + token) : 0.0f;
    }
  }
  __device__ __forceinline__ void share_token_scales(const float (&scales)[kTokenScales]) const {
    static_assert(kConsumers * kTokens * 4 <= kC.stages * kC.scale_bytes(), "room for the tokens' scales");
    ptx::named_barrier(kAlone + warp_ / 4, kWarpGroup);  // the tile before has been stored
#pragma unroll
    for (int i = 0; i < kTokenScales; ++i) {
      const int token = i * kWarpGroup + static_cast<int>(threadIdx.x) % kWarpGroup;
      if (token < kTokens) shared_token_scales()[token] = scales[i];
    }
    ptx::named_barrier(kAlone + warp_ / 4, kWarpGroup);
  }

  // What this lane's two rows need of their own.
  struct Rows {
    float scale[2], bias[2];
  };
  __device__ Rows rows_of(const Tile& tile) const {
    Rows rows{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = static_cast<int64_t>(tile.row_block + block_) * kRecordRows + lane_ / 4 + 8 * i;
      if (row >= p_.n) continue;
      rows.scale[i] = (kPerGroup ? 1.0f : __half2float(__ushort_as_half(p_.scales[row]))) / kCodeFactor;
      if (p_.bias != nullptr) rows.bias[i] = load_float(p_.bias, p_.bias_dtype, row);
    }
    return rows;
  }

  // The parts of K meet: each thread block of the cluster adds up and stores some of the chunks.
  __device__ void add_up_parts(const Tile& tile, const Sum (&sums)[kSums]) const {
    constexpr int kAll = kConsumers * kWarpGroup;
    static_assert(kSums * kAll * 4 <= kScalesAt, "sums go where the ring was");
    ptx::named_barrier(kAllConsumers, kAll);  // nobody here reads the ring any more, and every copy to it has arrived
    auto* mine = reinterpret_cast<Sum*>(shared_) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) mine[i * kAll] = sums[i];
    ptx::cluster_sync();  // the producer's too
    const Rows rows = rows_of(tile);
    for (int c = part_; c < kTokens / kC.chunk_tokens(); c += p_.splits) {
      Sum chunk[kChunkSums] = {};
      for (int part = 0; part < p_.splits; ++part) {
#pragma unroll
        for (int i = 0; i < kChunkSums; ++i) {
          const uint32_t at = base_ + ((c * kChunkSums + i) * kAll + threadIdx.x) * 4;
          const uint32_t bits = ptx::load_remote(at, static_cast<uint32_t>(part * p_.multicast + peer_));
          if constexpr (kPerGroup) {
            chunk[i] += __uint_as_float(bits);
          } else {
            chunk[i] += static_cast<int32_t>(bits);
          }
        }
      }
      store(tile, rows, c, chunk);
    }
  }

  // Scales, biases, rounds, and turns a warp's 16 rows of a chunk of tokens, so that each token's are written together.
  __device__ __forceinline__ void store(const Tile& tile, const Rows& rows, int chunk,
                                        const Sum (&sums)[kChunkSums]) const {
    float values[kChunkSums];
#pragma unroll
    for (int j = 0; j < kChunkSums / 4; ++j) {
      float2 act{1, 1};
      if constexpr (!kPerGroup) {
        const int token = chunk * kC.chunk_tokens() + j * kTokenTile + lane_ % 4 * 2;
        act = *reinterpret_cast<const float2*>(shared_token_scales() + token);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = rows.scale[i / 2] * (i % 2 == 0 ? act.x : act.y);
        values[4 * j + i] = static_cast<float>(sums[4 * j + i]) * scale + rows.bias[i / 2];
      }
    }
    uint8_t* staging = shared_ + kStagingAt + warp_ * kC.chunk_tokens() * kRecordRows * 4;
    __syncwarp();  // the chunk before has left
    if (p_.y_dtype == FLEXQ_F32) {
      turn_wide(values, reinterpret_cast<float*>(staging));
      __syncwarp();
      copy_out<float>(tile, chunk, staging);
    } else {
      turn(values, ptx::shared_address(staging));
      __syncwarp();
      copy_out<uint16_t>(tile, chunk, staging);
    }
  }

  // Staged outputs are [tokens][16 rows], and of 16 bits each, a token's two vectors of 8 rows change places in every
  // other four tokens: so eight tokens' vectors are in different banks.
  static __device__ int swapped(int token) { return token / 4 % 2; }

  __device__ __forceinline__ void turn(const float (&values)[kChunkSums], uint32_t staging) const {
    const int token = lane_ / 16 * kTokenTile + lane_ % 8, vector = lane_ / 8 % 2;  // whose address a lane gives
    const uint32_t at = staging + token * kRecordRows * 2 + (vector ^ swapped(token)) * 16;
#pragma unroll
    for (int j = 0; j < kChunkSums / 8; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = to_16_bits(values[8 * j + 2 * i], values[8 * j + 2 * i + 1], p_.y_dtype);
      ptx::stmatrix_x4_trans(at + j * 2 * kTokenTile * kRecordRows * 2, words);
    }
  }

  __device__ __forceinline__ void turn_wide(const float (&values)[kChunkSums], float* staging) const {
#pragma unroll
    for (int i = 0; i < kChunkSums; ++i) {
      const int token = i / 4 * kTokenTile + lane_ % 4 * 2 + i % 2;
      staging[token * kRecordRows + lane_ / 4 + i % 4 / 2 * 8] = values[i];
    }
  }

  // A warp's staged outputs, elements T, to y.
  template <typename T>
  __device__ __forceinline__ void copy_out(const Tile& tile, int chunk, const uint8_t* staging) const {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kVectors = kRecordRows / kElements;  // of a token
    const int64_t token0 = static_cast<int64_t>(tile.token_tile) * kTokenTile + chunk * kC.chunk_tokens();
    const int64_t row0 = static_cast<int64_t>(tile.row_block + block_) * kRecordRows;
    for (int i = lane_; i < kC.chunk_tokens() * kVectors; i += 32) {
      const int64_t token = token0 + i / kVectors;
      const int64_t row = row0 + i % kVectors * kElements;
      if (token >= p_.m || row >= p_.n) continue;
      const int at = sizeof(T) == 2 ? i ^ swapped(i / kVectors) : i;
      const T* from = reinterpret_cast<const T*>(staging + at * 16);
      T* to = static_cast<T*>(p_.y) + token * p_.ldy + row;
      if (p_.vectors && row + kElements <= p_.n) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        const auto count = static_cast<int>(min(static_cast<int64_t>(kElements), p_.n - row));
#pragma unroll 1
        for (int e = 0; e < count; ++e) to[e] = from[e];
      }
    }
  }

  const Params& p_;
  uint8_t* shared_;
  uint32_t base_;  // its shared address
  int warp_, lane_;
  int block_;            // of a consumer warp: its rows in the tile
  int peer_;             // among those that share activations
  int share_;            // of their tiles of 8 tokens
  int part_;             // of K
  uint32_t peer_empty_;  // a lane's: the first stage's barrier at the peer that it tells
  int steps_;            // of a tile
  int first_tile_, tile_stride_;
};

#endif  // FLEXQ_SM90A

template <int kConfig, bool kPerGroup>
__global__ void __launch_bounds__(65536 / kConfigs[kConfig].launch_registers() / kWarpGroup * kWarpGroup, 1)
    gemm_wgmma_kernel(const __grid_constant__ Params params) {
#if FLEXQ_SM90A
  extern __shared__ __align__(1024) uint8_t shared[];
  Kernel<kConfig, kPerGroup>(params, shared).run();
#endif
}

using KernelFunction = void (*)(Params);

template <bool kPerGroup, size_t kConfig>
constexpr KernelFunction kernel_if_any() {
  if constexpr (kPerGroup ? kConfigs[kConfig].group : kConfigs[kConfig].channel) {
    return gemm_wgmma_kernel<static_cast<int>(kConfig), kPerGroup>;
  } else {
    return nullptr;
  }
}

template <bool kPerGroup, size_t... kConfig>
std::array<KernelFunction, sizeof...(kConfig)> kernels_of(std::index_sequence<kConfig...>) {
  return {kernel_if_any<kPerGroup, kConfig>()...};
}

template <bool kPerGroup>
KernelFunction kernel_of(int config) {
  return kernels_of<kPerGroup>(std::make_index_sequence<std::size(kConfigs)>{})[static_cast<size_t>(config)];
}

constexpr bool all_fit() {
  for (const Config& c : kConfigs) {
    if (c.shared_bytes() > kSharedLimit) return false;
  }
  return true;
}
static_assert(all_fit(), "a thread block has 227 KB of shared memory");

// What a launch marks its partial sums with, in a workspace that holds anything: marks are taken away again, and 64
// random bits are not there by chance.
uint64_t next_token() {
  static std::atomic<uint64_t> state = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15);  // splitmix64, Steele et al. 2014
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

}  // namespace

int num_wgmma_configs() { return static_cast<int>(std::size(kConfigs)); }

WgmmaShape wgmma_shape(int config) {
  const Config& c = kConfigs[config];
  return {kRows, c.tokens, c.groups_a_stage, c.group, c.channel, c.streamed};
}

// The driver knows: it depends on which multiprocessors of which part of the GPU are there.
std::array<int, kMaxSplits + 1> wgmma_clusters() {
  std::array<int, kMaxSplits + 1> clusters{};
  const Config& c = kConfigs[0];
  for (int size = 1; size <= kMaxSplits; ++size) {
    const Launch how{.grid = dim3(static_cast<unsigned>(size)),
                     .block = dim3(static_cast<unsigned>(kThreads)),
                     .shared_bytes = static_cast<size_t>(c.shared_bytes()),
                     .overlapped = true,
                     .cluster = static_cast<unsigned>(size)};
    clusters[static_cast<size_t>(size)] = clusters_at_once(kernel_of<true>(0), how);
  }
  return clusters;
}

size_t wgmma_workspace_size(const Device& device, const GemmPlan& plan) {
  if (!kConfigs[plan.config].streamed) return 0;
  return align_up(static_cast<size_t>(device.num_sms) * (kConfigs[plan.config].sums_bytes() + sizeof(uint64_t)));
}

void gemm_wgmma(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan) {
  const Config& c = kConfigs[plan.config];
  const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
  const ActivationLayout act(args.act);
  const auto* records = static_cast<const uint8_t*>(args.prepacked);
  const auto* codes = static_cast<const uint8_t*>(args.quantized);
  const int64_t row_tiles = ceil_div(num_row_blocks(args.desc), kTileBlocks * plan.multicast);
  const int64_t tiles = row_tiles * ceil_div(args.act.m, c.tokens);
  constexpr int64_t kMaxTiles = int64_t{1} << 27;  // times a cluster's size, in 32 bits
  if (tiles > kMaxTiles) {
    fail(FLEXQ_UNSUPPORTED, "m * n is too large for one call on this GPU: ", args.act.m, " * ", args.desc.n);
  }
  const KernelFunction kernel = per_group ? kernel_of<true>(plan.config) : kernel_of<false>(plan.config);
  const int cluster = plan.multicast * plan.splits;
  Launch how{.grid = dim3(static_cast<unsigned>(cluster)),
             .block = dim3(static_cast<unsigned>(kThreads)),
             .shared_bytes = static_cast<size_t>(c.shared_bytes()),
             .overlapped = true,
             .cluster = static_cast<unsigned>(cluster)};
  const auto at_once = [&] { return int64_t{std::clamp(clusters_at_once(kernel, how), 1, device.num_sms)}; };
  int64_t clusters = tiles, whole = tiles;
  const int64_t steps = ceil_div(num_groups(args.desc.k), c.groups_a_stage);
  if (c.streamed) {
    // One wave and what does not fill one is streamed, so that each thread block has one to two tiles of it.
    clusters = std::min(at_once(), tiles * steps);
    whole = std::max<int64_t>(tiles / clusters - 1, 0) * clusters;
  } else if (plan.splits == 1) {
    clusters = std::min(tiles, at_once());
  }
  how.grid = dim3(static_cast<unsigned>(clusters * cluster));
  const int64_t streamed = (tiles - whole) * steps;
  auto* workspace = static_cast<uint8_t*>(args.workspace);
  // About as many bytes of weights as of activations are shared by what is under way at once.
  constexpr int kTokensATurn = 4096;
  const int element = args.y_dtype == FLEXQ_F32 ? 4 : 2;
  const Params params{
      .records = records,
      .scales = reinterpret_cast<const uint16_t*>(records + WeightLayout(args.desc).scales),
      .codes = codes,
      .act_scales = reinterpret_cast<const float*>(codes + act.scales),
      .bias = args.bias,
      .bias_dtype = args.bias_dtype,
      .y = args.y,
      .y_dtype = args.y_dtype,
      .ldy = args.ldy,
      .vectors = reinterpret_cast<uintptr_t>(args.y) % 16 == 0 && args.ldy * element % 16 == 0,
      .n = args.desc.n,
      .m = args.act.m,
      .row_blocks = static_cast<int>(num_row_blocks(args.desc)),
      .groups = static_cast<int>(num_groups(args.desc.k)),
      .token_tiles = static_cast<int>(act.tiles),
      .row_tiles = static_cast<int>(row_tiles),
      .tiles = static_cast<int>(tiles),
      .tokens_a_turn = kTokensATurn / c.tokens,
      .multicast = plan.multicast,
      .splits = plan.splits,
      .clocks_a_stage =
          static_cast<int>(c.weight_bytes() * static_cast<double>(std::min<int64_t>(how.grid.x, device.num_sms)) /
                           device.dram_bytes_per_us * device.clocks_per_us),
      .whole_tiles = static_cast<int>(whole),
      .streamed_steps = static_cast<int>(streamed / clusters),
      .longer_streams = static_cast<int>(streamed % clusters),
      .partials = reinterpret_cast<float*>(workspace),
      .ready = c.streamed ? reinterpret_cast<uint64_t*>(workspace + static_cast<size_t>(clusters) * c.sums_bytes())
                          : nullptr,
      .token = c.streamed ? next_token() : 0,
  };
  launch(stream, "gemm_wgmma", kernel, how, params);
}

}  // namespace flexq::cuda
