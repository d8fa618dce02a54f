// Activation quantization that every instruction set shares, over a policy Q:
//   Q::load<T>   128 values (zero-padded) as floats, rotated if asked; returns the largest magnitude's bits
//   Q::encode    codes = rint(values * inverse), clamped; returns their sum
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/float_types.h"
#include "core/hadamard.h"
#include "cpu/kernels.h"

namespace flexq::cpu {

namespace {  // a copy for each instruction set that includes this

struct PortableQuantizer {
  template <typename T>
  static int32_t load(const T* x, int count, bool rotate, float* values) {
    for (int i = 0; i < count; ++i) values[i] = to_float(x[i]);
    for (int i = count; i < kGroup; ++i) values[i] = 0.0f;
    if (rotate) hadamard128(values);
    int32_t largest = 0;
    for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::bit_cast<int32_t>(values[i]) & 0x7fffffff);
    return largest;
  }

  static int32_t encode(const float* values, float inverse, int qmax, int8_t* codes) {
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
      const int code = static_cast<int>(std::nearbyint(values[i] * inverse));
      codes[i] = static_cast<int8_t>(std::clamp(code, -qmax, qmax));
      sum += codes[i];
    }
    return sum;
  }
};

}  // namespace

template <typename Q>
struct QuantizeKernel {
  struct Scale {
    float scale;
    float inverse;  // 0 where all codes are 0
    bool finite;
  };

  static Scale scale_of(int32_t largest_bits, bool rotate, int qmax) {
    const float largest = std::bit_cast<float>(largest_bits);
    if (!std::isfinite(largest)) return {std::numeric_limits<float>::quiet_NaN(), 0.0f, false};
    const float scale = (rotate ? largest * kHadamardNorm : largest) / static_cast<float>(qmax);
    if (scale < FLT_MIN) return {0.0f, 0.0f, true};
    return {scale, static_cast<float>(qmax) / largest, true};
  }

  // What an unfused operation would have stored and read back.
  template <typename T>
  static float rounded(float x) {
    return to_float(from_float<T>(x));
  }

  // A token's groups, whatever they are quantized from.
  template <typename T>
  class Rows {
   public:
    Rows(const QuantizeArgs& args, int64_t t)
        : source_(args.source),
          k_(args.desc.k),
          rotate_(args.desc.rotation == FLEXQ_ROTATION_HADAMARD128),
          x_(static_cast<const T*>(source_.x) + t * source_.ldx) {
      if (source_.other != nullptr) other_ = static_cast<const T*>(source_.other) + t * source_.ld_other;
      if (source_.kind == ActivationSource::kRmsNorm) start_norm(t);
    }

    // The group's values, rotated if asked, and the largest magnitude's bits.
    int32_t load(int64_t group, float* values) const {
      const int64_t begin = group * kGroup;
      const int count = static_cast<int>(std::min<int64_t>(kGroup, k_ - begin));
      if (source_.kind == ActivationSource::kPlain) return Q::load(x_ + begin, count, rotate_, values);
      alignas(64) float fused[kGroup];
      source_.kind == ActivationSource::kRmsNorm ? norm(begin, count, fused) : silu_mul(begin, count, fused);
      return Q::load(static_cast<const float*>(fused), count, rotate_, values);
    }

   private:
    float residual_sum(int64_t k) const {
      const float x = to_float(x_[k]);
      return other_ == nullptr ? x : rounded<T>(x + to_float(other_[k]));
    }

    void start_norm(int64_t t) {
      double squares = 0.0;
      T* sum = source_.sum == nullptr ? nullptr : static_cast<T*>(source_.sum) + t * source_.ld_sum;
      for (int64_t k = 0; k < k_; ++k) {
        const float h = residual_sum(k);
        if (sum != nullptr) sum[k] = from_float<T>(h);
        squares += static_cast<double>(h) * h;
      }
      if (sum != nullptr) {  // perhaps in the place of what it was added up from
        x_ = sum;
        other_ = nullptr;
      }
      norm_ = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(k_) + static_cast<double>(source_.eps)));
    }

    // Loops with nothing in them but arithmetic, which the compiler turns into vectors.
    void norm(int64_t begin, int count, float* values) const {
      const T *x = x_ + begin, *weight = static_cast<const T*>(source_.weight) + begin;
      const float factor = norm_;
      if (other_ != nullptr) {
        for (int i = 0; i < count; ++i) values[i] = residual_sum(begin + i);
      } else {
        for (int i = 0; i < count; ++i) values[i] = to_float(x[i]);
      }
      for (int i = 0; i < count; ++i) values[i] = rounded<T>(rounded<T>(values[i] * factor) * to_float(weight[i]));
    }

    void silu_mul(int64_t begin, int count, float* values) const {
      const T *gate = x_ + begin, *up = other_ + begin;
      for (int i = 0; i < count; ++i) values[i] = std::exp(-to_float(gate[i]));
      for (int i = 0; i < count; ++i) {
        values[i] = rounded<T>(rounded<T>(to_float(gate[i]) / (1.0f + values[i])) * to_float(up[i]));
      }
    }

    const ActivationSource& source_;
    int64_t k_;
    bool rotate_;
    const T* x_;
    const T* other_ = nullptr;
    float norm_ = 1.0f;
  };

  template <typename T>
  static void token(const QuantizeArgs& args, int64_t t) {
    const auto& desc = args.desc;
    const int64_t groups = num_groups(desc.k);
    const bool rotate = desc.rotation == FLEXQ_ROTATION_HADAMARD128;
    const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
    const int qmax = act_max_code(desc.act_bits);
    const Rows<T> rows(args, t);
    alignas(64) float values[kGroup];
    Scale scale{};
    if (!per_group) {
      int32_t largest = 0;
      for (int64_t g = 0; g < groups; ++g) largest = std::max(largest, rows.load(g, values));
      scale = scale_of(largest, rotate, qmax);
      args.act.scales[t] = scale.scale;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * desc.m + t;
      const int32_t largest = rows.load(g, values);
      if (per_group) {
        scale = scale_of(largest, rotate, qmax);
        args.act.scales[at] = scale.scale;
      }
      int8_t* codes = args.act.codes + at * kGroup;
      if (scale.finite) {
        args.act.sums[at] = Q::encode(values, scale.inverse, qmax, codes);
      } else {
        std::memset(codes, 0, kGroup);
        args.act.sums[at] = 0;
      }
    }
  }

  static void run(const QuantizeArgs& args, int64_t token_begin, int64_t token_end) {
    dispatch_dtype(args.source.dtype, [&](auto type) {
      for (int64_t t = token_begin; t < token_end; ++t) token<decltype(type)>(args, t);
    });
  }
};

}  // namespace flexq::cpu
