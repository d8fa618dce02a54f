// y = x * w^T for up to 32 tokens by int8 tensor cores (mma.sync, sm_80 and later).
//
// At this size the time is that of reading the weights, so everything serves the memory: each warp keeps its own ring
// of cp.async copies in shared memory and reads back only what it copied itself, and codes become int8 fragments with
// nine instructions for 16 of them. A thread block has a tile of rows and all of K or, where N alone does not fill the
// GPU, a part of it; the parts are added up by a second kernel in a fixed order, so that every run gives the same bits.
// Where tiles are few rows and activations few tokens, each warp loads its own activations; elsewhere that would be
// more traffic than the weights, and the thread block copies them to shared memory once for all of its warps.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <type_traits>
#include <utility>

#include "core/error.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda {
namespace {

struct Config {
  int token_tiles;  // of 8 tokens
  int warps_n;      // warps side by side along N
  int warps_k;      // warps that share the groups of a tile's K
  int blocks;       // of 16 rows a warp works on, sharing its activations
  int stages;       // of the ring of copies
  int ctas_per_sm;
  bool shared_act;  // activations go through shared memory too, read once for all warps side by side

  constexpr int threads() const { return 32 * warps_n * warps_k; }
  constexpr int tokens() const { return kTokenTile * token_tiles; }
  constexpr int warp_rows() const { return kRecordRows * blocks; }
  constexpr int rows() const { return warp_rows() * warps_n; }
  constexpr int stage_bytes(bool per_group) const {
    return blocks * (kRecordBytes + (per_group ? kRecordScaleBytes : 0));
  }
  constexpr int ring_bytes(bool per_group) const { return warps_n * warps_k * stages * stage_bytes(per_group); }
  constexpr int act_step_bytes(bool per_group) const {
    return warps_k * token_tiles * (kTileGroupBytes + (per_group ? kTokenTile * 4 : 0));
  }
  constexpr int act_ring_bytes(bool per_group) const { return shared_act ? stages * act_step_bytes(per_group) : 0; }
  constexpr int sums() const { return rows() * tokens(); }
  constexpr int shared_bytes(bool per_group) const {
    const int rings = ring_bytes(per_group) + act_ring_bytes(per_group);
    return std::max(rings, warps_k * sums() * 4);  // the sums go where the rings were
  }
};

// By tokens, then by rows. A launch takes the first row that holds M and whose tiles all fit on the GPU at once, or the
// last that holds M (pick_config). Measured on an H200; see docs/performance.md.
constexpr Config kConfigs[] = {
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 1, .stages = 3, .ctas_per_sm = 4, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 2, .stages = 3, .ctas_per_sm = 3, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 2, .warps_k = 4, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 2, .warps_n = 4, .warps_k = 2, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 2, .warps_n = 8, .warps_k = 1, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 3, .warps_n = 1, .warps_k = 8, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 3, .warps_n = 4, .warps_k = 2, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 3, .warps_n = 8, .warps_k = 1, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 4, .warps_n = 1, .warps_k = 8, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 4, .warps_n = 4, .warps_k = 2, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 4, .warps_n = 8, .warps_k = 1, .blocks = 2, .stages = 3, .ctas_per_sm = 2, .shared_act = true},
};

struct Params {
  const uint8_t* records;
  const uint16_t* scales;  // of the records, fp16
  const uint8_t* codes;    // of the pass's first token tile
  const float* act_scales;
  const void* bias;
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  int64_t n;
  int64_t row_blocks;
  int groups;
  int steps;  // of a tile: ceil(groups / warps_k)
  int tokens;
  void* partials;  // [splits][tiles][sums], where K is split
  bool overlapped;
};

__device__ inline float load_float(const void* p, flexq_dtype dtype, int64_t i) {
  if (dtype == FLEXQ_F32) return static_cast<const float*>(p)[i];
  if (dtype == FLEXQ_F16) return __half2float(static_cast<const __half*>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}

__device__ inline void store_float(void* p, flexq_dtype dtype, int64_t i, float value) {
  if (dtype == FLEXQ_F32) {
    static_cast<float*>(p)[i] = value;
  } else if (dtype == FLEXQ_F16) {
    static_cast<__half*>(p)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(value);
  }
}

// The A fragment of k step s from the lane's three vectors (layout.h).
__device__ inline void unpack(uint32_t b0, uint32_t b1, uint32_t b2, uint32_t (&a)[4]) {
  a[0] = b0 & 0xfcfcfcfcu;
  a[1] = b1 & 0xfcfcfcfcu;
  a[2] = b2 & 0xfcfcfcfcu;
  a[3] = (b0 << 6 & 0xc0c0c0c0u) | (b1 << 4 & 0x30303030u) | (b2 << 2 & 0x0c0c0c0cu);
}

// Scales a sum, adds the bias, rounds and stores it.
template <bool kPerGroup, typename Sum>
__device__ void write(const Params& p, int64_t row, int token, Sum sum) {
  if (row >= p.n) return;
  float value = static_cast<float>(sum) * (1.0f / kCodeFactor);
  if constexpr (!kPerGroup) value *= __half2float(reinterpret_cast<const __half*>(p.scales)[row]) * p.act_scales[token];
  if (p.bias != nullptr) value += load_float(p.bias, p.bias_dtype, row);
  store_float(p.y, p.y_dtype, token * p.ldy + row, value);
}

template <int kConfig, bool kPerGroup>
class Kernel {
 public:
  static constexpr Config kC = kConfigs[kConfig];
  static constexpr int kStageBytes = kC.stage_bytes(kPerGroup);
  // Sums of a tile: fp32 of scaled groups, or int32 over all of K.
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;

  __device__ Kernel(const Params& params, uint8_t* shared)
      : p_(params),
        lane_(threadIdx.x % 32),
        warp_n_(threadIdx.x / 32 / kC.warps_k),
        warp_k_(threadIdx.x / 32 % kC.warps_k) {
    ring_ = shared + static_cast<int>(threadIdx.x / 32) * kC.stages * kStageBytes;
    act_ring_ = shared + kC.ring_bytes(kPerGroup);
    sums_ = reinterpret_cast<Sum*>(shared);
  }

  __device__ void run() {
    const int begin = part_begin(blockIdx.y);
    const int end = part_begin(blockIdx.y + 1);
    start(begin);
    fetches_left_ = end - begin;
    act_fetches_left_ = end - begin;
    // Weights do not depend on the kernel before this one; activations do.
    for (int i = 0; i < kC.stages - 1; ++i) {
      fetch_weights(i);
      if (!kC.shared_act) ptx::cp_async_commit();
    }
    if (p_.overlapped) ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    if (kC.shared_act) {
      for (int i = 0; i < kC.stages - 1; ++i) {
        fetch_activations(i);
        ptx::cp_async_commit();
      }
    }
    int stage = 0;
    for (int step = begin; step < end; ++step) {
      accumulate(stage);
      const int free = stage == 0 ? kC.stages - 1 : stage - 1;
      fetch_weights(free);
      if (kC.shared_act) fetch_activations(free);
      ptx::cp_async_commit();  // an empty group too, so that counts stay right
      stage = stage + 1 == kC.stages ? 0 : stage + 1;
    }
    finish();
  }

 private:
  // The steps of part i of K.
  __device__ int part_begin(int i) const {
    return static_cast<int>(static_cast<int64_t>(p_.steps) * i / static_cast<int>(gridDim.y));
  }

  __device__ void start(int step) {
    const int64_t block = (static_cast<int64_t>(blockIdx.x) * kC.warps_n + warp_n_) * kC.blocks;
    blocks_ = static_cast<int>(min(static_cast<int64_t>(kC.blocks), max(p_.row_blocks - block, int64_t{0})));
    group_ = fetch_group_ = step * kC.warps_k + warp_k_;
    act_fetch_group_ = step * kC.warps_k;
    fetch_records_ = p_.records + (block * p_.groups + group_) * kRecordBytes + lane_ * 16;
    // Two lanes a block: its 32 bytes of scales.
    fetch_scales_ = reinterpret_cast<const uint8_t*>(p_.scales) +
                    ((block + lane_ / 2) * p_.groups + group_) * kRecordScaleBytes + lane_ % 2 * 16;
    codes_ = p_.codes + static_cast<int64_t>(group_) * kTileGroupBytes + lane_ * 16;
    act_scales_ = p_.act_scales + static_cast<int64_t>(group_) * kTokenTile + lane_ % 4 * 2;
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[b][t][i] = 0;
      }
    }
  }

  // ---- Copies, running stages - 1 steps ahead of the work ----

  // This warp's records of a step.
  __device__ void fetch_weights(int stage) {
    if (fetches_left_-- <= 0) return;
    if (fetch_group_ < p_.groups) {
      const uint32_t to = ptx::shared_address(ring_ + stage * kStageBytes) + lane_ * 16;
#pragma unroll
      for (int b = 0; b < kC.blocks; ++b) {
        if (b < blocks_) {
          const uint8_t* record = fetch_records_ + static_cast<int64_t>(b) * p_.groups * kRecordBytes;
#pragma unroll
          for (int j = 0; j < 3; ++j) ptx::cp_async_16(to + b * kRecordBytes + j * 512, record + j * 512);
        }
      }
      if (kPerGroup && lane_ < 2 * blocks_) ptx::cp_async_16(to + kC.blocks * kRecordBytes, fetch_scales_);
    }
    fetch_group_ += kC.warps_k;
    fetch_records_ += kC.warps_k * kRecordBytes;
    fetch_scales_ += kC.warps_k * kRecordScaleBytes;
  }

  // All threads together: the codes and scales of a step's groups, [warps_k][token tiles].
  __device__ void fetch_activations(int stage) {
    if (act_fetches_left_-- <= 0) return;
    constexpr int kTileVectors = kTileGroupBytes / 16;
    constexpr int kVectors = kC.warps_k * kC.token_tiles * kTileVectors;
    const uint32_t to = ptx::shared_address(act_ring_ + stage * kC.act_step_bytes(kPerGroup));
#pragma unroll
    for (int i = 0; i < (kVectors + kC.threads() - 1) / kC.threads(); ++i) {
      const int vector = i * kC.threads() + static_cast<int>(threadIdx.x);
      const int tile = vector / kTileVectors % kC.token_tiles;
      const int group = act_fetch_group_ + vector / (kTileVectors * kC.token_tiles);
      if (vector < kVectors && group < p_.groups && tile * kTokenTile < p_.tokens) {
        const uint8_t* from = p_.codes + (static_cast<int64_t>(tile) * p_.groups + group) * kTileGroupBytes;
        ptx::cp_async_16(to + vector * 16, from + vector % kTileVectors * 16);
      }
    }
    if constexpr (kPerGroup) {
      constexpr int kScaleVectors = kC.warps_k * kC.token_tiles * 2;
      static_assert(kScaleVectors <= kC.threads(), "one vector of scales a thread");
      const int vector = static_cast<int>(threadIdx.x);
      const int tile = vector / 2 % kC.token_tiles;
      const int group = act_fetch_group_ + vector / (2 * kC.token_tiles);
      if (vector < kScaleVectors && group < p_.groups && tile * kTokenTile < p_.tokens) {
        const float* from = p_.act_scales + (static_cast<int64_t>(tile) * p_.groups + group) * kTokenTile;
        ptx::cp_async_16(to + (kVectors + vector) * 16, from + vector % 2 * 4);
      }
    }
    act_fetch_group_ += kC.warps_k;
  }

  // ---- Work ----

  __device__ void accumulate(int stage) {
    const bool active = group_ < p_.groups && blocks_ > 0;
    uint4 act[kC.token_tiles][2] = {};
    float2 act_scale[kC.token_tiles] = {};
    if constexpr (!kC.shared_act) {
      if (active) load_activations(act, act_scale);
    }
    group_ += kC.warps_k;
    codes_ += kC.warps_k * kTileGroupBytes;
    act_scales_ += kC.warps_k * kTokenTile;
    ptx::cp_async_wait<kC.stages - 2>();
    if constexpr (kC.shared_act) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (!active) return;
    if constexpr (kC.shared_act) {
      const uint8_t* step = act_ring_ + stage * kC.act_step_bytes(kPerGroup);
      const uint8_t* tiles = step + warp_k_ * kC.token_tiles * kTileGroupBytes;
      const auto* scales = reinterpret_cast<const float*>(step + kC.warps_k * kC.token_tiles * kTileGroupBytes) +
                           warp_k_ * kC.token_tiles * kTokenTile;
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
        act[t][0] = reinterpret_cast<const uint4*>(tiles + t * kTileGroupBytes)[lane_];
        act[t][1] = reinterpret_cast<const uint4*>(tiles + t * kTileGroupBytes)[lane_ + 32];
        if (kPerGroup) act_scale[t] = reinterpret_cast<const float2*>(scales + t * kTokenTile)[lane_ % 4];
      }
    }
    const uint8_t* records = ring_ + stage * kStageBytes;
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
      if (b >= blocks_) break;
      const auto* vectors = reinterpret_cast<const uint4*>(records + b * kRecordBytes) + lane_;
      const uint4 v[3] = {vectors[0], vectors[32], vectors[64]};
      int32_t dots[kC.token_tiles][4];
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[t][i] = kPerGroup ? 0 : static_cast<int32_t>(acc_[b][t][i]);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t a[4];
        unpack(word(v[0], s), word(v[1], s), word(v[2], s), a);
#pragma unroll
        for (int t = 0; t < kC.token_tiles; ++t) {
          const uint4& half = act[t][s / 2];
          ptx::mma_m16n8k32_s8(dots[t], a, word(half, s % 2 * 2), word(half, s % 2 * 2 + 1));
        }
      }
      if constexpr (kPerGroup) {
        const auto* scales =
            reinterpret_cast<const __half*>(records + kC.blocks * kRecordBytes + b * kRecordScaleBytes);
        const float low = __half2float(scales[lane_ / 4]);
        const float high = __half2float(scales[lane_ / 4 + 8]);
#pragma unroll
        for (int t = 0; t < kC.token_tiles; ++t) {
          acc_[b][t][0] += static_cast<float>(dots[t][0]) * (low * act_scale[t].x);
          acc_[b][t][1] += static_cast<float>(dots[t][1]) * (low * act_scale[t].y);
          acc_[b][t][2] += static_cast<float>(dots[t][2]) * (high * act_scale[t].x);
          acc_[b][t][3] += static_cast<float>(dots[t][3]) * (high * act_scale[t].y);
        }
      } else {
#pragma unroll
        for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc_[b][t][i] = dots[t][i];
        }
      }
    }
  }

  // Lanes and tiles of tokens that are not there keep zeros: what they would read was never written, or is not there.
  __device__ void load_activations(uint4 (&act)[kC.token_tiles][2], float2 (&act_scale)[kC.token_tiles]) const {
#pragma unroll
    for (int t = 0; t < kC.token_tiles; ++t) {
      if (t * kTokenTile + lane_ / 4 < p_.tokens) {
        const uint8_t* tile = codes_ + static_cast<int64_t>(t) * p_.groups * kTileGroupBytes;
        act[t][0] = *reinterpret_cast<const uint4*>(tile);
        act[t][1] = *reinterpret_cast<const uint4*>(tile + 512);
      }
      if (kPerGroup && t * kTokenTile < p_.tokens) {
        act_scale[t] = *reinterpret_cast<const float2*>(act_scales_ + static_cast<int64_t>(t) * p_.groups * kTokenTile);
      }
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
    Sum* partials =
        static_cast<Sum*>(p_.partials) + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kC.sums();
    for (int i = static_cast<int>(threadIdx.x); i < p_.tokens * kC.rows(); i += kC.threads()) {
      Sum sum = sums_[i];
#pragma unroll
      for (int k = 1; k < kC.warps_k; ++k) sum += sums_[k * kC.sums() + i];
      if (gridDim.y > 1) {
        partials[i] = sum;
      } else {
        write<kPerGroup>(p_, static_cast<int64_t>(blockIdx.x) * kC.rows() + i % kC.rows(), i / kC.rows(), sum);
      }
    }
  }

  static __device__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

  const Params& p_;
  int lane_, warp_n_, warp_k_;
  uint8_t* ring_;
  uint8_t* act_ring_;
  Sum* sums_;
  int blocks_;  // of 16 rows that there are
  // Where the copies and the work are.
  const uint8_t* fetch_records_;
  const uint8_t* fetch_scales_;
  int fetch_group_, fetches_left_, act_fetch_group_, act_fetches_left_;
  const uint8_t* codes_;
  const float* act_scales_;
  int group_;
  Sum acc_[kC.blocks][kC.token_tiles][4];
};

template <int kConfig, bool kPerGroup>
__global__ void __launch_bounds__(kConfigs[kConfig].threads(), kConfigs[kConfig].ctas_per_sm)
    gemm_s8_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  Kernel<kConfig, kPerGroup>(params, shared).run();
}

constexpr int kReduceThreads = 128;

// Adds up the parts of K, first to last.
template <bool kPerGroup>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ Params p, int tile_rows, int sums, int64_t tiles, int splits) {
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int per_tile = tile_rows * p.tokens;
  const int64_t tile = index / per_tile;
  const int i = static_cast<int>(index % per_tile);
  if (tile >= tiles) return;
  const Sum* partials = static_cast<const Sum*>(p.partials) + tile * sums + i;
  Sum sum = 0;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += __ldcg(partials + split * tiles * sums);
  write<kPerGroup>(p, tile * tile_rows + i % tile_rows, i / tile_rows, sum);
}

using KernelFunction = void (*)(Params);

template <bool kPerGroup, size_t... kConfig>
std::array<KernelFunction, sizeof...(kConfig)> kernels_of(std::index_sequence<kConfig...>) {
  return {gemm_s8_kernel<static_cast<int>(kConfig), kPerGroup>...};
}

template <bool kPerGroup>
KernelFunction kernel_of(int config) {
  return kernels_of<kPerGroup>(std::make_index_sequence<std::size(kConfigs)>{})[static_cast<size_t>(config)];
}

int64_t tiles_of(const Config& c, const flexq_weight_desc& desc) {
  return ceil_div(num_row_blocks(desc), c.warps_n * c.blocks);
}

// How full the GPU is over the waves that the tiles take; one wave counts as full, since its thread blocks share the
// memory's bandwidth however many they are.
double fullness(const Config& c, const flexq_weight_desc& desc, int num_sms) {
  const int64_t slots = static_cast<int64_t>(num_sms) * c.ctas_per_sm;
  const int64_t tiles = tiles_of(c, desc);
  const int64_t waves = ceil_div(tiles, slots);
  return waves <= 1 ? 1.0 : static_cast<double>(tiles) / static_cast<double>(waves * slots);
}

int pick_config(const flexq_weight_desc& desc, int64_t tokens, int num_sms) {
  constexpr double kFullEnough = 0.8;
  int best = -1;
  for (int i = 0; i < static_cast<int>(std::size(kConfigs)); ++i) {
    const Config& c = kConfigs[i];
    if (c.tokens() < tokens || (best >= 0 && c.token_tiles > kConfigs[best].token_tiles)) continue;
    best = i;
    // Activations of more than 8 tokens are worth sharing among as many rows as a single wave allows.
    const double enough = c.token_tiles == 1 ? kFullEnough : 1.0;
    if (fullness(c, desc, num_sms) >= enough) break;
  }
  return best;
}

}  // namespace

GemmPlan plan_gemm_s8(const Device& device, const flexq_weight_desc& desc, int64_t m) {
  const int config = pick_config(desc, std::min<int64_t>(m, kMaxTokensPerPass), device.num_sms);
  const Config& c = kConfigs[config];
  const int64_t tiles = tiles_of(c, desc);
  const int64_t steps = ceil_div(num_groups(desc.k), c.warps_k);
  // Splitting K costs a second kernel: only where tiles leave a good part of the GPU idle.
  const bool idle = 4 * tiles < 3 * device.num_sms;
  const int64_t slots = static_cast<int64_t>(device.num_sms) * c.ctas_per_sm;
  const int64_t splits = idle ? std::max<int64_t>(1, std::min(steps, slots / tiles)) : 1;
  const int64_t partials = splits > 1 ? splits * tiles * c.sums() * 4 : 0;
  return {config, tiles, static_cast<int>(splits), align_up(static_cast<size_t>(partials))};
}

void gemm_s8(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan, int64_t token_begin,
             int64_t tokens, bool overlapped) {
  const Config& c = kConfigs[plan.config];
  const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
  const int64_t groups = num_groups(args.desc.k);
  const int64_t token_tile = token_begin / kTokenTile;
  const auto* records = static_cast<const uint8_t*>(args.prepacked);
  const auto* codes = static_cast<const uint8_t*>(args.quantized);
  const auto* act_scales = reinterpret_cast<const float*>(codes + ActivationLayout(args.act).scales);
  const Params params{
      .records = records,
      .scales = reinterpret_cast<const uint16_t*>(records + WeightLayout(args.desc).scales),
      .codes = codes + token_tile * groups * kTileGroupBytes,
      .act_scales = act_scales + (per_group ? token_tile * groups * kTokenTile : token_begin),
      .bias = args.bias,
      .bias_dtype = args.bias_dtype,
      .y = static_cast<uint8_t*>(args.y) + token_begin * args.ldy * (args.y_dtype == FLEXQ_F32 ? 4 : 2),
      .y_dtype = args.y_dtype,
      .ldy = args.ldy,
      .n = args.desc.n,
      .row_blocks = num_row_blocks(args.desc),
      .groups = static_cast<int>(groups),
      .steps = static_cast<int>(ceil_div(groups, c.warps_k)),
      .tokens = static_cast<int>(tokens),
      .partials = args.workspace,
      .overlapped = overlapped,
  };
  const KernelFunction kernel = per_group ? kernel_of<true>(plan.config) : kernel_of<false>(plan.config);
  const int shared = c.shared_bytes(per_group);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "gemm_s8 shared memory");
  launch(stream, "gemm_s8", kernel,
         {.grid = dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)),
          .block = dim3(static_cast<unsigned>(c.threads())),
          .shared_bytes = static_cast<size_t>(shared),
          .overlapped = overlapped && device.has_sm90},
         params);
  if (plan.splits == 1) return;
  launch(stream, "gemm_s8 reduction", per_group ? reduce_kernel<true> : reduce_kernel<false>,
         {.grid = dim3(static_cast<unsigned>(ceil_div(plan.tiles * c.rows() * tokens, kReduceThreads))),
          .block = dim3(kReduceThreads),
          .overlapped = device.has_sm90},
         params, c.rows(), c.sums(), plan.tiles, plan.splits);
}

}  // namespace flexq::cuda
