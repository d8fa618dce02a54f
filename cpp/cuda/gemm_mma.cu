// y = x * w^T by a warp's tensor core instructions (mma.sync, sm_80 and later) on int8 codes, or on their bits.
//
// For few tokens the time is that of reading the weights, so everything serves the memory: each warp keeps its own ring
// of cp.async copies in shared memory, reads back only what it copied itself and asks for the next record in place of
// one that it has used, and codes become int8 fragments with nine instructions for 16 of them. A thread block has a
// tile of rows and all of K or, where N alone does not fill the GPU, a part of it; the parts are added up by a second
// kernel in a fixed order, so that every run gives the same bits. Its warps share K, and each loads the activations of
// its own groups; or they have rows of their own, and the thread block copies the activations to shared memory once for
// all of them.
//
// The b1 products are the paper's: an integer product as a sum of products of single bits, weighted by powers of two
// (arXiv 2508.04405). Both operands' bits are gathered in registers from the same records and tiles.
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <iterator>
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

enum class Product { kS8, kB1A6, kB1A8 };

struct Config {
  int token_tiles;  // of 8 tokens
  int warps_n;      // warps side by side along N
  int warps_k;      // warps that share the groups of a tile's K
  int blocks;       // of 16 rows a warp has, for the same activations; at most so many, where it loads its own
  int slots;        // for records in a warp's ring of copies
  int ctas_per_sm;
  bool shared_act;  // activations go through shared memory too, read once for all warps side by side
  Product product = Product::kS8;

  constexpr int threads() const { return 32 * warps_n * warps_k; }
  constexpr int tokens() const { return kTokenTile * token_tiles; }
  constexpr int warp_rows() const { return kRecordRows * blocks; }
  constexpr int rows() const { return warp_rows() * warps_n; }
  constexpr int stages() const { return slots / blocks; }  // of shared activations
  constexpr int ring_bytes(bool per_group) const {
    return warps_n * warps_k * slots * record_and_scale_bytes(per_group);
  }
  constexpr int act_step_bytes(bool per_group) const {
    return warps_k * token_tiles * (kTileGroupBytes + (per_group ? kTokenTile * 4 : 0));
  }
  constexpr int act_ring_bytes(bool per_group) const { return shared_act ? stages() * act_step_bytes(per_group) : 0; }
  // A warp loads its activations a step ahead, where there are registers for it.
  constexpr bool act_ahead() const { return !shared_act && token_tiles <= 2 && token_tiles * blocks <= 8; }
  constexpr int sums() const { return rows() * tokens(); }
  constexpr int shared_bytes(bool per_group) const {
    const int rings = ring_bytes(per_group) + act_ring_bytes(per_group);
    return std::max(rings, warps_k * sums() * 4);  // the sums go where the rings were
  }
};

// Of these, dispatch.cpp picks.
constexpr Config kConfigs[] = {
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 1, .slots = 2, .ctas_per_sm = 4, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 2, .slots = 3, .ctas_per_sm = 3, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 4, .slots = 6, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 8, .slots = 8, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 1, .slots = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 2, .slots = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 4, .slots = 6, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 8, .slots = 8, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 4, .warps_k = 2, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 2, .warps_n = 8, .warps_k = 1, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 4, .warps_n = 1, .warps_k = 8, .blocks = 2, .slots = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 4, .warps_n = 1, .warps_k = 8, .blocks = 4, .slots = 6, .ctas_per_sm = 1, .shared_act = false},
    {.token_tiles = 4, .warps_n = 4, .warps_k = 2, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 4, .warps_n = 8, .warps_k = 1, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 8, .warps_n = 8, .warps_k = 1, .blocks = 2, .slots = 6, .ctas_per_sm = 1, .shared_act = true},
    {.token_tiles = 1,
     .warps_n = 1,
     .warps_k = 8,
     .blocks = 1,
     .slots = 3,
     .ctas_per_sm = 3,
     .shared_act = false,
     .product = Product::kB1A6},
    {.token_tiles = 1,
     .warps_n = 1,
     .warps_k = 8,
     .blocks = 1,
     .slots = 3,
     .ctas_per_sm = 3,
     .shared_act = false,
     .product = Product::kB1A8},
};
constexpr int kNumConfigs = static_cast<int>(std::size(kConfigs));

struct Params {
  const uint8_t* records;
  const uint16_t* scales;  // scheme channel's, fp16
  const uint8_t* codes;    // of the activations
  const float* act_scales;
  const void* bias;
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  int64_t n;
  int64_t row_blocks;
  int blocks;  // of a warp
  int groups;
  int steps;            // of a tile: ceil(groups / warps_k)
  int64_t m;            // tokens
  int64_t token_tiles;  // of 8, all of them
  void* partials;       // [splits][tiles][sums], where K is split
};

// Bit c of byte i of plane p := bit p of byte i of word c: an 8x8 bit transpose in each byte.
__device__ inline void transpose_bits(uint32_t (&w)[8]) {
#pragma unroll
  for (int s = 4; s > 0; s /= 2) {
    const uint32_t low = s == 4 ? 0x0f0f0f0fu : s == 2 ? 0x33333333u : 0x55555555u;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (c & s) continue;
      const uint32_t a = w[c], b = w[c + s];
      w[c] = (a & low) | (b << s & ~low);
      w[c + s] = (a >> s & low) | (b & ~low);
    }
  }
}

// Dot products of 16 rows and 8 tokens over 128 k from the planes of their bits, weights' in bits 2 to 7 (4 * code):
// sum_pq c_p d_q popcount(w_p & x_q), c and d powers of two with the top one negative. Diagonals p + q of equal weight
// are added up from the largest down, doubling on the way.
template <int kActBits>
__device__ inline void b1_products(int32_t (&dots)[4], const uint32_t (&low)[8], const uint32_t (&high)[8],
                                   const uint32_t (&act)[8]) {
  constexpr int kTop = kPlanes - 1, kActTop = kActBits - 1;
  int32_t plus[4] = {}, minus[4] = {};
#pragma unroll
  for (int diagonal = kTop + kActTop; diagonal >= 0; --diagonal) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      plus[i] *= 2;
      minus[i] *= 2;
    }
#pragma unroll
    for (int p = 0; p <= kTop; ++p) {
      const int q = diagonal - p;
      if (q < 0 || q > kActTop) continue;
      ptx::mma_m16n8k128_b1((p == kTop) != (q == kActTop) ? minus : plus, low[p + 2], high[p + 2], act[q]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) dots[i] += kCodeFactor * (plus[i] - minus[i]);
}

// Scales a sum, adds the bias, rounds and stores it.
template <bool kPerGroup, typename Sum>
__device__ void write(const Params& p, int64_t row, int64_t token, Sum sum) {
  if (row >= p.n || token >= p.m) return;
  float value = static_cast<float>(sum) * (1.0f / kCodeFactor);
  if constexpr (!kPerGroup) value *= __half2float(reinterpret_cast<const __half*>(p.scales)[row]) * p.act_scales[token];
  if (p.bias != nullptr) value += load_float(p.bias, p.bias_dtype, row);
  store_float(p.y, p.y_dtype, token * p.ldy + row, value);
}

template <int kConfig, bool kPerGroup>
class Kernel {
 public:
  static constexpr Config kC = kConfigs[kConfig];
  static constexpr int kSlotBytes = record_and_scale_bytes(kPerGroup);
  // Whether a warp's records may lie in two tiles of 128 rows.
  static constexpr bool kTwoTiles = !kC.shared_act && kC.blocks > 2;
  static_assert(kC.blocks <= kTileBlocks && (kTwoTiles || kTileBlocks % kC.blocks == 0));
  // Sums of a tile: fp32 of scaled groups, or int32 over all of K.
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;

  __device__ Kernel(const Params& params, uint8_t* shared)
      : p_(params),
        lane_(threadIdx.x % 32),
        warp_n_(threadIdx.x / 32 / kC.warps_k),
        warp_k_(threadIdx.x / 32 % kC.warps_k) {
    ring_ = shared + static_cast<int>(threadIdx.x / 32) * kC.slots * kSlotBytes;
    act_ring_ = shared + kC.ring_bytes(kPerGroup);
    sums_ = reinterpret_cast<Sum*>(shared);
  }

  __device__ void run() {
    const int begin = part_begin(blockIdx.y);
    const int end = part_begin(blockIdx.y + 1);
    start(begin, end);
    if constexpr (kC.shared_act) {
      add_up_together(end - begin);
    } else {
      add_up_alone();
    }
    finish();
  }

 private:
  // The steps of part i of K.
  __device__ int part_begin(int i) const {
    return static_cast<int>(static_cast<int64_t>(p_.steps) * i / static_cast<int>(gridDim.y));
  }

  __device__ void start(int begin, int end) {
    const int64_t block = (static_cast<int64_t>(blockIdx.x) * kC.warps_n + warp_n_) * p_.blocks;
    blocks_ = static_cast<int>(min(static_cast<int64_t>(p_.blocks), max(p_.row_blocks - block, int64_t{0})));
    group_ = begin * kC.warps_k + warp_k_;
    act_fetch_group_ = begin * kC.warps_k;
    // Groups of this warp: the last step may have none.
    steps_ = begin == end || blocks_ == 0 ? 0 : end - begin - (group_ + (end - begin - 1) * kC.warps_k >= p_.groups);
    fetches_left_ = steps_ * blocks_;
    fetch_block_ = 0;
    policy_ = gridDim.z == 1 ? ptx::read_once_policy() : ptx::usual_policy();
    in_tile_ = static_cast<int>(block % kTileBlocks);
    fetch_tile_ = tile_of_records(block);
    if constexpr (kTwoTiles) next_fetch_tile_ = tile_of_records(min(block + kTileBlocks, p_.row_blocks - 1));
    first_tile_ = static_cast<int64_t>(blockIdx.z) * kC.token_tiles;
    tiles_ = static_cast<int>(min(static_cast<int64_t>(kC.token_tiles), p_.token_tiles - first_tile_));
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[b][t][i] = 0;
      }
    }
  }

  // ---- Copies, running ahead of the work ----

  // A tile of 128 rows: where its next group's records begin, with this lane's part of them, and how many they are.
  struct TileOfRecords {
    const uint8_t* from;
    int blocks;
  };
  __device__ TileOfRecords tile_of_records(int64_t block) const {
    return {p_.records + tile_offset(block, group_, p_.row_blocks, p_.groups, kPerGroup) + lane_ * 16,
            static_cast<int>(blocks_of_tile(block, p_.row_blocks))};
  }

  __device__ static void advance(TileOfRecords& tile) { tile.from += kC.warps_k * tile.blocks * kSlotBytes; }

  // The warp's next record: block after block of a group, group after group.
  __device__ void fetch_record(int slot) {
    if (fetches_left_ == 0) return;
    --fetches_left_;
    TileOfRecords tile = fetch_tile_;
    int record = in_tile_ + fetch_block_;
    if (kTwoTiles && record >= kTileBlocks) {
      tile = next_fetch_tile_;
      record -= kTileBlocks;
    }
    const uint8_t* from = tile.from + record * kRecordBytes;
    const uint32_t to = ptx::shared_address(ring_ + slot * kSlotBytes) + lane_ * 16;
#pragma unroll
    for (int j = 0; j < 3; ++j) ptx::cp_async_16(to + j * 512, from + j * 512, policy_);
    if (kPerGroup && lane_ < 2) {
      ptx::cp_async_16(to + kRecordBytes, tile.from + tile.blocks * kRecordBytes + record * kRecordScaleBytes, policy_);
    }
    if (++fetch_block_ < blocks_) return;
    fetch_block_ = 0;
    advance(fetch_tile_);
    if constexpr (kTwoTiles) advance(next_fetch_tile_);
  }

  // All threads together: the codes and scales of a step's groups, [warps_k][token tiles].
  __device__ void fetch_activations(int stage) {
    constexpr int kTileVectors = kTileGroupBytes / 16;
    constexpr int kVectors = kC.warps_k * kC.token_tiles * kTileVectors;
    const uint32_t to = ptx::shared_address(act_ring_ + stage * kC.act_step_bytes(kPerGroup));
#pragma unroll
    for (int i = 0; i < (kVectors + kC.threads() - 1) / kC.threads(); ++i) {
      const int vector = i * kC.threads() + static_cast<int>(threadIdx.x);
      const int tile = vector / kTileVectors % kC.token_tiles;
      const int group = act_fetch_group_ + vector / (kTileVectors * kC.token_tiles);
      if (vector < kVectors && group < p_.groups && tile < tiles_) {
        ptx::cp_async_16(to + vector * 16, tile_of(group, tile) + vector % kTileVectors * 16);
      }
    }
    if constexpr (kPerGroup) {
      constexpr int kScaleVectors = kC.warps_k * kC.token_tiles * 2;
      static_assert(kScaleVectors <= kC.threads(), "one vector of scales a thread");
      const int vector = static_cast<int>(threadIdx.x);
      const int tile = vector / 2 % kC.token_tiles;
      const int group = act_fetch_group_ + vector / (2 * kC.token_tiles);
      if (vector < kScaleVectors && group < p_.groups && tile < tiles_) {
        ptx::cp_async_16(to + (kVectors + vector) * 16, scales_of(group, tile) + vector % 2 * 4);
      }
    }
    act_fetch_group_ += kC.warps_k;
  }

  // This thread block's activations.
  __device__ const uint8_t* tile_of(int group, int tile) const {
    return p_.codes + (group * p_.token_tiles + first_tile_ + tile) * kTileGroupBytes;
  }
  __device__ const float* scales_of(int group, int tile) const {
    return p_.act_scales + (group * p_.token_tiles + first_tile_ + tile) * kTokenTile;
  }

  // ---- Work ----

  // A group's activations: word c of a token tile has the codes of chunk c, this lane's column.
  struct Activations {
    uint32_t codes[kC.token_tiles][8];
    float2 scales[kC.token_tiles];
  };

  // Each warp by itself: as soon as a record has been used, the copy of another one takes its place.
  __device__ void add_up_alone() {
    // Weights do not depend on the kernel before this one; activations do.
    // One at a time: memory is busy all the same, and answers the quantizer, which is at work meanwhile, sooner.
    for (int i = 0; i < kC.slots; ++i) {
      ptx::cp_async_wait<0>();
      fetch_record(i);
      ptx::cp_async_commit();
    }
    ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    constexpr bool kAhead = kC.act_ahead();
    Activations now{}, next{};
    if (kAhead && steps_ > 0) load_activations(next);
    int slot = 0;
    for (int step = 0; step < steps_; ++step) {
      if constexpr (kAhead) {
        now = next;
        group_ += kC.warps_k;
        if (step + 1 < steps_) load_activations(next);
      } else {
        load_activations(now);
        group_ += kC.warps_k;
      }
      if constexpr (kC.product != Product::kS8) transpose_bits(now.codes[0]);
#pragma unroll
      for (int b = 0; b < kC.blocks; ++b) {
        if (b >= blocks_) break;
        ptx::cp_async_wait<kC.slots - 1>();
        __syncwarp();
        multiply(b, ring_ + slot * kSlotBytes, now);
        __syncwarp();
        fetch_record(slot);
        ptx::cp_async_commit();  // an empty group too, so that counts stay right
        slot = slot + 1 == kC.slots ? 0 : slot + 1;
      }
    }
  }

  // All warps in step, for they share the activations.
  __device__ void add_up_together(int steps) {
    constexpr int kStages = kC.stages();
    const auto fetch_weights = [&](int stage) {
      for (int b = 0; b < blocks_; ++b) fetch_record(stage * kC.blocks + b);
    };
    for (int i = 0; i < kStages - 1; ++i) fetch_weights(i);
    ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < steps) fetch_activations(i);
      ptx::cp_async_commit();
    }
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();
      if (step < steps_) {
        Activations now;
        read_activations(stage, now);
#pragma unroll
        for (int b = 0; b < kC.blocks; ++b) {
          if (b >= blocks_) break;
          multiply(b, ring_ + (stage * kC.blocks + b) * kSlotBytes, now);
        }
      }
      const int free = stage == 0 ? kStages - 1 : stage - 1;
      fetch_weights(free);
      if (step + kStages - 1 < steps) fetch_activations(free);
      ptx::cp_async_commit();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

  // This warp's group of a step, from shared memory.
  __device__ void read_activations(int stage, Activations& act) const {
    const uint8_t* step = act_ring_ + stage * kC.act_step_bytes(kPerGroup);
    const uint8_t* tiles = step + warp_k_ * kC.token_tiles * kTileGroupBytes;
    const auto* scales = reinterpret_cast<const float*>(step + kC.warps_k * kC.token_tiles * kTileGroupBytes) +
                         warp_k_ * kC.token_tiles * kTokenTile;
#pragma unroll
    for (int t = 0; t < kC.token_tiles; ++t) {
      const uint32_t tile = ptx::shared_address(tiles + t * kTileGroupBytes);
      ptx::ldmatrix_x4(&act.codes[t][0], tile + chunk_offset(lane_ % 8, lane_ / 8));
      ptx::ldmatrix_x4(&act.codes[t][4], tile + chunk_offset(lane_ % 8, lane_ / 8 + 4));
      if (kPerGroup) act.scales[t] = reinterpret_cast<const float2*>(scales + t * kTokenTile)[lane_ % 4];
    }
  }

  // Block b's record times the group's activations.
  __device__ __forceinline__ void multiply(int b, const uint8_t* record, const Activations& act) {
    const auto* vectors = reinterpret_cast<const uint4*>(record) + lane_;
    const uint4 v[3] = {vectors[0], vectors[32], vectors[64]};
    int32_t dots[kC.token_tiles][4];
#pragma unroll
    for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[t][i] = kPerGroup ? 0 : static_cast<int32_t>(acc_[b][t][i]);
    }
    uint32_t low_bits[8], high_bits[8];  // of rows g and g + 8
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t a[4];
      unpack(word(v[0], s), word(v[1], s), word(v[2], s), a);
      if constexpr (kC.product == Product::kS8) {
#pragma unroll
        for (int t = 0; t < kC.token_tiles; ++t) {
          ptx::mma_m16n8k32_s8(dots[t], a, act.codes[t][2 * s], act.codes[t][2 * s + 1]);
        }
      } else {
        low_bits[2 * s] = a[0];
        low_bits[2 * s + 1] = a[2];
        high_bits[2 * s] = a[1];
        high_bits[2 * s + 1] = a[3];
      }
    }
    if constexpr (kC.product != Product::kS8) {
      static_assert(kC.token_tiles == 1, "bits are for few tokens");
      transpose_bits(low_bits);
      transpose_bits(high_bits);
      b1_products<kC.product == Product::kB1A6 ? 6 : 8>(dots[0], low_bits, high_bits, act.codes[0]);
    }
    if constexpr (kPerGroup) {
      const auto* scales = reinterpret_cast<const __half*>(record + kRecordBytes);
      const float low = __half2float(scales[lane_ / 4]);
      const float high = __half2float(scales[lane_ / 4 + 8]);
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
        acc_[b][t][0] += static_cast<float>(dots[t][0]) * (low * act.scales[t].x);
        acc_[b][t][1] += static_cast<float>(dots[t][1]) * (low * act.scales[t].y);
        acc_[b][t][2] += static_cast<float>(dots[t][2]) * (high * act.scales[t].x);
        acc_[b][t][3] += static_cast<float>(dots[t][3]) * (high * act.scales[t].y);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[b][t][i] = dots[t][i];
      }
    }
  }

  // Lanes and tiles of tokens that are not there keep zeros: what they would read was never written, or is not there.
  __device__ void load_activations(Activations& act) const {
#pragma unroll
    for (int t = 0; t < kC.token_tiles; ++t) {
      if ((first_tile_ + t) * kTokenTile + lane_ / 4 < p_.m) {
        const uint8_t* tile = tile_of(group_, t) + lane_ % 4 * 4;
#pragma unroll
        for (int c = 0; c < 8; ++c)
          act.codes[t][c] = *reinterpret_cast<const uint32_t*>(tile + chunk_offset(lane_ / 4, c));
      }
      if (kPerGroup && t < tiles_) act.scales[t] = reinterpret_cast<const float2*>(scales_of(group_, t))[lane_ % 4];
    }
  }

  // Adds up the warps along K, and writes the tile or, where K is split, this part's sums.
  __device__ void finish() {
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody needs the rings any more
    Sum* mine = sums_ + warp_k_ * kC.sums();
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp_n_ * kC.warp_rows() + b * kRecordRows + lane_ / 4 + i / 2 * 8;
          const int token = t * kTokenTile + lane_ % 4 * 2 + i % 2;
          mine[token * kC.rows() + row] = acc_[b][t][i];
        }
      }
    }
    __syncthreads();
    const int64_t tile = static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
    const int rows = kC.warps_n * p_.blocks * kRecordRows;  // of kC.rows() at most
    Sum* partials =
        static_cast<Sum*>(p_.partials) + (blockIdx.y * static_cast<int64_t>(gridDim.z) * gridDim.x + tile) * kC.sums();
    for (int i = static_cast<int>(threadIdx.x); i < tiles_ * kTokenTile * kC.rows(); i += kC.threads()) {
      Sum sum = sums_[i];
#pragma unroll
      for (int k = 1; k < kC.warps_k; ++k) sum += sums_[k * kC.sums() + i];
      if (gridDim.y > 1) {
        partials[i] = sum;
      } else if (i % kC.rows() < rows) {
        write<kPerGroup>(p_, static_cast<int64_t>(blockIdx.x) * rows + i % kC.rows(),
                         first_tile_ * kTokenTile + i / kC.rows(), sum);
      }
    }
  }

  const Params& p_;
  int lane_, warp_n_, warp_k_;
  uint8_t* ring_;
  uint8_t* act_ring_;
  Sum* sums_;
  int blocks_;  // of 16 rows that there are
  int steps_;   // with a group for this warp
  int group_;   // the next one whose activations are wanted
  // Where the copies are.
  TileOfRecords fetch_tile_, next_fetch_tile_;
  int in_tile_;
  int fetch_block_, fetches_left_, act_fetch_group_;
  uint64_t policy_;
  int64_t first_tile_;  // of tokens
  int tiles_;
  Sum acc_[kC.blocks][kC.token_tiles][4];
};

template <int kConfig, bool kPerGroup>
__global__ void __launch_bounds__(kConfigs[kConfig].threads(), kConfigs[kConfig].ctas_per_sm)
    gemm_mma_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  Kernel<kConfig, kPerGroup>(params, shared).run();
}

constexpr int kReduceThreads = 128;

// Adds up the parts of K, first to last.
template <bool kPerGroup>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ Params p, int tile_rows, int tile_tokens, int64_t row_tiles, int64_t tiles,
                  int splits) {
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int sums = tile_rows * tile_tokens;
  const int64_t tile = index / sums;
  const int i = static_cast<int>(index % sums);
  const int64_t row = tile % row_tiles * tile_rows + i % tile_rows;
  const int64_t token = tile / row_tiles * tile_tokens + i / tile_rows;
  if (tile >= tiles || row >= p.n || token >= p.m) return;
  const Sum* partials = static_cast<const Sum*>(p.partials) + index;
  Sum sum = 0;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += __ldcg(partials + split * tiles * sums);
  write<kPerGroup>(p, row, token, sum);
}

using KernelFunction = void (*)(Params);

template <bool kPerGroup, size_t... kConfig>
std::array<KernelFunction, sizeof...(kConfig)> kernels_of(std::index_sequence<kConfig...>) {
  return {gemm_mma_kernel<static_cast<int>(kConfig), kPerGroup>...};
}

template <bool kPerGroup>
KernelFunction kernel_of(int config) {
  return kernels_of<kPerGroup>(std::make_index_sequence<std::size(kConfigs)>{})[static_cast<size_t>(config)];
}

int64_t row_tiles_of(const Config& c, const flexq_weight_desc& desc, int blocks) {
  return ceil_div(num_row_blocks(desc), c.warps_n * blocks);
}

int64_t token_tiles_of(const Config& c, int64_t m) { return ceil_div(m, c.tokens()); }

const char* product_name(Product product) { return product == Product::kS8 ? "s8" : "b1"; }

}  // namespace

int num_mma_configs() { return kNumConfigs; }

MmaShape mma_shape(int config) {
  const Config& c = kConfigs[config];
  const int act_bits = c.product == Product::kB1A6 ? 6 : c.product == Product::kB1A8 ? 8 : 0;
  return {
      product_name(c.product), act_bits,  c.warps_n,   c.shared_act ? c.blocks : c.blocks / 2 + 1, c.blocks, c.tokens(),
      c.ctas_per_sm,           c.warps_k, c.shared_act};
}

size_t mma_workspace_size(int config, const flexq_weight_desc& desc, int64_t m, int splits) {
  const Config& c = kConfigs[config];
  if (splits == 1) return 0;
  return align_up(static_cast<size_t>(splits * row_tiles_of(c, desc, c.blocks) * token_tiles_of(c, m) * c.sums() * 4));
}

void gemm_mma(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan) {
  const Config& c = kConfigs[plan.config];
  const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
  const ActivationLayout act(args.act);
  const int64_t groups = num_groups(args.desc.k);
  const auto* records = static_cast<const uint8_t*>(args.prepacked);
  const auto* codes = static_cast<const uint8_t*>(args.quantized);
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
      .n = args.desc.n,
      .row_blocks = num_row_blocks(args.desc),
      .blocks = plan.blocks,
      .groups = static_cast<int>(groups),
      .steps = static_cast<int>(ceil_div(groups, c.warps_k)),
      .m = args.act.m,
      .token_tiles = act.tiles,
      .partials = args.workspace,
  };
  const int64_t row_tiles = row_tiles_of(c, args.desc, plan.blocks), token_tiles = token_tiles_of(c, args.act.m);
  const KernelFunction kernel = per_group ? kernel_of<true>(plan.config) : kernel_of<false>(plan.config);
  constexpr int64_t kMaxGridZ = 65535;
  if (token_tiles > kMaxGridZ) {
    fail(FLEXQ_UNSUPPORTED, "at most ", kMaxGridZ * c.tokens(), " tokens at once on this GPU, got ", args.act.m);
  }
  Launch how{.grid = dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(plan.splits),
                          static_cast<unsigned>(token_tiles)),
             .block = dim3(static_cast<unsigned>(c.threads())),
             .shared_bytes = static_cast<size_t>(c.shared_bytes(per_group)),
             .overlapped = device.has_sm90};
  if (device.has_sm90) {
    // The next GEMM's thread blocks come while these are at work.
    const int64_t share = ceil_div(row_tiles * token_tiles * plan.splits, device.num_sms);
    claim_share(how, share, clusters_at_once(kernel, how) / device.num_sms);
  }
  launch(stream, "gemm_mma", kernel, how, params);
  if (plan.splits == 1) return;
  const int64_t tiles = row_tiles * token_tiles;
  launch(stream, "gemm_mma reduction", per_group ? reduce_kernel<true> : reduce_kernel<false>,
         {.grid = dim3(static_cast<unsigned>(ceil_div(tiles * c.sums(), kReduceThreads))),
          .block = dim3(kReduceThreads),
          .overlapped = device.has_sm90},
         params, c.rows(), c.tokens(), row_tiles, tiles, plan.splits);
}

}  // namespace flexq::cuda
