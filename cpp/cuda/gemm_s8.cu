// y = x * w^T for up to 32 tokens by int8 tensor cores (mma.sync, sm_80 and later).
//
// At this size the time is that of reading the weights, so everything serves the memory: each warp keeps its own ring
// of cp.async copies in shared memory, with no barrier between warps, and reads back only what it copied itself. Codes
// become int8 fragments with nine instructions for 16 of them, activations come through L1 in fragment order, and all
// of K x N is cut into equal shares, one for each resident thread block ("stream-K"), so that no wave is half empty.
// Where a tile of rows is shared between thread blocks, each leaves its partial sums in the workspace and the last one
// to finish adds them in a fixed order: the same bits on every run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "core/error.h"
#include "cuda/kernels.h"
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

  constexpr int threads() const { return 32 * warps_n * warps_k; }
  constexpr int tokens() const { return kTokenTile * token_tiles; }
  constexpr int warp_rows() const { return kRecordRows * blocks; }
  constexpr int rows() const { return warp_rows() * warps_n; }
  constexpr int stage_bytes(bool per_group) const { return blocks * record_bytes(per_group); }
  constexpr int ring_bytes(bool per_group) const { return warps_n * warps_k * stages * stage_bytes(per_group); }
  constexpr int sums() const { return rows() * tokens(); }
  constexpr int shared_bytes(bool per_group) const { return ring_bytes(per_group) + warps_k * sums() * 4; }
};

// One row a tile size in tokens; the launch picks the first that holds M.
constexpr Config kConfigs[] = {
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 2, .stages = 4, .ctas_per_sm = 2},
    {.token_tiles = 2, .warps_n = 2, .warps_k = 4, .blocks = 2, .stages = 4, .ctas_per_sm = 2},
    {.token_tiles = 3, .warps_n = 4, .warps_k = 2, .blocks = 2, .stages = 3, .ctas_per_sm = 2},
    {.token_tiles = 4, .warps_n = 4, .warps_k = 2, .blocks = 2, .stages = 3, .ctas_per_sm = 2},
};

struct Params {
  const uint8_t* records;
  const uint16_t* channel_scales;
  const uint8_t* codes;  // of the pass's first token tile
  const float* act_scales;
  const void* bias;
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  int64_t n;
  int64_t groups;
  int64_t row_blocks;
  int64_t steps;  // of a tile: ceil(groups / warps_k)
  int64_t units;  // tiles * steps
  int tokens;
  int32_t* counters;
  void* partials;  // [thread block][2][sums]
  bool overlapped;
};

// Thread block c's share of the units. 64-bit products: units * thread blocks stays far below 2^63.
__host__ __device__ inline int64_t share_begin(int64_t units, int64_t c, int64_t ctas) { return units * c / ctas; }
// The thread block whose share holds unit u.
__device__ inline int64_t share_of(int64_t units, int64_t u, int64_t ctas) { return ((u + 1) * ctas - 1) / units; }

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

template <int kConfig, bool kPerGroup>
class Kernel {
 public:
  static constexpr Config kC = kConfigs[kConfig];
  static constexpr int kStageBytes = kC.stage_bytes(kPerGroup);
  static constexpr int kRecord = record_bytes(kPerGroup);
  // Sums of a tile: fp32 of scaled groups, or int32 over all of K.
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;

  __device__ Kernel(const Params& params, uint8_t* shared)
      : p_(params),
        lane_(threadIdx.x % 32),
        warp_n_(threadIdx.x / 32 / kC.warps_k),
        warp_k_(threadIdx.x / 32 % kC.warps_k) {
    ring_ = shared + static_cast<int>(threadIdx.x / 32) * kC.stages * kStageBytes;
    sums_ = reinterpret_cast<Sum*>(shared + kC.ring_bytes(kPerGroup));
    unit_end_ = share_begin(p_.units, blockIdx.x + 1, gridDim.x);
    fetch_unit_ = share_begin(p_.units, blockIdx.x, gridDim.x);
    fetch_tile_ = fetch_unit_ / p_.steps;
    fetch_step_ = fetch_unit_ % p_.steps;
  }

  __device__ void run() {
    const int64_t begin = fetch_unit_;
    const int64_t first_tile = fetch_tile_;
    int64_t tile = first_tile;
    int64_t step = fetch_step_;
    for (int i = 0; i < kC.stages - 1; ++i) fetch(i);
    // Weights do not depend on the kernel before this one; activations and counters do.
    if (p_.overlapped) ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    clear();
    int stage = 0;
    bool whole = step == 0;
    for (int64_t unit = begin; unit < unit_end_; ++unit) {
      accumulate(tile, step, stage);
      fetch(stage == 0 ? kC.stages - 1 : stage - 1);
      stage = stage + 1 == kC.stages ? 0 : stage + 1;
      if (++step == p_.steps || unit + 1 == unit_end_) {
        whole = whole && step == p_.steps;
        finish(tile, whole, tile == first_tile);
        clear();
        step = 0;
        whole = true;
        ++tile;
      }
    }
  }

 private:
  // Starts the copy of the next unit's records, if there is one; always a group of copies, so that counts stay right.
  __device__ void fetch(int stage) {
    if (fetch_unit_ < unit_end_) {
      const int64_t group = fetch_step_ * kC.warps_k + warp_k_;
      const int64_t block = (fetch_tile_ * kC.warps_n + warp_n_) * kC.blocks;
      if (group < p_.groups) {
#pragma unroll
        for (int b = 0; b < kC.blocks; ++b) {
          if (block + b >= p_.row_blocks) break;
          const uint8_t* record = p_.records + ((block + b) * p_.groups + group) * kRecord;
          const uint32_t to = ptx::shared_address(ring_ + stage * kStageBytes + b * kRecord);
#pragma unroll
          for (int j = 0; j < 3; ++j) ptx::cp_async_16(to + (j * 32 + lane_) * 16, record + (j * 32 + lane_) * 16);
          if (kPerGroup && lane_ < kRecordScaleBytes / 16) {
            ptx::cp_async_16(to + kRecordCodeBytes + lane_ * 16, record + kRecordCodeBytes + lane_ * 16);
          }
        }
      }
      ++fetch_unit_;
      if (++fetch_step_ == p_.steps) {
        fetch_step_ = 0;
        ++fetch_tile_;
      }
    }
    ptx::cp_async_commit();
  }

  __device__ void accumulate(int64_t tile, int64_t step, int stage) {
    const int64_t group = step * kC.warps_k + warp_k_;
    const int64_t block = (tile * kC.warps_n + warp_n_) * kC.blocks;
    const bool active = group < p_.groups && block < p_.row_blocks;
    uint4 act[kC.token_tiles][2] = {};
    float2 act_scale[kC.token_tiles] = {};
    if (active) {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
        const int64_t at = t * p_.groups + group;
        // Lanes of tokens that are not there keep zeros: what they would read was never written.
        if (t * kTokenTile + lane_ / 4 < p_.tokens) {
          const auto* vectors = reinterpret_cast<const uint4*>(p_.codes + at * kTileGroupBytes) + lane_;
          act[t][0] = vectors[0];
          act[t][1] = vectors[32];
        }
        if (kPerGroup) act_scale[t] = reinterpret_cast<const float2*>(p_.act_scales + at * kTokenTile)[lane_ % 4];
      }
    }
    ptx::cp_async_wait<kC.stages - 2>();
    __syncwarp();
    if (!active) return;
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
      if (block + b >= p_.row_blocks) break;
      const uint8_t* record = ring_ + stage * kStageBytes + b * kRecord;
      const auto* vectors = reinterpret_cast<const uint4*>(record) + lane_;
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
        const auto* scales = reinterpret_cast<const __half*>(record + kRecordCodeBytes);
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

  // Adds up the warps along K, and writes the tile's rows or leaves its partial sums to whoever comes last.
  __device__ void finish(int64_t tile, bool whole, bool first_of_share) {
    __syncthreads();  // the sums of the tile before have been read
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
    if (whole) {
      for (int i = threadIdx.x; i < kC.sums(); i += kC.threads()) write(tile, i, sum_of_warps(i));
      return;
    }
    Sum* slots = static_cast<Sum*>(p_.partials);
    Sum* slot = slots + (blockIdx.x * 2 + (first_of_share ? 0 : 1)) * kC.sums();
    for (int i = threadIdx.x; i < kC.sums(); i += kC.threads()) slot[i] = sum_of_warps(i);
    __threadfence();
    __syncthreads();
    const int64_t first = share_of(p_.units, tile * p_.steps, gridDim.x);
    const int64_t last = share_of(p_.units, (tile + 1) * p_.steps - 1, gridDim.x);
    __shared__ bool is_last;
    if (threadIdx.x == 0) is_last = atomicAdd(p_.counters + tile, 1) == static_cast<int>(last - first);
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) p_.counters[tile] = 0;  // for the next pass
    for (int i = threadIdx.x; i < kC.sums(); i += kC.threads()) {
      Sum sum = 0;
      for (int64_t c = first; c <= last; ++c) {
        // A share's first tile is in slot 0, and any other that it does not finish in slot 1.
        const bool in_first = share_begin(p_.units, c, gridDim.x) / p_.steps == tile;
        sum += __ldcg(slots + (c * 2 + (in_first ? 0 : 1)) * kC.sums() + i);
      }
      write(tile, i, sum);
    }
  }

  __device__ Sum sum_of_warps(int i) const {
    Sum sum = sums_[i];
#pragma unroll
    for (int k = 1; k < kC.warps_k; ++k) sum += sums_[k * kC.sums() + i];
    return sum;
  }

  __device__ void write(int64_t tile, int i, Sum sum) const {
    const int64_t row = tile * kC.rows() + i % kC.rows();
    const int token = i / kC.rows();
    if (row >= p_.n || token >= p_.tokens) return;
    constexpr float kUnit = 1.0f / kCodeFactor;
    float value = static_cast<float>(sum) * kUnit;
    if constexpr (!kPerGroup) {
      value *= __half2float(reinterpret_cast<const __half*>(p_.channel_scales)[row]) * p_.act_scales[token];
    }
    if (p_.bias != nullptr) value += load_float(p_.bias, p_.bias_dtype, row);
    store_float(p_.y, p_.y_dtype, token * p_.ldy + row, value);
  }

  __device__ void clear() {
#pragma unroll
    for (int b = 0; b < kC.blocks; ++b) {
#pragma unroll
      for (int t = 0; t < kC.token_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_[b][t][i] = 0;
      }
    }
  }

  static __device__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

  const Params& p_;
  int lane_, warp_n_, warp_k_;
  uint8_t* ring_;
  Sum* sums_;
  int64_t unit_end_, fetch_unit_, fetch_tile_, fetch_step_;
  Sum acc_[kC.blocks][kC.token_tiles][4];
};

template <int kConfig, bool kPerGroup>
__global__ void __launch_bounds__(kConfigs[kConfig].threads(), kConfigs[kConfig].ctas_per_sm)
    gemm_s8_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) uint8_t shared[];
  Kernel<kConfig, kPerGroup>(params, shared).run();
}

using KernelFunction = void (*)(Params);

template <bool kPerGroup>
KernelFunction kernel_of(int config) {
  static_assert(std::size(kConfigs) == 4);
  constexpr KernelFunction kKernels[] = {gemm_s8_kernel<0, kPerGroup>, gemm_s8_kernel<1, kPerGroup>,
                                         gemm_s8_kernel<2, kPerGroup>, gemm_s8_kernel<3, kPerGroup>};
  return kKernels[config];
}

int config_for(int64_t tokens) {
  int config = 0;
  while (kConfigs[config].tokens() < tokens) ++config;
  return config;
}

}  // namespace

GemmPlan plan_gemm_s8(const flexq_weight_desc& desc, int64_t m, int num_sms) {
  const int config = config_for(std::min<int64_t>(m, kMaxTokensPerPass));
  const Config& c = kConfigs[config];
  const int64_t tiles = ceil_div(num_row_blocks(desc), c.warps_n * c.blocks);
  const int64_t units = tiles * ceil_div(num_groups(desc.k), c.warps_k);
  const int64_t slots = static_cast<int64_t>(num_sms) * c.ctas_per_sm;
  // Whole tiles to each thread block if that keeps nearly all of them busy, else equal shares across tiles.
  constexpr double kBusyEnough = 0.94;
  const int64_t waves = ceil_div(tiles, slots);
  const bool whole = static_cast<double>(tiles) >= kBusyEnough * static_cast<double>(waves * slots);
  const int64_t ctas = whole ? ceil_div(tiles, waves) : std::min(slots, units);
  const bool split = tiles % ctas != 0;
  const size_t counters = split ? align_up(static_cast<size_t>(tiles) * sizeof(int32_t)) : 0;
  const size_t partials = split ? static_cast<size_t>(ctas * 2 * c.sums()) * 4 : 0;
  return {config, static_cast<int>(ctas), tiles, split, counters, counters + align_up(partials)};
}

void gemm_s8(cudaStream_t stream, const GemmArgs& args, const GemmPlan& plan, int64_t token_begin, int64_t tokens,
             bool overlapped) {
  const Config& c = kConfigs[plan.config];
  const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
  const int64_t groups = num_groups(args.desc.k);
  const int64_t steps = ceil_div(groups, c.warps_k);
  const int64_t token_tile = token_begin / kTokenTile;
  const auto* records = static_cast<const uint8_t*>(args.prepacked);
  const auto* codes = static_cast<const uint8_t*>(args.quantized);
  const auto* act_scales = reinterpret_cast<const float*>(codes + ActivationLayout(args.act).scales);
  auto* workspace = static_cast<uint8_t*>(args.workspace);
  Params params{
      .records = records,
      .channel_scales = reinterpret_cast<const uint16_t*>(records + WeightLayout(args.desc).scales),
      .codes = codes + token_tile * groups * kTileGroupBytes,
      .act_scales = act_scales + (per_group ? token_tile * groups * kTokenTile : token_begin),
      .bias = args.bias,
      .bias_dtype = args.bias_dtype,
      .y = static_cast<uint8_t*>(args.y) + token_begin * args.ldy * (args.y_dtype == FLEXQ_F32 ? 4 : 2),
      .y_dtype = args.y_dtype,
      .ldy = args.ldy,
      .n = args.desc.n,
      .groups = groups,
      .row_blocks = num_row_blocks(args.desc),
      .steps = steps,
      .units = plan.tiles * steps,
      .tokens = static_cast<int>(tokens),
      .counters = reinterpret_cast<int32_t*>(workspace),
      .partials = workspace + plan.counters_bytes,
      .overlapped = overlapped,
  };
  const KernelFunction kernel = per_group ? kernel_of<true>(plan.config) : kernel_of<false>(plan.config);
  const int shared = c.shared_bytes(per_group);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "gemm_s8 shared memory");
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(plan.ctas));
  launch.blockDim = dim3(static_cast<unsigned>(c.threads()));
  launch.dynamicSmemBytes = static_cast<size_t>(shared);
  launch.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch.attrs = &attribute;
  launch.numAttrs = overlapped ? 1 : 0;
  check(cudaLaunchKernelEx(&launch, kernel, params), "gemm_s8");
}

}  // namespace flexq::cuda
