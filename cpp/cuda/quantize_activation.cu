// Activations -> int8 codes in tiles (layout.h) and fp32 scales, rotated if the weight is (docs/numerics.md), alone or
// fused with the RMS norm or the SiLU product before it.
//
// Four lanes hold a group of 128, 32 values each, so that five of the rotation's seven stages stay in registers; where
// tokens are so few that latency counts more than instructions, a whole warp holds it, four values a lane.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxTokenThreads = 512;
constexpr int kMaxCluster = 16;

// Matrices that a source has, beside a norm's weight.
constexpr int inputs_of(ActivationSource::Kind kind) { return kind == ActivationSource::kPlain ? 1 : 2; }

struct Args {
  ActivationSource source;
  int64_t m;
  int64_t k;
  int64_t groups;
  int64_t tiles;
  int qmax;
  bool rotate;
  bool per_group;
  bool vectors;  // all rows are aligned for 16 bytes at a time
  int cluster;   // thread blocks that share a tile of tokens, or a token
  bool ahead;    // while they work on one, the next one is copied to shared memory
  uint8_t* codes;
  float* scales;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// What an unfused operation would have stored and read back.
template <typename T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T value[kCount];
};

// A lane's part of a group: kVectors times kCount neighbours. A warp's lane has four neighbours; of four lanes, each
// has every fourth eight.
template <int kLanes>
struct Part {
  static constexpr int kCount = kLanes == 32 ? 4 : 8;
  static constexpr int kVectors = kGroup / kLanes / kCount;
  static constexpr int kValues = kCount * kVectors;

  int lane;  // among those of the group

  __device__ explicit Part(int of_warp) : lane(of_warp % kLanes) {}
  __device__ int k(int vector) const { return kCount * (vector * kLanes + lane); }

  // As they are stored.
  template <typename T>
  struct Stored {
    Vector<T, kCount> vectors[kVectors];

    __device__ float value(int i) const { return to_float(vectors[i / kCount].value[i % kCount]); }
  };

  // Zero past the end of the row.
  template <typename T>
  __device__ Stored<T> load_stored(const Args& a, const void* rows, int64_t ld, int64_t token, int64_t group) const {
    const T* row = static_cast<const T*>(rows) + token * ld;
    Stored<T> stored;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = group * kGroup + k(i);
      if (a.vectors && at + kCount <= a.k) {
        stored.vectors[i] = *reinterpret_cast<const Vector<T, kCount>*>(row + at);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) stored.vectors[i].value[j] = at + j < a.k ? row[at + j] : from_float<T>(0.0f);
      }
    }
    return stored;
  }

  template <typename T>
  __device__ void load(const Args& a, const void* rows, int64_t ld, int64_t token, int64_t group,
                       float (&v)[kValues]) const {
    const Stored<T> stored = load_stored<T>(a, rows, ld, token, group);
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = stored.value(i);
  }

  template <typename T>
  __device__ void save(const Args& a, void* rows, int64_t ld, int64_t token, int64_t group,
                       const float (&v)[kValues]) const {
    T* row = static_cast<T*>(rows) + token * ld;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = group * kGroup + k(i);
      if (a.vectors && at + kCount <= a.k) {
        Vector<T, kCount> vector;
#pragma unroll
        for (int j = 0; j < kCount; ++j) vector.value[j] = from_float<T>(v[i * kCount + j]);
        *reinterpret_cast<Vector<T, kCount>*>(row + at) = vector;
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (at + j < a.k) row[at + j] = from_float<T>(v[i * kCount + j]);
        }
      }
    }
  }

  // The values to quantize, before the rotation; those of a norm still without it.
  template <typename T, ActivationSource::Kind kKind>
  __device__ void load_source(const Args& a, int64_t token, int64_t group, float (&v)[kValues]) const {
    const ActivationSource& s = a.source;
    load<T>(a, s.x, s.ldx, token, group, v);
    if (kKind == ActivationSource::kPlain || s.other == nullptr) return;
    float other[kValues];
    load<T>(a, s.other, s.ld_other, token, group, other);
    fuse<T, kKind>(v, other);
  }

  template <typename T, ActivationSource::Kind kKind>
  static __device__ void fuse(float (&v)[kValues], const float (&other)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if constexpr (kKind == ActivationSource::kSiluMul) {
        v[i] = rounded<T>(rounded<T>(__fdiv_rn(v[i], 1.0f + expf(-v[i]))) * other[i]);
      } else {
        v[i] = rounded<T>(v[i] + other[i]);
      }
    }
  }

  // The same ahead of time: asynchronous copies to this thread's own places in shared memory, vectors of a thread block
  // side by side, from where take_source() has the values once they are there.
  template <typename T>
  static constexpr int kPieces = kValues * static_cast<int>(sizeof(T)) / 16;

  template <typename T, ActivationSource::Kind kKind>
  __device__ void fetch_source(const Args& a, int64_t token, int64_t group, uint4* places) const {
    const ActivationSource& s = a.source;
    fetch<T>(a, s.x, s.ldx, token, group, places);
    if (kKind == ActivationSource::kPlain || s.other == nullptr) return;
    fetch<T>(a, s.other, s.ld_other, token, group, places + kPieces<T> * blockDim.x);
  }

  template <typename T, ActivationSource::Kind kKind>
  __device__ void take_source(const Args& a, const uint4* places, float (&v)[kValues]) const {
    take<T>(places, v);
    if (kKind == ActivationSource::kPlain || a.source.other == nullptr) return;
    float other[kValues];
    take<T>(places + kPieces<T> * blockDim.x, other);
    fuse<T, kKind>(v, other);
  }

  // Zeros past the end of the row, and of all rows.
  template <typename T>
  __device__ void fetch(const Args& a, const void* rows, int64_t ld, int64_t token, int64_t group,
                        uint4* places) const {
    constexpr int kOfPiece = 16 / static_cast<int>(sizeof(T));
    constexpr int kOfVector = kPieces<T> / kVectors;
    const T* row = static_cast<const T*>(rows) + (token < a.m ? token * ld : 0);
    const auto left = static_cast<int>(token < a.m ? min(a.k - group * kGroup, int64_t{kGroup}) : 0);
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      const int at = k(i / kOfVector) + i % kOfVector * kOfPiece;
      const int there = min(max(left - at, 0), kOfPiece);
      ptx::cp_async_16_or_zeros(ptx::shared_address(places + i * blockDim.x),
                                row + (there > 0 ? group * kGroup + at : 0), there * static_cast<int>(sizeof(T)));
    }
  }

  template <typename T>
  __device__ void take(const uint4* places, float (&v)[kValues]) const {
    constexpr int kOfPiece = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kPieces<T>; ++i) {
      const auto piece = *reinterpret_cast<const Vector<T, kOfPiece>*>(places + i * blockDim.x);
#pragma unroll
      for (int j = 0; j < kOfPiece; ++j) v[i * kOfPiece + j] = to_float(piece.value[j]);
    }
  }

  template <int kStride>
  static __device__ void butterflies(float (&v)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i & kStride) continue;
      const float x = v[i], y = v[i + kStride];
      v[i] = x + y;
      v[i + kStride] = x - y;
    }
  }

  // Strides 64 down to 1: the CPU's order, so the same bits.
  __device__ void hadamard(float (&v)[kValues]) const {
    if constexpr (kLanes == 4) {
      butterflies<16>(v);
      butterflies<8>(v);
    }
#pragma unroll
    for (int stride = kLanes / 2; stride > 0; stride /= 2) {
      const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
      for (float& value : v) value = __fmaf_rn(value, sign, __shfl_xor_sync(~0u, value, stride));
    }
    if constexpr (kLanes == 4) butterflies<4>(v);
    butterflies<2>(v);
    butterflies<1>(v);
  }

  // Rotates if asked. The bits of this lane's largest magnitude: floats without their sign order like integers, NaN
  // above all.
  __device__ int rotate_and_max(const Args& a, float (&v)[kValues]) const {
    if (a.rotate) hadamard(v);
    float largest[4] = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) largest[i % 4] = ptx::max_magnitude(largest[i % 4], v[i]);
    return __float_as_int(
        ptx::max_magnitude(ptx::max_magnitude(largest[0], largest[1]), ptx::max_magnitude(largest[2], largest[3])));
  }

  // rint(v * inverse), which no rounding takes past the largest code.
  __device__ void store_codes(const Args& a, int64_t token, int64_t group, const float (&v)[kValues],
                              float inverse) const {
    // 1.5 * 2^23: adding it leaves the nearest integer, two's complement, in the low bits.
    constexpr float kMagic = 12582912.0f;
    const uint32_t any = inverse == 0.0f ? 0u : ~0u;
    uint8_t* tile = a.codes + (group * a.tiles + token / kTokenTile) * kTileGroupBytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vector<uint32_t, kCount / 4> words;
#pragma unroll
      for (int w = 0; w < kCount / 4; ++w) {
        uint32_t bits[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          bits[j] = __float_as_uint(__fadd_rn(__fmul_rn(v[i * kCount + w * 4 + j], inverse), kMagic));
        }
        words.value[w] =
            any & __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
      }
      uint8_t* to = tile + chunk_offset(static_cast<int>(token % kTokenTile), k(i) / kChunkBytes) + k(i) % kChunkBytes;
      *reinterpret_cast<Vector<uint32_t, kCount / 4>*>(to) = words;
    }
  }
};

// Of `kLanes` neighbours in a warp, to all of them.
template <int kLanes>
__device__ int largest_of_lanes(int value) {
  if constexpr (kLanes == 32) {
    return __reduce_max_sync(~0u, value);
  } else {
#pragma unroll
    for (int stride = kLanes / 2; stride > 0; stride /= 2) value = max(value, __shfl_xor_sync(~0u, value, stride));
    return value;
  }
}
template <int kLanes>
__device__ float sum_of_lanes(float value) {
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) value += __shfl_xor_sync(~0u, value, stride);
  return value;
}

struct Scale {
  float scale;
  float inverse;  // 0 where all codes are 0
};

// fp32 division rounds as on the CPU: this file is compiled without fast-math.
__device__ Scale scale_of(int largest_bits, bool rotate, int qmax) {
  const float largest = __int_as_float(largest_bits);
  if (!(largest <= FLT_MAX)) return {__int_as_float(0x7fffffff), 0.0f};
  const float scale = __fdiv_rn(rotate ? __fmul_rn(largest, kHadamardNorm) : largest, static_cast<float>(qmax));
  if (scale < FLT_MIN) return {0.0f, 0.0f};
  return {scale, __fdiv_rn(static_cast<float>(qmax), largest)};
}

// Codes of a group with a scale of its own. `largest`: of the whole group.
template <int kLanes>
__device__ void store_group(const Args& a, const Part<kLanes>& part, int64_t token, int64_t group,
                            const float (&v)[Part<kLanes>::kValues], int largest) {
  const Scale scale = scale_of(largest, a.rotate, a.qmax);
  part.store_codes(a, token, group, v, scale.inverse);
  if (part.lane == 0) a.scales[group * a.tiles * kTokenTile + token] = scale.scale;
}

// Scheme group, where nothing of the whole token is needed. 32 lanes a group: a warp for each of a token's groups.
// 4 lanes: a warp for a tile of 8 tokens, which it writes whole; of several, the next one is copied meanwhile. Few
// registers for few tokens, as of quantize_tokens.
template <typename T, ActivationSource::Kind kKind, int kLanes>
__global__ void __launch_bounds__(kWarps * 32, kLanes == 32 ? 6 : 3) quantize_groups(const __grid_constant__ Args a) {
  ptx::launch_dependents();
  ptx::wait_for_previous_kernel();
  extern __shared__ uint4 staging[];
  constexpr int kTokens = 32 / kLanes;
  const int lane = threadIdx.x % 32;
  const Part<kLanes> part(lane);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (group >= a.groups) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens + lane / kLanes;
  const int64_t tokens_apart = static_cast<int64_t>(gridDim.y) * kTokens;
  using Values = float[Part<kLanes>::kValues];
  const auto quantize = [&](int64_t token, Values& v) {
    const int largest = largest_of_lanes<kLanes>(part.rotate_and_max(a, v));
    if (token < a.m) store_group(a, part, token, group, v, largest);
  };
  const int64_t end = a.m + lane / kLanes;  // the same number of turns for all lanes: they shuffle
  if constexpr (kLanes == 4) {
    if (a.ahead) {
      constexpr int kPlaces = inputs_of(kKind) * Part<kLanes>::template kPieces<T>;
      const auto places = [&](int odd) { return staging + odd * kPlaces * static_cast<int>(blockDim.x) + threadIdx.x; };
      const auto fetch = [&](int64_t token, int odd) {
        part.template fetch_source<T, kKind>(a, token, group, places(odd));
        ptx::cp_async_commit();
      };
      fetch(first, 0);
      int odd = 0;
      for (int64_t token = first; token < end; token += tokens_apart, odd ^= 1) {
        fetch(token + tokens_apart, odd ^ 1);
        ptx::cp_async_wait<1>();
        Values v;
        part.template take_source<T, kKind>(a, places(odd), v);
        quantize(token, v);
      }
      return;
    }
  }
  for (int64_t token = first; token < end; token += tokens_apart) {
    Values v = {};
    if (token < a.m) part.template load_source<T, kKind>(a, token, group, v);
    quantize(token, v);
  }
}

// One value for each token of a tile, combined over all warps of the cluster, always in the same order. Each warp sends
// its values to every thread block, whose barrier counts their bytes: a barrier of the cluster would first wait for the
// codes of the tile before to be written. Tables are used in turns, two for each statistic: a warp sends a tile's
// values after it has read those of the tile before, so that none is overwritten.
template <int kLanes>
class OverTokens {
 public:
  static constexpr int kTokens = 32 / kLanes;  // of a warp, a thread block and a cluster alike
  struct Table {
    uint64_t arrived;
    uint32_t of_warp[kMaxCluster * kMaxTokenThreads / 32][kTokens];
  };

  __device__ OverTokens(int cluster, int rank)
      : cluster_(cluster),
        warps_(static_cast<int>(blockDim.x / 32)),
        warp_(rank * warps_ + static_cast<int>(threadIdx.x / 32)),
        token_(static_cast<int>(threadIdx.x) % 32 / kLanes),
        lane_(static_cast<int>(threadIdx.x) % kLanes) {}

  // By one thread of each thread block, before they meet.
  static __device__ void init(Table& table) {
#if FLEXQ_SM90A
    ptx::mbarrier_init(ptx::shared_address(&table.arrived), 1);
#endif
  }

  // `turn` counts the tiles of this cluster from 0.
  __device__ float sum(float value, Table (&tables)[2], int turn) const {
    const Table& table = meet(__float_as_uint(sum_of_lanes<kLanes>(value)), tables, turn);
    return sum_of_lanes<kLanes>(
        fold(table, 0.0f, [](float all, uint32_t bits) { return all + __uint_as_float(bits); }));
  }

  __device__ int largest(int value, Table (&tables)[2], int turn) const {
    const Table& table = meet(static_cast<uint32_t>(largest_of_lanes<kLanes>(value)), tables, turn);
    return largest_of_lanes<kLanes>(
        fold(table, 0, [](int all, uint32_t bits) { return max(all, static_cast<int>(bits)); }));
  }

 private:
  // Each warp tells all thread blocks, a lane each.
  __device__ const Table& meet(uint32_t value, Table (&tables)[2], int turn) const {
    Table& table = tables[turn % 2];
    if (cluster_ == 1) {
      if (lane_ == 0) table.of_warp[warp_][token_] = value;
      __syncthreads();
      return table;
    }
#if FLEXQ_SM90A
    const uint32_t arrived = ptx::shared_address(&table.arrived);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(arrived, static_cast<uint32_t>(cluster_ * warps_ * kTokens) * sizeof(value));
    }
    const uint32_t place = ptx::shared_address(&table.of_warp[warp_][token_]);
    for (int block = lane_; block < cluster_; block += kLanes) {
      const auto to = static_cast<uint32_t>(block);
      ptx::store_async(ptx::remote_address(place, to), value, ptx::remote_address(arrived, to));
    }
    ptx::mbarrier_wait(arrived, static_cast<uint32_t>(turn / 2 % 2));
#endif
    return table;
  }

  // Over this lane's part of what the warps sent for its token.
  template <typename Value, typename Combine>
  __device__ Value fold(const Table& table, Value all, const Combine& combine) const {
#pragma unroll 4
    for (int i = lane_; i < cluster_ * warps_; i += kLanes) all = combine(all, table.of_warp[i][token_]);
    return all;
  }

  int cluster_, warps_;
  int warp_;  // among those of the cluster
  int token_, lane_;
};

// Groups of a warp that stay in registers while a statistic of the whole token is found: fusing needs registers of its
// own.
constexpr int kept_groups(ActivationSource::Kind kind, int lanes) {
  return lanes == 32 || kind == ActivationSource::kPlain ? 2 : 1;
}

// The kernels for few tokens have few registers, so that their thread blocks are there, beside those of the GEMM before
// them, when it ends.
constexpr int min_blocks(int lanes) { return lanes == 32 ? 2 : 1; }

// Where the whole token decides (scheme channel, a norm): a cluster of thread blocks for a tile of 8 tokens (4 lanes a
// group) or for one token (32 lanes), its warps sharing the groups. Groups beyond what they keep are read again. Tiles
// that a cluster takes one after the other are copied ahead.
template <typename T, ActivationSource::Kind kKind, int kLanes>
__global__ void __launch_bounds__(kMaxTokenThreads, min_blocks(kLanes))
    quantize_tokens(const __grid_constant__ Args a) {
  using Values = float[Part<kLanes>::kValues];
  constexpr bool kNorm = kKind == ActivationSource::kRmsNorm;
  constexpr int kKept = kept_groups(kKind, kLanes);
  constexpr bool kAhead = kLanes == 4;
  __shared__ typename OverTokens<kLanes>::Table for_norm[2], for_scale[2];
  extern __shared__ uint4 staging[];
  ptx::launch_dependents();
  int rank = 0;
#if FLEXQ_SM90A
  if (a.cluster > 1) {
    rank = static_cast<int>(ptx::cluster_rank());
    if (threadIdx.x == 0) {
      for (auto* tables : {for_norm, for_scale}) {
        for (int i = 0; i < 2; ++i) OverTokens<kLanes>::init(tables[i]);
      }
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_meet();  // all have started: they can be written to
  }
#endif
  const OverTokens<kLanes> over_token(a.cluster, rank);
  const ActivationSource& s = a.source;
  constexpr int kTokens = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Part<kLanes> part(lane);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t own = rank * warps + static_cast<int>(threadIdx.x / 32);
  const int64_t stride = a.cluster * warps;
  const int64_t rounds = (a.groups + stride - 1) / stride;  // the same for all, so that shuffles find all their lanes
  if constexpr (kNorm) {
    // To L2 only: whether the kernel before has written it is not known yet.
    constexpr int kLine = 128, kLineValues = kLine / static_cast<int>(sizeof(T));
    for (int64_t group = own; lane < kGroup / kLineValues && group < a.groups; group += stride) {
      const int64_t at = group * kGroup + lane * kLineValues;
      if (at < a.k) ptx::prefetch_to_l2(static_cast<const T*>(a.source.weight) + at);
    }
  }

  ptx::wait_for_previous_kernel();

  constexpr int kInputs = inputs_of(kKind);
  const auto places = [&](int i) {
    return staging + static_cast<int64_t>(i * kInputs * Part<kLanes>::template kPieces<T>) * blockDim.x + threadIdx.x;
  };
  const auto fetch = [&](int64_t token) {
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        part.template fetch_source<T, kKind>(a, token, min(own + i * stride, a.groups), places(i));
      }
      ptx::cp_async_commit();
    }
  };
  const auto take = [&](int i, Values& v) {
    if constexpr (kAhead) part.template take_source<T, kKind>(a, places(i), v);
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x / a.cluster) * kTokens;
  const int64_t tokens_apart = static_cast<int64_t>(gridDim.x / a.cluster) * kTokens;
  if (kAhead && a.ahead) fetch(first + lane / kLanes);
  int turn = 0;
  for (int64_t tile = first; tile < a.m; tile += tokens_apart, ++turn) {
    const int64_t token = tile + lane / kLanes;
    const bool there = token < a.m;
    float squares = 0.0f;
    const auto count = [&](int64_t group, const Values& v) {
      if constexpr (kNorm) {
#pragma unroll
        for (const float value : v) squares += value * value;
        if (s.sum != nullptr) part.template save<T>(a, s.sum, s.ld_sum, token, group, v);
      }
    };
    const auto read = [&](int64_t group, Values& v) {
#pragma unroll
      for (float& value : v) value = 0.0f;
      if (!there || group >= a.groups) return;
      part.template load_source<T, kKind>(a, token, group, v);
      count(group, v);
    };
    float norm = 1.0f;
    // From what was read, and perhaps stored in place, to what is quantized; this lane's largest of the group.
    using Weights = typename Part<kLanes>::template Stored<T>;
    const auto weights_of = [&](int64_t group) {
      return kNorm && group < a.groups ? part.template load_stored<T>(a, s.weight, 0, 0, group) : Weights{};
    };
    const auto finish = [&](const Weights& weights, Values& v) {
      if constexpr (kNorm) {
#pragma unroll
        for (int i = 0; i < Part<kLanes>::kValues; ++i) {
          v[i] = rounded<T>(rounded<T>(v[i] * norm) * weights.value(i));
        }
      }
      return part.rotate_and_max(a, v);
    };
    const auto read_again = [&](int64_t group, Values& v) {
      if (kNorm && s.sum != nullptr) {
        if (there && group < a.groups) part.template load<T>(a, s.sum, s.ld_sum, token, group, v);
      } else {
        read(group, v);  // the squares are done with
      }
    };

    Values kept[kKept];
    if (kAhead && a.ahead) {
      ptx::cp_async_wait<0>();
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        take(i, kept[i]);
        if (there && own + i * stride < a.groups) count(own + i * stride, kept[i]);
      }
      fetch(token + tokens_apart);
    } else {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < rounds) read(own + i * stride, kept[i]);
      }
    }
    Weights kept_weights[kKept];  // asked for before they are needed
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept_weights[i] = weights_of(own + i * stride);
    if constexpr (kNorm) {
      for (int64_t round = kKept; round < rounds; ++round) {
        Values v;
        read(own + round * stride, v);
      }
      squares = over_token.sum(squares, for_norm, turn);
      norm = rsqrtf(squares / static_cast<float>(a.k) + s.eps);
    }
    // Each group's values, ready to be quantized, and this lane's largest.
    const auto each = [&](const auto& use) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < rounds) use(own + i * stride, kept[i], finish(kept_weights[i], kept[i]));
      }
      for (int64_t round = kKept; round < rounds; ++round) {
        const int64_t group = own + round * stride;
        Values v = {};
        read_again(group, v);
        use(group, v, finish(weights_of(group), v));
      }
    };
    if (a.per_group) {
      each([&](int64_t group, const Values& v, int of_lane) {
        const int of_group = largest_of_lanes<kLanes>(of_lane);
        if (there && group < a.groups) store_group(a, part, token, group, v, of_group);
      });
      continue;
    }
    int largest = 0;
    each([&](int64_t, const Values&, int of_lane) { largest = max(largest, of_lane); });
    largest = over_token.largest(largest, for_scale, turn);
    const Scale scale = scale_of(largest, a.rotate, a.qmax);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int64_t group = own + i * stride;
      if (there && group < a.groups) part.store_codes(a, token, group, kept[i], scale.inverse);
    }
    for (int64_t round = kKept; round < rounds; ++round) {
      const int64_t group = own + round * stride;
      Values v = {};
      read_again(group, v);
      finish(weights_of(group), v);
      if (there && group < a.groups) part.store_codes(a, token, group, v, scale.inverse);
    }
    if (there && own == 0 && part.lane == 0) a.scales[token] = scale.scale;
  }
}

__global__ void export_kernel(int64_t m, int64_t groups, int64_t tiles, bool per_group, const uint8_t* in_codes,
                              const float* in_scales, int8_t* codes, float* scales) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= m * groups * kGroup) return;
  const int k = static_cast<int>(index % kGroup);
  const int64_t group = index / kGroup % groups;
  const int64_t token = index / kGroup / groups;
  const uint8_t* tile = in_codes + (group * tiles + token / kTokenTile) * kTileGroupBytes;
  const int at = chunk_offset(static_cast<int>(token % kTokenTile), k / kChunkBytes) + k % kChunkBytes;
  codes[index] = static_cast<int8_t>(tile[at]);
  if (k != 0) return;
  if (per_group) {
    scales[token * groups + group] = in_scales[group * tiles * kTokenTile + token];
  } else if (group == 0) {
    scales[token] = in_scales[token];
  }
}

// The thread blocks, at most `most`, and their warps, at most `warps`, that share the groups of a tile of tokens, or of
// one token: they keep them in registers if they can, and are more where tiles are few.
Launch spread(const Device& device, int64_t tiles, int64_t groups, int warps, int kept, int most) {
  int cluster = 1;
  if (device.has_wgmma) {
    while (cluster < most && groups > cluster * warps * kept) cluster *= 2;
    while (2 * cluster <= std::min(most, 8) && groups > cluster * warps && tiles * cluster * 2 <= device.num_sms)
      cluster *= 2;
  }
  const int64_t rounds = ceil_div(groups, cluster * warps);
  warps = static_cast<int>(ceil_div(groups, cluster * rounds));
  return {.grid = dim3(static_cast<unsigned>(cluster)),
          .block = dim3(static_cast<unsigned>(32 * warps)),
          .overlapped = device.has_sm90,
          .cluster = static_cast<unsigned>(cluster)};
}

template <typename T, ActivationSource::Kind kKind>
void launch_for(cudaStream_t stream, const Device& device, const Args& args) {
  const bool of_tokens = !args.per_group || kKind == ActivationSource::kRmsNorm;
  const bool tiles = args.m > max_single_tokens(of_tokens);
  if (of_tokens) {
    constexpr int kInputs = inputs_of(kKind);
    const int lanes = tiles ? 4 : 32, kept = kept_groups(kKind, lanes);
    const int64_t count = tiles ? args.tiles : args.m;
    // As measured on an H100: thread blocks with little to do start sooner if they are small; of many tiles, those that
    // meet in fewer thread blocks are done sooner.
    const bool small = device.has_wgmma && kKind == ActivationSource::kPlain && 2 * count < device.num_sms;
    const int warps = small ? 8 : kMaxTokenThreads / 32;
    const auto kernel = tiles ? quantize_tokens<T, kKind, 4> : quantize_tokens<T, kKind, 32>;
    Launch how;
    int at_once = 0;
    // A part of a GPU may be too small for the largest clusters.
    for (int most = kMaxCluster; at_once == 0; most = static_cast<int>(how.cluster) / 2) {
      how = spread(device, count, args.groups, warps, kept, most);
      how.shared_bytes = tiles && args.vectors ? how.block.x * sizeof(T) * Part<4>::kValues * kept * kInputs : 0;
      at_once = clusters_at_once(kernel, how);
    }
    Args with = args;
    with.cluster = static_cast<int>(how.cluster);
    with.ahead = how.shared_bytes > 0 && at_once < count;
    if (!with.ahead) how.shared_bytes = 0;
    how.grid.x *= static_cast<unsigned>(std::min<int64_t>(count, at_once));
    launch(stream, "quantize_activation", kernel, how, with);
    return;
  }
  constexpr int64_t kMaxGridY = 65535;
  // While tiles are few, small thread blocks reach more multiprocessors.
  const int warps = tiles && args.tiles * args.groups < 8 * device.num_sms ? 2 : kWarps;
  const int64_t across = ceil_div(args.groups, warps);
  int64_t down = std::min(tiles ? args.tiles : args.m, kMaxGridY);
  Launch how{.block = dim3(static_cast<unsigned>(32 * warps)), .overlapped = device.has_sm90};
  const auto kernel = tiles ? quantize_groups<T, kKind, 4> : quantize_groups<T, kKind, 32>;
  Args with = args;
  if (tiles && args.vectors && device.has_sm90) {
    // Thread blocks that stay, and copy the next tile while they have this one: so many on a multiprocessor that the
    // one with the most to do has least, and of those the most.
    constexpr int kInputs = inputs_of(kKind), kStages = 2;
    Launch staying = how;
    staying.shared_bytes = how.block.x * sizeof(T) * Part<4>::kValues * kInputs * kStages;
    const int64_t most = clusters_at_once(kernel, staying) / device.num_sms;
    int64_t share = 0, turns = 0;
    for (int64_t count = 1; count <= most; ++count) {
      const int64_t of_count = ceil_div(args.tiles, std::max<int64_t>(1, count * device.num_sms / across));
      if (share == 0 || count * of_count <= share * turns) {
        share = count;
        turns = of_count;
      }
    }
    if (turns > 1) {
      with.ahead = true;
      how = staying;
      down = ceil_div(args.tiles, turns);
      claim_share(how, share, most);
    }
  }
  how.grid = dim3(static_cast<unsigned>(across), static_cast<unsigned>(down));
  launch(stream, "quantize_activation", kernel, how, with);
}

template <typename T>
void launch_for(cudaStream_t stream, const Device& device, const Args& args) {
  switch (args.source.kind) {
    case ActivationSource::kRmsNorm:
      return launch_for<T, ActivationSource::kRmsNorm>(stream, device, args);
    case ActivationSource::kSiluMul:
      return launch_for<T, ActivationSource::kSiluMul>(stream, device, args);
    default:
      return launch_for<T, ActivationSource::kPlain>(stream, device, args);
  }
}

}  // namespace

void quantize_activation(cudaStream_t stream, const Device& device, const flexq_activation_desc& desc,
                         const ActivationSource& source, void* quantized) {
  const ActivationLayout layout(desc);
  auto* bytes = static_cast<uint8_t*>(quantized);
  const int64_t element = source.dtype == FLEXQ_F32 ? 4 : 2;
  bool vectors = true;
  for (const void* p : {source.x, source.other, source.weight, static_cast<const void*>(source.sum)}) {
    vectors = vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  }
  for (const int64_t ld : {source.ldx, source.ld_other, source.ld_sum}) vectors = vectors && ld * element % 16 == 0;
  const Args args{
      .source = source,
      .m = desc.m,
      .k = desc.k,
      .groups = num_groups(desc.k),
      .tiles = layout.tiles,
      .qmax = act_max_code(desc.act_bits),
      .rotate = desc.rotation == FLEXQ_ROTATION_HADAMARD128,
      .per_group = desc.scheme == FLEXQ_SCHEME_GROUP,
      .vectors = vectors,
      .cluster = 1,
      .ahead = false,
      .codes = bytes,
      .scales = reinterpret_cast<float*>(bytes + layout.scales),
  };
  switch (source.dtype) {
    case FLEXQ_F16:
      return launch_for<__half>(stream, device, args);
    case FLEXQ_BF16:
      return launch_for<__nv_bfloat16>(stream, device, args);
    default:
      return launch_for<float>(stream, device, args);
  }
}

void activation_export(cudaStream_t stream, const flexq_activation_desc& desc, const void* quantized, int8_t* codes,
                       float* scales) {
  const ActivationLayout layout(desc);
  const auto* bytes = static_cast<const uint8_t*>(quantized);
  constexpr int kThreads = 256;
  const int64_t groups = num_groups(desc.k);
  const auto blocks = static_cast<unsigned>(ceil_div(desc.m * groups * kGroup, kThreads));
  export_kernel<<<blocks, kThreads, 0, stream>>>(desc.m, groups, layout.tiles, desc.scheme == FLEXQ_SCHEME_GROUP, bytes,
                                                 reinterpret_cast<const float*>(bytes + layout.scales), codes, scales);
  check(cudaGetLastError(), "activation_export");
}

}  // namespace flexq::cuda
