// The quantizer with a fused RMS norm, of many tokens.
#pragma once

#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda::quantize {

constexpr int kNormWarps = kTokenTile;  // of a CTA: one for each token of its tile

// Rows of a tile in shared memory, in vectors of 16 bytes: four lanes read neighbouring ones, and two rows side by side
// lie in different banks.
template <typename T>
constexpr int64_t norm_row_stride(int64_t k) {
  constexpr int kBankVectors = 8;  // of all banks
  const int64_t vectors = ceil_div(k * static_cast<int64_t>(sizeof(T)), int64_t{16});
  return ceil_div(vectors, int64_t{kBankVectors}) * kBankVectors + kBankVectors / 2;
}
template <typename T>
constexpr size_t norm_shared_bytes(int64_t k) {
  return static_cast<size_t>((kTokenTile + 1) * norm_row_stride<T>(k)) * 16;  // the weight is one more
}

// A CTA has a tile of 8 tokens. First each warp adds up a token's squares, and keeps the token in shared memory; then
// warps share the groups of all of them. Nothing is read twice from global memory, and no warp waits for those of other
// CTAs. In scheme channel values are computed again, once a token's scale is known. k must be a multiple of a vector,
// and all rows aligned to vectors.
template <typename T>
__global__ void __launch_bounds__(32 * kNormWarps, 3) quantize_norms(const __grid_constant__ Params p) {
  using Values = float[Part<4>::kValues];
  constexpr int kCount = 16 / static_cast<int>(sizeof(T));  // values of a vector
  using Loaded = Vector<T, kCount>;
  extern __shared__ uint4 rows[];
  __shared__ float norms[kTokenTile];
  __shared__ int largest_of_warps[kNormWarps][kTokenTile];
  ptx::launch_dependents();
  const ActivationSource& s = p.source;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const auto stride = static_cast<int>(norm_row_stride<T>(p.k)), vectors = static_cast<int>(p.k / kCount);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokenTile;
  ptx::wait_for_previous_kernel();
  uint4* weights = rows + kTokenTile * stride;
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += 32 * kNormWarps) {
    ptx::cp_async_16_zfill(ptx::shared_address(weights + i), static_cast<const uint4*>(s.weight) + i, 16);
  }
  ptx::cp_async_commit();

  if (first + warp < p.m) {
    const int64_t token = first + warp;
    const auto* x = reinterpret_cast<const Loaded*>(static_cast<const T*>(s.x) + token * s.ldx);
    const auto* other = reinterpret_cast<const Loaded*>(static_cast<const T*>(s.other) + token * s.ld_other);
    auto* sum = reinterpret_cast<Loaded*>(static_cast<T*>(s.sum) + token * s.ld_sum);
    auto* kept = reinterpret_cast<Loaded*>(rows + warp * stride);
    float squares = 0.0f;
    // Loads do not pass stores, since the sum may take the place of what is added.
    constexpr int kAtOnce = 4;
    for (int begin = lane; begin < vectors; begin += 32 * kAtOnce) {
      Loaded h[kAtOnce]{}, b[kAtOnce]{};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + 32 * n;
        if (i < vectors) h[n] = x[i];
        if (i < vectors && s.other != nullptr) b[n] = other[i];
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + 32 * n;
        if (i >= vectors) break;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (s.other != nullptr) {
            h[n].value[j] = from_float<T>(to_float(h[n].value[j]) + to_float(b[n].value[j]));
          }
          squares += to_float(h[n].value[j]) * to_float(h[n].value[j]);
        }
        if (s.sum != nullptr) sum[i] = h[n];
        kept[i] = h[n];
      }
    }
    squares = sum_of_lanes<32>(squares);
    if (lane == 0) norms[warp] = rsqrtf(squares / static_cast<float>(p.k) + s.eps);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  const Part<4> part(lane);
  const int within = lane / 4;
  const int64_t token = first + within;
  const bool valid = token < p.m;
  const float norm = valid ? norms[within] : 0.0f;
  const T* row = reinterpret_cast<const T*>(rows + within * stride);
  // This lane's values of a group, ready to be quantized, and its largest.
  const auto read = [&](int64_t group, Values& v) {
    using Eight = Vector<T, Part<4>::kCount>;
    const int64_t at = group * kGroup;
#pragma unroll
    for (int i = 0; i < Part<4>::kVectors; ++i) {
      const int64_t k = at + part.k(i);
      Eight h{}, weight{};
      if (valid && k < p.k) {
        h = *reinterpret_cast<const Eight*>(row + k);
        weight = *reinterpret_cast<const Eight*>(reinterpret_cast<const T*>(weights) + k);
      }
#pragma unroll
      for (int j = 0; j < Part<4>::kCount; ++j) {
        v[i * Part<4>::kCount + j] = rounded<T>(rounded<T>(to_float(h.value[j]) * norm) * to_float(weight.value[j]));
      }
    }
    return part.rotate_and_max(p, v);
  };
  if (p.per_group) {
#pragma unroll 1
    for (int64_t group = warp; group < p.groups; group += kNormWarps) {
      Values v;
      const int of_group = largest_of_lanes<4>(read(group, v));
      if (valid) store_group(p, part, token, group, v, of_group);
    }
    return;
  }
  int largest = 0;
#pragma unroll 1
  for (int64_t group = warp; group < p.groups; group += kNormWarps) {
    Values v;
    largest = max(largest, read(group, v));
  }
  largest = largest_of_lanes<4>(largest);
  if (part.lane == 0) largest_of_warps[warp][within] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kNormWarps; ++w) largest = max(largest, largest_of_warps[w][within]);
  const Scale scale = scale_of(largest, p.rotate, p.qmax);
#pragma unroll 1
  for (int64_t group = warp; group < p.groups; group += kNormWarps) {
    Values v;
    read(group, v);
    if (valid) part.store_codes(p, token, group, v, scale.inverse);
  }
  if (valid && warp == 0 && part.lane == 0) p.scales[token] = scale.scale;
}

}  // namespace flexq::cuda::quantize
