// What is between the two GEMMs: h = f(gate) * up of a pair, a group of 128 at a time.
#pragma once

#include <cmath>

#include "cuda/experts/kernels.h"
#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda::experts {

// The values that a lane of a warp has of a group.
using Lane = quantize::Part<32>;
using Values = float[Lane::kValues];
static_assert(Lane::kVectors == 1, "a lane's values are neighbours");

struct HiddenRows {
  const void* u;  // [rows][2I]
  int64_t intermediate;
  flexq_gate_function function;
  bool interleaved;
  float alpha, limit, up_offset;

  // As they are stored: the gate's four and up's, or the eight of both.
  template <typename T>
  struct Stored {
    quantize::Vector<T, Lane::kValues> first, second;
  };

  template <typename T>
  __device__ Stored<T> load_stored(const quantize::Params& p, const Lane& part, int64_t row, int64_t group) const {
    const T* values = static_cast<const T*>(u) + row * 2 * intermediate;
    if (!interleaved) {
      return {part.load_stored<T>(p, values, 0, 0, group).vectors[0],
              part.load_stored<T>(p, values + intermediate, 0, 0, group).vectors[0]};
    }
    constexpr int kCount = Lane::kValues;
    const int64_t at = group * kGroup + part.k(0);
    Stored<T> stored;
    if (p.vectors && at + kCount <= intermediate) {
      const auto* vectors = reinterpret_cast<const quantize::Vector<T, kCount>*>(values + 2 * at);
      stored.first = vectors[0];
      stored.second = vectors[1];
    } else {
      const auto value = [&](int64_t i) { return i < 2 * intermediate ? values[i] : quantize::from_float<T>(0.0f); };
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        stored.first.value[i] = value(2 * at + i);
        stored.second.value[i] = value(2 * at + kCount + i);
      }
    }
    return stored;
  }

  // h, rounded as the unfused operations would; zeros past the end of the row.
  template <typename T>
  __device__ void compute(const Lane& part, const Stored<T>& stored, int64_t group, Values& v) const {
    constexpr int kHalf = Lane::kValues / 2;
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) {
      const auto& both = i < kHalf ? stored.first : stored.second;  // of the interleaved
      const int at = i % kHalf * 2;
      const float of_gate = quantize::to_float(interleaved ? both.value[at] : stored.first.value[i]);
      const float of_up = quantize::to_float(interleaved ? both.value[at + 1] : stored.second.value[i]);
      const bool there = group * kGroup + part.k(0) + i < intermediate;
      v[i] = there ? quantize::rounded<T>(quantize::rounded<T>(gate(of_gate)) *
                                          quantize::rounded<T>(clamped(of_up) + up_offset))
                   : 0.0f;
    }
  }

 private:
  // Comparisons that NaN fails, so that it stays.
  __device__ float clamped(float up) const { return up < -limit ? -limit : limit < up ? limit : up; }

  __device__ float gate(float g) const {
    constexpr float kInverseSqrt2 = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f;
    if (limit < g) g = limit;
    switch (function) {
      case FLEXQ_GATE_GELU:
        return 0.5f * g * (1.0f + erff(g * kInverseSqrt2));
      case FLEXQ_GATE_GELU_TANH:
        return 0.5f * g * (1.0f + tanhf(kSqrt2OverPi * (g + 0.044715f * g * g * g)));
      default:
        return __fdiv_rn(g, 1.0f + expf(-alpha * g));
    }
  }
};

inline HiddenRows hidden_rows(const flexq_experts_desc& desc, const void* u) {
  return {.u = u,
          .intermediate = desc.intermediate,
          .function = static_cast<flexq_gate_function>(desc.function),
          .interleaved = desc.layout == FLEXQ_GATE_UP_INTERLEAVED,
          .alpha = desc.alpha,
          .limit = desc.limit > 0.0f ? desc.limit : INFINITY,
          .up_offset = desc.up_offset};
}

// Of both halves of a row of u, where they are halves.
inline bool hidden_rows_are_vectors(const HiddenRows& rows, flexq_dtype dtype) {
  return quantize::rows_are_vectors(rows.u, rows.interleaved ? 2 * rows.intermediate : rows.intermediate, dtype);
}

}  // namespace flexq::cuda::experts
