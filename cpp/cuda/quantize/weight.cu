// Weights rounded to nearest into the canonical format: the CPU's arithmetic (core/quantize_weight.cpp) in its order,
// and so its bits.
#include <cfloat>
#include <vector>

#include "core/error.h"
#include "core/quantize_weight.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda {
namespace {

using quantize::Part;
constexpr int kWarps = 8;
using Lane = Part<32>;
using Values = float[Lane::kValues];

struct WeightParams {
  quantize::Params of_rows;  // how groups of w are read
  const void* w;
  int64_t n, ldw;
  int bits;
  ScaleShares shares;
  uint8_t* planes;
  uint16_t* scales;
};

// What is wrong, if anything.
struct Findings {
  static constexpr unsigned long long kNone = ~0ull;
  unsigned long long where;     // the smallest index of what must be refused
  unsigned long long vanished;  // scales that vanish
};

template <typename T>
__device__ void load_group(const WeightParams& p, const Lane& part, int64_t row, int64_t group, Values& v) {
  part.load<T>(p.of_rows, p.w, p.ldw, row, group, v);
  if (!p.of_rows.rotate) return;
  part.hadamard(v);
#pragma unroll
  for (float& value : v) value = __fmul_rn(value, kHadamardNorm);
}

// Of a whole group, NaN above all.
__device__ float absmax(const Values& v) {
  int largest = 0;
#pragma unroll
  for (const float value : v) largest = max(largest, __float_as_int(value) & 0x7fffffff);
  return __int_as_float(quantize::largest_of_lanes<32>(largest));
}

__device__ float max_code_of(int bits) { return static_cast<float>((1 << (bits - 1)) - 1); }
__device__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

__device__ float round_to_code(float x, float largest) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float rounded = __fsub_rn(__fadd_rn(x, kMagic), kMagic);
  return fminf(fmaxf(rounded, -largest - 1.0f), largest);
}

__device__ void look_at(const WeightParams& p, Findings* found, float largest, int64_t where) {
  const float scale = quantize::rounded<__half>(__fdiv_rn(largest, max_code_of(p.bits)));
  if (!is_finite(scale)) atomicMin(&found->where, static_cast<unsigned long long>(where));
  if (largest > 0.0f && scale == 0.0f) atomicAdd(&found->vanished, 1ull);
}

// A warp has a row.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) look_kernel(const __grid_constant__ WeightParams p, Findings* found) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.n) return;
  const Lane part(static_cast<int>(threadIdx.x % 32));
  const int64_t groups = p.of_rows.groups;
  float of_row = 0.0f;
  for (int64_t group = 0; group < groups; ++group) {
    Values v;
    load_group<T>(p, part, row, group, v);
    const float largest = absmax(v);
    if (part.lane == 0 && (p.of_rows.per_group || !is_finite(largest))) {
      look_at(p, found, largest, row * groups + group);
    }
    of_row = fmaxf(of_row, largest);
  }
  if (part.lane == 0 && !p.of_rows.per_group) look_at(p, found, of_row, row * groups);
}

// The scale of least squared error. Half a warp tries a candidate: its 16 lanes have the CPU's 16 sums. Lane i keeps
// candidate i's error.
class ScaleSearch {
 public:
  struct Shared {
    float values[kGroup];
    float sums[ScaleShares::kMost][16];
  };

  __device__ ScaleSearch(const WeightParams& p, int lane, float largest, Shared& shared)
      : p_(p), shared_(shared), lane_(lane), max_code_(max_code_of(p.bits)) {
    const float share = p.shares.share[min(lane, ScaleShares::kMost - 1)];
    candidate_ = quantize::rounded<__half>(__fmul_rn(__fdiv_rn(largest, max_code_), share));
    if (lane >= p.shares.count) candidate_ = 0.0f;
  }

  // `shared.values` has a group's.
  __device__ void add() {
    for (int first = 0; first < p_.shares.count; first += 2) {
      const int i = first + lane_ / 16, lane = lane_ % 16;
      const float step = __shfl_sync(~0u, candidate_, i);
      if (i >= p_.shares.count || step == 0.0f) continue;
      const float inverse = __fdiv_rn(1.0f, step);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kGroup; j += 16) {
        const float value = shared_.values[j + lane];
        const float rounded = round_to_code(__fmul_rn(value, inverse), max_code_);
        const float error = __fsub_rn(value, __fmul_rn(rounded, step));
        sum = __fadd_rn(sum, __fmul_rn(error, error));
      }
      shared_.sums[i][lane] = sum;
    }
    __syncwarp();
    if (candidate_ != 0.0f) {
      for (const float sum : shared_.sums[lane_]) error_ = __dadd_rn(error_, static_cast<double>(sum));
    }
    __syncwarp();
  }

  __device__ float best() const {
    double least = __shfl_sync(~0u, error_, 0);
    float scale = __shfl_sync(~0u, candidate_, 0);
    for (int i = 1; i < p_.shares.count; ++i) {
      const double error = __shfl_sync(~0u, error_, i);
      const float candidate = __shfl_sync(~0u, candidate_, i);
      if (candidate == 0.0f || !(error < least)) continue;
      least = error;
      scale = candidate;
    }
    return scale;
  }

 private:
  const WeightParams& p_;
  Shared& shared_;
  int lane_;
  float max_code_;
  float candidate_;  // of this lane; 0: none
  double error_ = 0.0;
};

// Bits p of this lane's four codes, and with its neighbour's a byte of plane p.
__device__ void store_planes(uint8_t* planes, int bits, int lane, const int (&codes)[4]) {
  for (int plane = 0; plane < bits; ++plane) {
    unsigned four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) four |= (static_cast<unsigned>(codes[i]) >> plane & 1u) << i;
    const unsigned next = __shfl_down_sync(~0u, four, 1);
    if (lane % 2 == 0) planes[plane * kPlaneBytes + lane / 2] = static_cast<uint8_t>(four | next << 4);
  }
}

// A warp has a group in scheme group, a row in scheme channel.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) quantize_weight_kernel(const __grid_constant__ WeightParams p) {
  __shared__ ScaleSearch::Shared of_warps[kWarps];
  auto& shared = of_warps[threadIdx.x / 32];
  const Lane part(static_cast<int>(threadIdx.x % 32));
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t groups = p.of_rows.groups;
  const bool per_group = p.of_rows.per_group;
  const int64_t row = per_group ? index / groups : index;
  if (row >= p.n) return;
  const int64_t begin = per_group ? index % groups : 0, end = per_group ? begin + 1 : groups;
  Values v;
  float largest = 0.0f;
  for (int64_t group = begin; group < end; ++group) {
    load_group<T>(p, part, row, group, v);
    largest = fmaxf(largest, absmax(v));
  }
  ScaleSearch search(p, part.lane, largest, shared);
  for (int64_t group = begin; group < end; ++group) {
    if (!per_group) load_group<T>(p, part, row, group, v);
    *reinterpret_cast<float4*>(shared.values + part.k(0)) = {v[0], v[1], v[2], v[3]};
    __syncwarp();
    search.add();
  }
  const float scale = search.best();
  if (part.lane == 0) p.scales[index] = __half_as_ushort(quantize::from_float<__half>(scale));
  for (int64_t group = begin; group < end; ++group) {
    if (!per_group) load_group<T>(p, part, row, group, v);
    int codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = scale == 0.0f ? 0 : static_cast<int>(round_to_code(__fdiv_rn(v[i], scale), max_code_of(p.bits)));
    }
    store_planes(p.planes + (row * groups + group) * p.bits * kPlaneBytes, p.bits, part.lane, codes);
  }
}

__global__ void __launch_bounds__(32 * kWarps)
    look_at_codes_kernel(const int8_t* codes, int64_t ldc, int64_t n, int64_t groups, int bits, Findings* found) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (index >= n * groups) return;
  const int64_t row = index / groups, k = index % groups * kGroup + 4 * lane;
  for (int i = 0; i < 4; ++i) {
    const int code = codes[row * ldc + k + i], past = 1 << (bits - 1);
    if (code < -past || code >= past) {
      atomicMin(&found->where, static_cast<unsigned long long>(row * groups * kGroup + k + i));
    }
  }
}

__global__ void __launch_bounds__(32 * kWarps)
    pack_codes_kernel(const int8_t* codes, int64_t ldc, int64_t n, int64_t groups, int bits, uint8_t* planes) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (index >= n * groups) return;
  const int8_t* from = codes + index / groups * ldc + index % groups * kGroup + 4 * lane;
  const int four[4] = {from[0], from[1], from[2], from[3]};
  store_planes(planes + index * bits * kPlaneBytes, bits, lane, four);
}

// Page-locked host memory that kernels write to: there may be no device memory left where models are loaded.
class HostFindings {
 public:
  HostFindings() {
    check(cudaHostAlloc(&found_, sizeof(Findings), cudaHostAllocPortable | cudaHostAllocMapped), "memory for findings");
  }
  ~HostFindings() { cudaFreeHost(found_); }  // fails at the process's end, when CUDA is gone
  HostFindings(const HostFindings&) = delete;
  HostFindings& operator=(const HostFindings&) = delete;
  Findings* get() const { return found_; }

 private:
  Findings* found_ = nullptr;
};

// Runs look(findings) and gives what it found, once the stream is there.
template <typename Look>
Findings look(cudaStream_t stream, const char* function, const Look& look) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), "capture status");
  require(capturing == cudaStreamCaptureStatusNone, function,
          " waits for its stream, which is being captured: call it before");
  static thread_local const HostFindings findings;
  *findings.get() = {Findings::kNone, 0};
  look(findings.get());
  check(cudaStreamSynchronize(stream), function);
  return *findings.get();
}

template <typename T>
int64_t quantize_as(cudaStream_t stream, const WeightParams& params, const flexq_weight_desc& desc, flexq_dtype dtype) {
  const Launch by_row{.grid = checked_grid("quantize_weight", ceil_div(desc.n, kWarps)), .block = dim3(32 * kWarps)};
  const int64_t groups = params.of_rows.groups, warps = params.of_rows.per_group ? desc.n * groups : desc.n;
  const Launch by_scale{.grid = checked_grid("quantize_weight", ceil_div(warps, kWarps)), .block = dim3(32 * kWarps)};
  const Findings found = look(stream, "flexq_quantize_weight", [&](Findings* to) {
    launch(stream, "quantize_weight", look_kernel<T>, by_row, params, to);
  });
  if (found.where != Findings::kNone) {
    const auto where = static_cast<int64_t>(found.where);
    std::vector<T> row(static_cast<size_t>(desc.k));
    check(cudaMemcpyAsync(row.data(), static_cast<const T*>(params.w) + where / groups * params.ldw,
                          row.size() * sizeof(T), cudaMemcpyDeviceToHost, stream),
          "a refused row");
    check(cudaStreamSynchronize(stream), "a refused row");
    refuse_weight(desc, row.data(), dtype, 0, where / groups, where % groups);
  }
  launch(stream, "quantize_weight", quantize_weight_kernel<T>, by_scale, params);
  return static_cast<int64_t>(found.vanished);
}

}  // namespace

int64_t quantize_weight(cudaStream_t stream, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                        int64_t ldw, uint8_t* planes, uint16_t* scales) {
  WeightParams params{};
  params.of_rows.m = desc.n;
  params.of_rows.k = desc.k;
  params.of_rows.groups = num_groups(desc.k);
  params.of_rows.rotate = desc.rotation == FLEXQ_ROTATION_HADAMARD128;
  params.of_rows.per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  params.of_rows.vectors = quantize::rows_are_vectors(w, ldw, dtype);
  params.w = w;
  params.n = desc.n;
  params.ldw = ldw;
  params.bits = desc.weight_bits;
  params.shares = scale_shares(desc.weight_bits);
  params.planes = planes;
  params.scales = scales;
  return quantize::dispatch_type(dtype,
                                 [&](auto type) { return quantize_as<decltype(type)>(stream, params, desc, dtype); });
}

void pack_codes(cudaStream_t stream, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc, uint8_t* planes) {
  const int64_t groups = num_groups(desc.k);
  const int bits = desc.weight_bits;
  const Launch how{.grid = checked_grid("pack_codes", ceil_div(desc.n * groups, kWarps)), .block = dim3(32 * kWarps)};
  const Findings found = look(stream, "flexq_pack_codes", [&](Findings* to) {
    launch(stream, "pack_codes", look_at_codes_kernel, how, codes, ldc, desc.n, groups, bits, to);
  });
  if (found.where != Findings::kNone) {
    const auto where = static_cast<int64_t>(found.where), row = where / (groups * kGroup),
               k = where % (groups * kGroup);
    int8_t code = 0;
    check(cudaMemcpyAsync(&code, codes + row * ldc + k, 1, cudaMemcpyDeviceToHost, stream), "a refused code");
    check(cudaStreamSynchronize(stream), "a refused code");
    refuse_code(bits, row, k, code);
  }
  launch(stream, "pack_codes", pack_codes_kernel, how, codes, ldc, desc.n, groups, bits, planes);
}

}  // namespace flexq::cuda
