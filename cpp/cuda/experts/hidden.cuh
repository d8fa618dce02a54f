// What is between the two GEMMs: h = f(gate) * up of a pair, a lane's part of a group of 128 at a time.
#pragma once

#include <cmath>

#include "cuda/experts/kernels.h"
#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda::experts {

// A warp has a group of a pair, or where there are many that of a tile of 8.
using Lane = quantize::Part<32>;
using Values = float[Lane::kValues];
using TileLane = quantize::Part<4>;
using TileValues = float[TileLane::kValues];

// kSilu: plain SiLU(gate) * up of halves, the usual case.
template <bool kSilu = false>
struct HiddenRows {
  const void* u;  // [rows][2I]
  int64_t intermediate;
  flexq_gate_function function;
  bool interleaved;
  float alpha, limit, up_offset;

  // A lane's values of h, rounded as the unfused operations would; zeros past the end of the row.
  template <typename T, typename Part>
  __device__ void load(const quantize::Params& p, const Part& part, int64_t row, int64_t group,
                       float (&v)[Part::kValues]) const {
    constexpr int kAhead = 2;  // vectors whose loads are started together: more take more registers
#pragma unroll
    for (int i = 0; i < Part::kVectors; ++i) {
      if (i > 0 && i % kAhead == 0) asm volatile("" ::: "memory");
      load_vector<T, Part::kCount>(p, row, group * kGroup + part.k(i), v + i * Part::kCount);
    }
  }

 private:
  template <typename T, int kCount>
  __device__ void load_vector(const quantize::Params& p, int64_t row, int64_t at, float* v) const {
    using Vector = quantize::Vector<T, kCount>;
    const T* values = static_cast<const T*>(u) + row * 2 * intermediate;
    const bool halves = kSilu || !interleaved;
    // The gate's and up's, or the first and the last of both.
    const T *first = values + (halves ? at : 2 * at), *second = first + (halves ? intermediate : kCount);
    Vector a, b;
    if (p.vectors && at + kCount <= intermediate) {
      a = *reinterpret_cast<const Vector*>(first);
      b = *reinterpret_cast<const Vector*>(second);
    } else {
      const int64_t left = intermediate - at, left_first = halves ? left : 2 * left;
      const int64_t left_second = halves ? left : 2 * left - kCount;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        a.value[j] = j < left_first ? first[j] : quantize::from_float<T>(0.0f);
        b.value[j] = j < left_second ? second[j] : quantize::from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kSilu) {  // of zeros, which there are past the end of the row, it is zero
        v[j] = quantize::rounded<T>(quantize::rounded<T>(quantize::silu<T>(quantize::to_float(a.value[j]))) *
                                    quantize::to_float(b.value[j]));
      } else {
        const Vector& both = j < kCount / 2 ? a : b;  // of the interleaved
        const int pair = j % (kCount / 2) * 2;
        const float of_gate = quantize::to_float(halves ? a.value[j] : both.value[pair]);
        const float of_up = quantize::to_float(halves ? b.value[j] : both.value[pair + 1]);
        v[j] = at + j < intermediate ? quantize::rounded<T>(quantize::rounded<T>(gate<T>(of_gate)) *
                                                            quantize::rounded<T>(clamped(of_up) + up_offset))
                                     : 0.0f;
      }
    }
  }

  // Comparisons that NaN fails, so that it stays.
  __device__ float clamped(float up) const { return up < -limit ? -limit : limit < up ? limit : up; }

  template <typename T>
  __device__ float gate(float g) const {
    constexpr float kInverseSqrt2 = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f;
    if (limit < g) g = limit;
    switch (function) {
      case FLEXQ_GATE_GELU:
        return 0.5f * g * (1.0f + erff(g * kInverseSqrt2));
      case FLEXQ_GATE_GELU_TANH:
        return 0.5f * g * (1.0f + tanhf(kSqrt2OverPi * (g + 0.044715f * g * g * g)));
      default:
        return quantize::silu<T>(g, alpha);
    }
  }
};

template <bool kSilu = false>
HiddenRows<kSilu> hidden_rows(const flexq_experts_desc& desc, const void* u) {
  return {.u = u,
          .intermediate = desc.intermediate,
          .function = static_cast<flexq_gate_function>(desc.function),
          .interleaved = desc.layout == FLEXQ_GATE_UP_INTERLEAVED,
          .alpha = desc.alpha,
          .limit = desc.limit > 0.0f ? desc.limit : INFINITY,
          .up_offset = desc.up_offset};
}

inline bool is_plain_silu(const flexq_experts_desc& desc) {
  return desc.function == FLEXQ_GATE_SILU && desc.layout == FLEXQ_GATE_UP_CONCATENATED && desc.alpha == 1.0f &&
         !(desc.limit > 0.0f) && desc.up_offset == 0.0f;
}

// Of both halves of a row of u, where they are halves.
inline bool hidden_rows_are_vectors(const flexq_experts_desc& desc, const void* u, flexq_dtype dtype) {
  const bool interleaved = desc.layout == FLEXQ_GATE_UP_INTERLEAVED;
  return quantize::rows_are_vectors(u, interleaved ? 2 * desc.intermediate : desc.intermediate, dtype);
}

}  // namespace flexq::cuda::experts
