// Activations -> int8 codes in fragment order and fp32 scales, rotated if the weight is (docs/numerics.md). A warp
// holds a group of 128 in registers, four neighbours a lane.
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

struct Args {
  const void* x;
  int64_t ldx;
  int64_t m;
  int64_t k;
  int64_t groups;
  int qmax;
  bool rotate;
  bool vectors;  // rows are aligned for four elements at a time
  uint8_t* codes;
  float* scales;
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// This lane's four values of a group, zero past the end of the row.
template <typename T>
__device__ void load(const Args& a, int64_t token, int64_t group, int lane, float (&v)[4]) {
  const int64_t k = group * kGroup + 4 * lane;
  const T* x = static_cast<const T*>(a.x) + token * a.ldx + k;
  if (a.vectors && k + 4 <= a.k) {
    const auto four = *reinterpret_cast<const Four<T>*>(x);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(four.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = k + i < a.k ? to_float(x[i]) : 0.0f;
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

template <typename T>
__device__ int load_rotated(const Args& a, int64_t token, int64_t group, int lane, float (&v)[4]) {
  load<T>(a, token, group, lane, v);
  if (a.rotate) hadamard(v, lane);
  int largest = 0;  // floats without their sign order like integers, NaN above all
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

__device__ void store(const Args& a, int64_t token, int64_t group, int lane, const float (&v)[4], float inverse) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int code = inverse == 0.0f ? 0 : __float2int_rn(__fmul_rn(v[i], inverse));
    word |= (static_cast<uint32_t>(max(-a.qmax, min(a.qmax, code))) & 0xffu) << (8 * i);
  }
  // k = 4 * lane is k step s = lane / 8, half h = lane / 4 % 2 and column t = lane % 4 of the fragment (layout.h).
  const int vector = lane / 16;
  const int fragment_lane = static_cast<int>(token % kTokenTile) * 4 + lane % 4;
  const int fragment_word = lane / 8 % 2 * 2 + lane / 4 % 2;
  uint8_t* tile = a.codes + (token / kTokenTile * a.groups + group) * kTileGroupBytes;
  reinterpret_cast<uint32_t*>(tile)[(vector * 32 + fragment_lane) * 4 + fragment_word] = word;
}

// Scheme group: a warp a token and group.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32) quantize_groups(Args a) {
  ptx::wait_for_previous_kernel();
  // Only now: the GEMM reads weights before it waits for this kernel, and whoever wrote them has finished.
  ptx::launch_dependents();
  const int lane = threadIdx.x % 32;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (group >= a.groups) return;
  for (int64_t token = blockIdx.y; token < a.m; token += gridDim.y) {
    float v[4];
    const int largest = __reduce_max_sync(~0u, load_rotated<T>(a, token, group, lane, v));
    const Scale scale = scale_of(largest, a.rotate, a.qmax);
    store(a, token, group, lane, v, scale.inverse);
    if (lane == 0) a.scales[(token / kTokenTile * a.groups + group) * kTokenTile + token % kTokenTile] = scale.scale;
  }
}

// The largest over all threads of a cluster (before sm_90: of the thread block).
__device__ int max_of_cluster(int largest) {
  __shared__ int of_warp[kWarps];
  const int lane = threadIdx.x % 32;
  largest = __reduce_max_sync(~0u, largest);
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
  if (lane == 0) of_warp[threadIdx.x / 32] = largest;
  synchronize();
  for (int i = lane; i < blocks * kWarps; i += 32) largest = max(largest, warps_of(i / kWarps)[i % kWarps]);
  synchronize();  // nobody leaves, or writes for the next token, while others read
  return __reduce_max_sync(~0u, largest);
}

// Scheme channel: a cluster of gridDim.x thread blocks a token. Groups beyond those kept in registers are read again.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32) quantize_tokens(Args a) {
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  constexpr int kKept = 8;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t token = blockIdx.y; token < a.m; token += gridDim.y) {
    float kept[kKept][4];
    int largest = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * stride < a.groups)
        largest = max(largest, load_rotated<T>(a, token, first + i * stride, lane, kept[i]));
    }
    for (int64_t group = first + kKept * stride; group < a.groups; group += stride) {
      float v[4];
      largest = max(largest, load_rotated<T>(a, token, group, lane, v));
    }
    const Scale scale = scale_of(max_of_cluster(largest), a.rotate, a.qmax);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * stride < a.groups) store(a, token, first + i * stride, lane, kept[i], scale.inverse);
    }
    for (int64_t group = first + kKept * stride; group < a.groups; group += stride) {
      float v[4];
      load_rotated<T>(a, token, group, lane, v);
      store(a, token, group, lane, v, scale.inverse);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) a.scales[token] = scale.scale;
  }
}

__global__ void export_kernel(int64_t m, int64_t groups, bool per_group, const uint8_t* tiles, const float* in_scales,
                              int8_t* codes, float* scales) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= m * groups * kGroup) return;
  const int k = static_cast<int>(index % kGroup);
  const int64_t group = index / kGroup % groups;
  const int64_t token = index / kGroup / groups;
  const int64_t tile = token / kTokenTile * groups + group;
  const int t = k % 16 / 4;
  const int word = k / 32 % 2 * 2 + k / 16 % 2;
  const int lane = static_cast<int>(token % kTokenTile) * 4 + t;
  codes[index] = static_cast<int8_t>(tiles[tile * kTileGroupBytes + ((k / 64 * 32 + lane) * 4 + word) * 4 + k % 4]);
  if (k != 0) return;
  if (per_group) {
    scales[token * groups + group] = in_scales[tile * kTokenTile + token % kTokenTile];
  } else if (group == 0) {
    scales[token] = in_scales[token];
  }
}

template <typename T>
void launch_for(cudaStream_t stream, const Device& device, const Args& args, bool per_group) {
  constexpr int64_t kMaxGridY = 65535;
  const auto tokens = static_cast<unsigned>(std::min(args.m, kMaxGridY));
  const auto blocks = static_cast<unsigned>(ceil_div(args.groups, kWarps));
  Launch how{.grid = dim3(blocks, tokens), .block = dim3(kWarps * 32), .overlapped = device.has_sm90};
  if (per_group) {
    launch(stream, "quantize_activation", quantize_groups<T>, how, args);
  } else {
    how.cluster = device.has_sm90 ? std::min<unsigned>(blocks, kMaxCluster) : 1;
    how.grid.x = how.cluster;
    launch(stream, "quantize_activation", quantize_tokens<T>, how, args);
  }
}

}  // namespace

void quantize_activation(cudaStream_t stream, const Device& device, const flexq_activation_desc& desc, const void* x,
                         flexq_dtype dtype, int64_t ldx, void* quantized) {
  const ActivationLayout layout(desc);
  auto* bytes = static_cast<uint8_t*>(quantized);
  const size_t four = 4 * (dtype == FLEXQ_F32 ? 4 : 2);
  const bool vectors = reinterpret_cast<uintptr_t>(x) % four == 0 && ldx % 4 == 0;
  const Args args{x,
                  ldx,
                  desc.m,
                  desc.k,
                  num_groups(desc.k),
                  act_max_code(desc.act_bits),
                  desc.rotation == FLEXQ_ROTATION_HADAMARD128,
                  vectors,
                  bytes,
                  reinterpret_cast<float*>(bytes + layout.scales)};
  const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  switch (dtype) {
    case FLEXQ_F16:
      return launch_for<__half>(stream, device, args, per_group);
    case FLEXQ_BF16:
      return launch_for<__nv_bfloat16>(stream, device, args, per_group);
    default:
      return launch_for<float>(stream, device, args, per_group);
  }
}

void activation_export(cudaStream_t stream, const flexq_activation_desc& desc, const void* quantized, int8_t* codes,
                       float* scales) {
  const ActivationLayout layout(desc);
  const auto* bytes = static_cast<const uint8_t*>(quantized);
  constexpr int kThreads = 256;
  const int64_t groups = num_groups(desc.k);
  const auto blocks = static_cast<unsigned>(ceil_div(desc.m * groups * kGroup, kThreads));
  export_kernel<<<blocks, kThreads, 0, stream>>>(desc.m, groups, desc.scheme == FLEXQ_SCHEME_GROUP, bytes,
                                                 reinterpret_cast<const float*>(bytes + layout.scales), codes, scales);
  check(cudaGetLastError(), "activation_export");
}

}  // namespace flexq::cuda
