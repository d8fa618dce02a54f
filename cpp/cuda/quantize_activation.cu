// Activations -> int8 codes in tiles (layout.h) and fp32 scales, rotated if the weight is (docs/numerics.md), alone or
// fused with the RMS norm or the SiLU product before it.
//
// Four lanes hold a group of 128, 32 values each, so that five of the rotation's seven stages stay in registers; where
// tokens are so few that latency counts more than instructions, a whole warp holds it, four values a lane.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "core/error.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxTokenThreads = 512;

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

  // Zero past the end of the row.
  template <typename T>
  __device__ void load(const Args& a, const void* rows, int64_t ld, int64_t token, int64_t group,
                       float (&v)[kValues]) const {
    const T* row = static_cast<const T*>(rows) + token * ld;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = group * kGroup + k(i);
      if (a.vectors && at + kCount <= a.k) {
        const auto vector = *reinterpret_cast<const Vector<T, kCount>*>(row + at);
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[i * kCount + j] = to_float(vector.value[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) v[i * kCount + j] = at + j < a.k ? to_float(row[at + j]) : 0.0f;
      }
    }
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
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if constexpr (kKind == ActivationSource::kSiluMul) {
        v[i] = rounded<T>(rounded<T>(__fdiv_rn(v[i], 1.0f + expf(-v[i]))) * other[i]);
      } else {
        v[i] = rounded<T>(v[i] + other[i]);
      }
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

  // Rotates if asked. The largest magnitude in the group: floats without their sign order like integers, NaN above all.
  __device__ int rotate_and_max(const Args& a, float (&v)[kValues]) const {
    if (a.rotate) hadamard(v);
    int largest = 0;
#pragma unroll
    for (const float value : v) largest = max(largest, __float_as_int(value) & 0x7fffffff);
#pragma unroll
    for (int stride = kLanes / 2; stride > 0; stride /= 2) {
      largest = max(largest, __shfl_xor_sync(~0u, largest, stride));
    }
    return largest;
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

// Codes of a group with a scale of its own.
template <int kLanes>
__device__ void store_group(const Args& a, const Part<kLanes>& part, int64_t token, int64_t group,
                            const float (&v)[Part<kLanes>::kValues], int largest) {
  const Scale scale = scale_of(largest, a.rotate, a.qmax);
  part.store_codes(a, token, group, v, scale.inverse);
  if (part.lane == 0) a.scales[group * a.tiles * kTokenTile + token] = scale.scale;
}

// Scheme group, where nothing of the whole token is needed. 32 lanes a group: a warp for each of a token's groups.
// 4 lanes: a warp for a tile of 8 tokens, which it writes whole.
template <typename T, ActivationSource::Kind kKind, int kLanes>
__global__ void __launch_bounds__(kWarps * 32) quantize_groups(const __grid_constant__ Args a) {
  ptx::wait_for_previous_kernel();
  // Only now: the GEMM reads weights before it waits for this kernel, and whoever wrote them has finished.
  ptx::launch_dependents();
  constexpr int kTokens = 32 / kLanes;
  const int lane = threadIdx.x % 32;
  const Part<kLanes> part(lane);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (group >= a.groups) return;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens; first < a.m;
       first += static_cast<int64_t>(gridDim.y) * kTokens) {
    const int64_t token = first + lane / kLanes;
    float v[Part<kLanes>::kValues] = {};
    if (token < a.m) part.template load_source<T, kKind>(a, token, group, v);
    const int largest = part.rotate_and_max(a, v);
    if (token < a.m) store_group(a, part, token, group, v, largest);
  }
}

// `value` of all threads of a block combined, in a fixed order; `combine` is a sum or maximum of what is 0 or more.
template <typename V, typename Combine>
__device__ V over_block(V value, const Combine& combine) {
  __shared__ V of_warp[kMaxTokenThreads / 32];
  const int lane = threadIdx.x % 32;
  const auto over_warp = [&](V x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(~0u, x, offset));
    return x;
  };
  value = over_warp(value);
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = over_warp(lane < static_cast<int>(blockDim.x / 32) ? of_warp[lane] : V{0});
  __syncthreads();  // nobody writes for the next use while others read
  return value;
}

// Where the whole token decides (scheme channel, a norm): a thread block a token, 8 groups a warp. The first of them
// stay in registers; groups beyond, where K is more than the block holds, are read again.
template <typename T, ActivationSource::Kind kKind>
__global__ void __launch_bounds__(kMaxTokenThreads) quantize_tokens(const __grid_constant__ Args a) {
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  constexpr int kLanes = 4;
  using Values = float[Part<kLanes>::kValues];
  constexpr bool kNorm = kKind == ActivationSource::kRmsNorm;
  // Groups that four lanes keep in registers while the statistic is found; fusing needs registers of its own.
  constexpr int kKept = kKind == ActivationSource::kPlain ? 2 : 1;
  const ActivationSource& s = a.source;
  const Part<kLanes> part(static_cast<int>(threadIdx.x));
  const int64_t own = threadIdx.x / kLanes;
  const int64_t stride = blockDim.x / kLanes;
  // Whole warps go round, so that shuffles find all their lanes.
  const int64_t rounds = (a.groups + stride - 1) / stride;
  for (int64_t token = blockIdx.x; token < a.m; token += gridDim.x) {
    float squares = 0.0f;
    const auto read = [&](int64_t group, Values& v) {
#pragma unroll
      for (float& value : v) value = 0.0f;
      if (group >= a.groups) return;
      part.template load_source<T, kKind>(a, token, group, v);
      if constexpr (kNorm) {
#pragma unroll
        for (const float value : v) squares += value * value;
        if (s.sum != nullptr) part.template save<T>(a, s.sum, s.ld_sum, token, group, v);
      }
    };
    float norm = 1.0f;
    // From what was read, and perhaps stored in place, to what is quantized; the largest of the group.
    const auto finish = [&](int64_t group, Values& v) {
      if (kNorm && group < a.groups) {
        Values weight;
        part.template load<T>(a, s.weight, 0, 0, group, weight);
#pragma unroll
        for (int i = 0; i < Part<kLanes>::kValues; ++i) v[i] = rounded<T>(rounded<T>(v[i] * norm) * weight[i]);
      }
      return part.rotate_and_max(a, v);
    };
    const auto read_again = [&](int64_t group, Values& v) {
      if (kNorm && s.sum != nullptr && group < a.groups) {
        part.template load<T>(a, s.sum, s.ld_sum, token, group, v);
      } else {
        const float before = squares;
        read(group, v);
        squares = before;
      }
    };

    Values kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (i < rounds) read(own + i * stride, kept[i]);
    }
    if constexpr (kNorm) {
      for (int64_t round = kKept; round < rounds; ++round) {
        Values v;
        read(own + round * stride, v);
      }
      squares = over_block(squares, [](float x, float y) { return x + y; });
      norm = rsqrtf(squares / static_cast<float>(a.k) + s.eps);
    }
    // Each group's values, ready to be quantized, and its largest.
    int largest = 0;
    const auto each = [&](const auto& use) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < rounds) use(own + i * stride, kept[i], finish(own + i * stride, kept[i]));
      }
      for (int64_t round = kKept; round < rounds; ++round) {
        const int64_t group = own + round * stride;
        Values v = {};
        read_again(group, v);
        use(group, v, finish(group, v));
      }
    };
    if (a.per_group) {
      each([&](int64_t group, const Values& v, int of_group) {
        if (group < a.groups) store_group(a, part, token, group, v, of_group);
      });
      continue;
    }
    each([&](int64_t, const Values&, int of_group) { largest = max(largest, of_group); });
    largest = over_block(largest, [](int x, int y) { return max(x, y); });
    const Scale scale = scale_of(largest, a.rotate, a.qmax);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (i < rounds && own + i * stride < a.groups)
        part.store_codes(a, token, own + i * stride, kept[i], scale.inverse);
    }
    for (int64_t round = kKept; round < rounds; ++round) {
      const int64_t group = own + round * stride;
      Values v = {};
      read_again(group, v);
      finish(group, v);
      if (group < a.groups) part.store_codes(a, token, group, v, scale.inverse);
    }
    if (threadIdx.x == 0) a.scales[token] = scale.scale;
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

template <typename T, ActivationSource::Kind kKind>
void launch_for(cudaStream_t stream, const Device& device, const Args& args) {
  constexpr int64_t kMaxGridY = 65535, kMaxGridX = 0x7fffffff;
  Launch how{.overlapped = device.has_sm90};
  if (!args.per_group || kKind == ActivationSource::kRmsNorm) {
    constexpr int64_t kGroupsAWarp = 8;
    const int64_t threads = std::min<int64_t>(ceil_div(args.groups, kGroupsAWarp) * 32, kMaxTokenThreads);
    how.block = dim3(static_cast<unsigned>(threads));
    how.grid = dim3(static_cast<unsigned>(std::min(args.m, kMaxGridX)));
    launch(stream, "quantize_activation", quantize_tokens<T, kKind>, how, args);
    return;
  }
  const bool tiles = args.m >= kTokenTile;
  // While tiles are few, small thread blocks reach more multiprocessors.
  const int warps = tiles && args.tiles * args.groups < 8 * device.num_sms ? 2 : kWarps;
  how.block = dim3(static_cast<unsigned>(32 * warps));
  how.grid = dim3(static_cast<unsigned>(ceil_div(args.groups, warps)),
                  static_cast<unsigned>(std::min(tiles ? args.tiles : args.m, kMaxGridY)));
  launch(stream, "quantize_activation", tiles ? quantize_groups<T, kKind, 4> : quantize_groups<T, kKind, 32>, how,
         args);
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
