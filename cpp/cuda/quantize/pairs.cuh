// The quantizer where the whole token decides, of two tokens a CTA: scheme channel, and a fused RMS norm in either
// scheme.
#pragma once

#include "cuda/quantize/group_part.cuh"
#include "cuda/quantize/token_reduce.cuh"

namespace flexq::cuda::quantize {

// Rows that are vectors of 16-bit values, of up to kMaxPairGroups groups: each thread keeps 32 values in registers from
// the first load to the codes.
template <typename T, ActivationSource::Kind kKind>
__global__ void __launch_bounds__(kMaxPairThreads) quantize_pairs(const __grid_constant__ Params p) {
  using Lanes = Part<4>;
  using Words = Packed<T>;
  static_assert(sizeof(T) == 2);  // floats take more registers than there are
  constexpr int kTokenLanes = 32 / kPairTokens;
  using Reduce = TokenReduce<kTokenLanes, kMaxPairThreads, 1>;
  constexpr int kVectorWords = Lanes::kCount / Words::kCount;
  using RowVector = Vector<uint32_t, kVectorWords>;
  using Row = RowVector[Lanes::kVectors];  // this thread's part of it
  __shared__ typename Reduce::Table for_norm[2], for_scale[2];
  ptx::launch_dependents();
  const ActivationSource& s = p.source;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Lanes part(lane);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kPairTokens + lane / kTokenLanes;
  const int64_t group = threadIdx.x / 32 * kPairWarpGroups + lane % kTokenLanes / 4;
  const int64_t first_k = group * kGroup;
  const bool valid = token < p.m;
  const Reduce reduce(1, 0);

  // Zeros past the end of the row.
  const auto load = [&](const void* rows, int64_t offset, Row& to) {
    const T* row = static_cast<const T*>(rows) + offset + first_k;
#pragma unroll
    for (int i = 0; i < Lanes::kVectors; ++i) {
      to[i] = {};
      if (valid && first_k + part.k(i) < p.k) to[i] = *reinterpret_cast<const RowVector*>(row + part.k(i));
    }
  };
  const auto for_words = [](Row& row, const auto& use) {
#pragma unroll
    for (int i = 0; i < Lanes::kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kVectorWords; ++j) {
        float values[Words::kCount];
        Words::unpack(row[i].value[j], values);
        use(row[i].value[j], values, i, j);
      }
    }
  };

  ptx::wait_for_previous_kernel();
  Row row;
  load(s.x, token * s.ldx, row);
  Row weights;
  if constexpr (kKind == ActivationSource::kRmsNorm) {
    // Ahead of the sums' stores, which could be to the same place for all that the compiler knows.
    load(s.weight, 0, weights);
  }
  if constexpr (kKind != ActivationSource::kPlain) {
    if (s.other != nullptr) {
      Row other;
      load(s.other, token * s.ld_other, other);
      for_words(row, [&](uint32_t& word, float (&values)[Words::kCount], int i, int j) {
        if constexpr (kKind == ActivationSource::kSiluMul) {
#pragma unroll
          for (float& value : values) value = silu<T>(value);
          word = Words::multiply(Words::pack(values), other[i].value[j]);
        } else {
          word = Words::add(word, other[i].value[j]);
        }
      });
    }
  }
  if constexpr (kKind == ActivationSource::kRmsNorm) {
    if (s.sum != nullptr && valid) {
      T* sum = static_cast<T*>(s.sum) + token * s.ld_sum + first_k;
#pragma unroll
      for (int i = 0; i < Lanes::kVectors; ++i) {
        if (first_k + part.k(i) < p.k) *reinterpret_cast<RowVector*>(sum + part.k(i)) = row[i];
      }
    }
    float squares = 0.0f;
    for_words(row, [&](uint32_t, const float (&values)[Words::kCount], int, int) {
#pragma unroll
      for (const float value : values) squares += value * value;
    });
    const float norm = rsqrtf(reduce.sum(squares, for_norm, 0) / static_cast<float>(p.k) + s.eps);
    for_words(row, [&](uint32_t& word, float (&values)[Words::kCount], int i, int j) {
#pragma unroll
      for (float& value : values) value *= norm;
      word = Words::multiply(Words::pack(values), weights[i].value[j]);
    });
  }

  float v[Lanes::kValues];
  for_words(row, [&](uint32_t, const float (&values)[Words::kCount], int i, int j) {
#pragma unroll
    for (int n = 0; n < Words::kCount; ++n) v[i * Lanes::kCount + j * Words::kCount + n] = values[n];
  });
  const int largest = part.rotate_and_max(p, v);
  const bool stores = valid && group < p.groups;
  if (p.per_group) {
    const int of_group = largest_of_lanes<4>(largest);
    if (stores) store_group(p, part, token, group, v, of_group);
    return;
  }
  const Scale scale = scale_of(reduce.largest(largest, for_scale, 0), p.rotate, p.qmax);
  if (stores) part.store_codes(p, token, group, v, scale.inverse);
  if (valid && threadIdx.x % kTokenLanes == 0 && threadIdx.x < 32) p.scales[token] = scale.scale;
}

}  // namespace flexq::cuda::quantize
