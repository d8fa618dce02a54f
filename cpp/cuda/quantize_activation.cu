// Activations -> int8 codes in tiles (layout.h) and fp32 scales, rotated if the weight is (docs/numerics.md), alone or
// fused with the RMS norm or the SiLU product before it. A warp holds a group of 128 in registers, four neighbours a
// lane.
#include <cooperative_groups.h>
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
constexpr int kMaxCluster = 8;
// Groups that a warp keeps in registers while a statistic over the whole token is found.
constexpr int kKept = 8;

struct Args {
  ActivationSource source;
  int64_t m;
  int64_t k;
  int64_t groups;
  int64_t tiles;
  int qmax;
  bool rotate;
  bool per_group;
  bool vectors;  // all rows are aligned for four elements at a time
  int token_lanes;  // of a thread block's warps in quantize_groups, how many are side by side along tokens
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

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// This lane's four values of a group, zero past the end of the row.
template <typename T>
__device__ void load(const Args& a, const void* rows, int64_t ld, int64_t token, int64_t group, int lane,
                     float (&v)[4]) {
  const int64_t k = group * kGroup + 4 * lane;
  const T* x = static_cast<const T*>(rows) + token * ld + k;
  if (a.vectors && k + 4 <= a.k) {
    const auto four = *reinterpret_cast<const Four<T>*>(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(four.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = k + i < a.k ? to_float(x[i]) : 0.0f;
  }
}

template <typename T>
__device__ void save(const Args& a, void* rows, int64_t ld, int64_t token, int64_t group, int lane,
                     const float (&v)[4]) {
  const int64_t k = group * kGroup + 4 * lane;
  T* x = static_cast<T*>(rows) + token * ld + k;
  if (a.vectors && k + 4 <= a.k) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = from_float<T>(v[i]);
    *reinterpret_cast<Four<T>*>(x) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (k + i < a.k) x[i] = from_float<T>(v[i]);
    }
  }
}

// Strides 64 to 4 between lanes, 2 and 1 within one: the CPU's order, so the same bits.
__device__ void hadamard(float (&v)[4], int lane) {
#pragma unroll
  for (int stride = 16; stride > 0; stride /= 2) {
    const bool upper = lane & stride;
#pragma unroll
    for (float& value : v) {
      const float other = __shfl_xor_sync(~0u, value, stride);
      value = upper ? other - value : value + other;
    }
  }
  const float a = v[0] + v[2], b = v[1] + v[3], c = v[0] - v[2], d = v[1] - v[3];
  v[0] = a + b;
  v[1] = a - b;
  v[2] = c + d;
  v[3] = c - d;
}

// The values to quantize, before the rotation; those of a norm still without it.
template <typename T, ActivationSource::Kind kKind>
__device__ void load_source(const Args& a, int64_t token, int64_t group, int lane, float (&v)[4]) {
  const ActivationSource& s = a.source;
  load<T>(a, s.x, s.ldx, token, group, lane, v);
  if constexpr (kKind == ActivationSource::kSiluMul) {
    float up[4];
    load<T>(a, s.other, s.ld_other, token, group, lane, up);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = rounded<T>(rounded<T>(__fdiv_rn(v[i], 1.0f + expf(-v[i]))) * up[i]);
  }
  if constexpr (kKind == ActivationSource::kRmsNorm) {
    if (s.other == nullptr) return;
    float residual[4];
    load<T>(a, s.other, s.ld_other, token, group, lane, residual);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = rounded<T>(v[i] + residual[i]);
  }
}

// Rotates if asked. The largest magnitude: floats without their sign order like integers, NaN above all.
__device__ int rotate_and_max(const Args& a, int lane, float (&v)[4]) {
  if (a.rotate) hadamard(v, lane);
  int largest = 0;
#pragma unroll
  for (const float value : v) largest = max(largest, __float_as_int(value) & 0x7fffffff);
  return largest;
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

__device__ void store_codes(const Args& a, int64_t token, int64_t group, int lane, const float (&v)[4],
                            float inverse) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int code = inverse == 0.0f ? 0 : __float2int_rn(__fmul_rn(v[i], inverse));
    word |= (static_cast<uint32_t>(max(-a.qmax, min(a.qmax, code))) & 0xffu) << (8 * i);
  }
  uint8_t* tile = a.codes + (group * a.tiles + token / kTokenTile) * kTileGroupBytes;
  uint8_t* row = tile + lane / 4 * kCoreMatrixBytes + token % kTokenTile * kChunkBytes;
  reinterpret_cast<uint32_t*>(row)[lane % 4] = word;
}

// A scale of its own for a group that a warp holds.
__device__ void store_group(const Args& a, int64_t token, int64_t group, int lane, const float (&v)[4], int largest) {
  const Scale scale = scale_of(__reduce_max_sync(~0u, largest), a.rotate, a.qmax);
  store_codes(a, token, group, lane, v, scale.inverse);
  if (lane == 0) a.scales[group * a.tiles * kTokenTile + token] = scale.scale;
}

// Scheme group, where nothing of the whole token is needed: kUnroll groups a warp.
template <typename T, ActivationSource::Kind kKind, int kUnroll>
__global__ void __launch_bounds__(kWarps * 32) quantize_groups(const __grid_constant__ Args a) {
  ptx::wait_for_previous_kernel();
  // Only now: the GEMM reads weights before it waits for this kernel, and whoever wrote them has finished.
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int group_lanes = kWarps / a.token_lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * group_lanes * kUnroll + warp / a.token_lanes;
  for (int64_t token = static_cast<int64_t>(blockIdx.y) * a.token_lanes + warp % a.token_lanes; token < a.m;
       token += static_cast<int64_t>(gridDim.y) * a.token_lanes) {
    float v[kUnroll][4];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t group = first + u * group_lanes;
      if (group < a.groups) load_source<T, kKind>(a, token, group, lane, v[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t group = first + u * group_lanes;
      if (group < a.groups) store_group(a, token, group, lane, v[u], rotate_and_max(a, lane, v[u]));
    }
  }
}

// `value` of a lane combined over a warp; `combine` is a sum or a maximum of values that are 0 or more.
template <typename V, typename Combine>
__device__ V over_warp(V value, const Combine& combine) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// The same over all threads of a cluster (before sm_90: of the thread block), in a fixed order.
template <typename V, typename Combine>
__device__ V over_cluster(V value, const Combine& combine) {
  __shared__ V of_warp[kWarps];
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  const auto synchronize = [&] { cluster.sync(); };
  const auto warps_of = [&](int block) { return cluster.map_shared_rank(of_warp, block); };
  const int blocks = static_cast<int>(cluster.num_blocks());
#else
  const auto synchronize = [] { __syncthreads(); };
  const auto warps_of = [](int) { return of_warp; };
  constexpr int blocks = 1;
#endif
  value = over_warp(value, combine);
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  synchronize();
  value = V{0};
  for (int i = lane; i < blocks * kWarps; i += 32) value = combine(value, warps_of(i / kWarps)[i % kWarps]);
  synchronize();  // nobody leaves, or writes for the next use, while others read
  return over_warp(value, combine);
}

// Where the whole token decides (scheme channel, a norm): a cluster of gridDim.x thread blocks a token. Groups beyond
// those kept in registers are read again.
template <typename T, ActivationSource::Kind kKind>
__global__ void __launch_bounds__(kWarps * 32) quantize_tokens(const __grid_constant__ Args a) {
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const ActivationSource& s = a.source;
  constexpr bool kNorm = kKind == ActivationSource::kRmsNorm;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t beyond = first + kKept * stride;
  for (int64_t token = blockIdx.y; token < a.m; token += gridDim.y) {
    float kept[kKept][4];
    float squares = 0.0f;
    const auto read = [&](int64_t group, float(&v)[4]) {
      load_source<T, kKind>(a, token, group, lane, v);
      if constexpr (kNorm) {
#pragma unroll
        for (const float value : v) squares += value * value;
        if (s.sum != nullptr) save<T>(a, s.sum, s.ld_sum, token, group, lane, v);
      }
    };
    // What was read, and stored in place perhaps, again.
    const auto read_again = [&](int64_t group, float(&v)[4]) {
      if (kNorm && s.sum != nullptr) {
        load<T>(a, s.sum, s.ld_sum, token, group, lane, v);
      } else {
        load_source<T, kKind>(a, token, group, lane, v);
      }
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * stride < a.groups) read(first + i * stride, kept[i]);
    }
    float norm = 1.0f;
    if constexpr (kNorm) {
      for (int64_t group = beyond; group < a.groups; group += stride) {
        float v[4];
        read(group, v);
      }
      squares = over_cluster(squares, [](float x, float y) { return x + y; });
      norm = rsqrtf(squares / static_cast<float>(a.k) + s.eps);
    }
    const auto finish = [&](int64_t group, float(&v)[4]) {
      if constexpr (kNorm) {
        float weight[4];
        load<T>(a, s.weight, 0, 0, group, lane, weight);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = rounded<T>(rounded<T>(v[i] * norm) * weight[i]);
      }
      return rotate_and_max(a, lane, v);
    };
    int largest = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int64_t group = first + i * stride;
      if (group >= a.groups) continue;
      const int of_group = finish(group, kept[i]);
      if (a.per_group) {
        store_group(a, token, group, lane, kept[i], of_group);
      } else {
        largest = max(largest, of_group);
      }
    }
    for (int64_t group = beyond; group < a.groups; group += stride) {
      float v[4];
      read_again(group, v);
      const int of_group = finish(group, v);
      if (a.per_group) {
        store_group(a, token, group, lane, v, of_group);
      } else {
        largest = max(largest, of_group);
      }
    }
    if (a.per_group) continue;
    largest = over_cluster(largest, [](int x, int y) { return max(x, y); });
    const Scale scale = scale_of(largest, a.rotate, a.qmax);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * stride < a.groups) store_codes(a, token, first + i * stride, lane, kept[i], scale.inverse);
    }
    for (int64_t group = beyond; group < a.groups; group += stride) {
      float v[4];
      read_again(group, v);
      finish(group, v);
      store_codes(a, token, group, lane, v, scale.inverse);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) a.scales[token] = scale.scale;
  }
}

__global__ void export_kernel(int64_t m, int64_t groups, int64_t tiles, bool per_group, const uint8_t* in_codes,
                              const float* in_scales, int8_t* codes, float* scales) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= m * groups * kGroup) return;
  const int64_t k = index % kGroup;
  const int64_t group = index / kGroup % groups;
  const int64_t token = index / kGroup / groups;
  const uint8_t* tile = in_codes + (group * tiles + token / kTokenTile) * kTileGroupBytes;
  codes[index] = static_cast<int8_t>(
      tile[k / kChunkBytes * kCoreMatrixBytes + token % kTokenTile * kChunkBytes + k % kChunkBytes]);
  if (k != 0) return;
  if (per_group) {
    scales[token * groups + group] = in_scales[group * tiles * kTokenTile + token];
  } else if (group == 0) {
    scales[token] = in_scales[token];
  }
}

constexpr int64_t kMaxGridY = 65535;

template <typename T, ActivationSource::Kind kKind>
void launch_for(cudaStream_t stream, const Device& device, Args args) {
  Launch how{.block = dim3(kWarps * 32), .overlapped = device.has_sm90};
  if (args.per_group && kKind != ActivationSource::kRmsNorm) {
    while (args.token_lanes < kWarps && args.token_lanes < args.m) args.token_lanes *= 2;
    constexpr int kUnroll = 4;
    const bool many = args.m >= 64;
    const int64_t groups_a_block = kWarps / args.token_lanes * (many ? kUnroll : 1);
    how.grid = dim3(static_cast<unsigned>(ceil_div(args.groups, groups_a_block)),
                    static_cast<unsigned>(std::min(ceil_div(args.m, args.token_lanes), kMaxGridY)));
    launch(stream, "quantize_activation", many ? quantize_groups<T, kKind, kUnroll> : quantize_groups<T, kKind, 1>, how,
           args);
    return;
  }
  if (device.has_sm90) {
    // One group a warp where tokens are few, so that latency counts; else as few thread blocks as registers allow.
    const int64_t widest = std::min<int64_t>(ceil_div(args.groups, kWarps), kMaxCluster);
    const int64_t narrowest = std::min<int64_t>(ceil_div(args.groups, kWarps * kKept), kMaxCluster);
    how.cluster = static_cast<unsigned>(args.m * widest <= 4 * device.num_sms ? widest : narrowest);
  }
  how.grid = dim3(how.cluster, static_cast<unsigned>(std::min(args.m, kMaxGridY)));
  launch(stream, "quantize_activation", quantize_tokens<T, kKind>, how, args);
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
  const size_t four = 4 * (source.dtype == FLEXQ_F32 ? 4 : 2);
  bool vectors = true;
  for (const void* p : {source.x, source.other, source.weight, static_cast<const void*>(source.sum)}) {
    vectors = vectors && reinterpret_cast<uintptr_t>(p) % four == 0;
  }
  for (const int64_t ld : {source.ldx, source.ld_other, source.ld_sum}) vectors = vectors && ld % 4 == 0;
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
      .token_lanes = 1,
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
