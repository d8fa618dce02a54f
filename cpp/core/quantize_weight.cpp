#include "core/quantize_weight.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "core/error.h"
#include "core/executor.h"
#include "core/float_types.h"
#include "core/format.h"
#include "core/hadamard.h"

namespace flexq {
namespace {

// Group `g` of a row, zero-padded.
template <typename T, typename Float>
void load_plain(const flexq_weight_desc& desc, const T* row, int64_t g, Float* out) {
  const int64_t begin = g * kGroup;
  const int count = static_cast<int>(std::min<int64_t>(kGroup, desc.k - begin));
  for (int i = 0; i < count; ++i) out[i] = Float{to_float(row[begin + i])};
  std::fill(out + count, out + kGroup, Float{0});
}

template <typename Float>
void rotate(const flexq_weight_desc& desc, Float* group) {
  if (desc.rotation != FLEXQ_ROTATION_HADAMARD128) return;
  hadamard128(group);
  for (int i = 0; i < kGroup; ++i) group[i] *= Float{kHadamardNorm};
}

// Group `g` of a row as floats, zero-padded and rotated if the format says so.
template <typename T>
void load_group(const flexq_weight_desc& desc, const T* row, int64_t g, float* out) {
  load_plain(desc, row, g, out);
  rotate(desc, out);
}

// max |x|, or NaN if there is a NaN: without the sign, floats order like their bits, NaN above all.
float absmax(const float* x) {
  int32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(largest);
}

// Nearest, ties to even, for what the scales below leave: far from 2^22. Unlike a call of nearbyint it is vectorized.
float round_to_code(float x, float largest) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float rounded = (x + kMagic) - kMagic;
  return std::clamp(rounded, -largest - 1.0f, largest);
}

// The scale of least squared error: of a few shares of absmax / the largest code, since most values gain by finer steps
// what the largest ones lose.
class ScaleSearch {
 public:
  ScaleSearch(int bits, float largest) : max_code_(static_cast<float>(max_weight_code(bits))) {
    const ScaleShares shares = scale_shares(bits);
    count_ = shares.count;
    for (int i = 0; i < count_; ++i) {
      scales_[i] = from_float<Half>(largest / max_code_ * shares.share[i]);
      stored_[i] = to_float(scales_[i]);
    }
  }

  void add(const float* values) {
    for (int i = 0; i < count_; ++i) {
      if (stored_[i] == 0.0f) continue;
      const float step = stored_[i], inverse = 1.0f / step, max_code = max_code_;
      constexpr int kLanes = 16;  // sums side by side, in this order everywhere
      float sums[kLanes] = {};
      for (int j = 0; j < kGroup; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
          const float error = values[j + l] - round_to_code(values[j + l] * inverse, max_code) * step;
          sums[l] += error * error;
        }
      }
      for (const float sum : sums) errors_[i] += double{sum};
    }
  }

  Half best() const {
    int best = 0;
    for (int i = 1; i < count_; ++i) {
      if (stored_[i] != 0.0f && errors_[i] < errors_[best]) best = i;
    }
    return scales_[best];
  }

 private:
  static constexpr int kMost = ScaleShares::kMost;
  float max_code_;
  int count_;
  Half scales_[kMost];
  float stored_[kMost];
  double errors_[kMost] = {};
};

// Where quantization must stop, found by all threads together: the smallest row * G + group.
class FirstBad {
 public:
  void report(int64_t where) {
    int64_t seen = where_.load(std::memory_order_relaxed);
    while (where < seen && !where_.compare_exchange_weak(seen, where, std::memory_order_relaxed)) {
    }
  }
  bool any() const { return where_.load() != kNone; }
  int64_t where() const { return where_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> where_{kNone};
};

// Of a group or row whose largest value this is, in fp16: 0 where it is too small for any.
float largest_scale(int bits, float largest) {
  return to_float(from_float<Half>(largest / static_cast<float>(max_weight_code(bits))));
}

template <typename T>
[[noreturn]] void refuse(const flexq_weight_desc& desc, const T* w, int64_t ldw, int64_t row, int64_t group) {
  const int64_t groups = num_groups(desc.k);
  for (int64_t k = 0; k < desc.k; ++k) {
    const float value = to_float(w[row * ldw + k]);
    if (!std::isfinite(value)) {
      fail(FLEXQ_BAD_VALUE, "weight[", row, "][", k, "] is ", value, "; weights must be finite");
    }
  }
  const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  double values[kGroup];  // the rotation may overflow floats
  double largest = 0.0, rotated = 0.0;
  for (int64_t g = per_group ? group : 0; g < (per_group ? group + 1 : groups); ++g) {
    load_plain(desc, w + row * ldw, g, values);
    for (const double value : values) largest = std::max(largest, std::abs(value));
    rotate(desc, values);
    for (const double value : values) rotated = std::max(rotated, std::abs(value));
  }
  const bool is_rotated = desc.rotation == FLEXQ_ROTATION_HADAMARD128;
  const int max_code = max_weight_code(desc.weight_bits);
  fail(FLEXQ_BAD_VALUE, "row ", row, per_group ? cat(", group ", group) : std::string(), ": weights up to ", largest,
       is_rotated ? cat(" (", rotated, " after the rotation)") : std::string(), " need a scale of ", rotated / max_code,
       ", which leaves fp16's range; accepted is up to ", kMaxHalf * max_code, is_rotated ? " after the rotation" : "",
       "; rescale the layer or leave it unquantized");
}

template <typename T>
int64_t quantize(const flexq_executor* executor, const flexq_weight_desc& desc, const T* w, int64_t ldw,
                 uint8_t* planes, uint16_t* scales) {
  const int64_t groups = num_groups(desc.k);
  const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  const int bits = desc.weight_bits;
  const auto max_code = static_cast<float>(max_weight_code(bits));

  // A refused call writes nothing, so look at everything first.
  FirstBad bad;
  std::atomic<int64_t> flushed{0};
  const int64_t grain = balanced_grain(executor, desc.n);
  parallel_ranges(executor, desc.n, grain, [&](int64_t begin, int64_t end) {
    float values[kGroup];
    int64_t vanished = 0;
    const auto look_at = [&](float largest, int64_t where) {
      const float scale = largest_scale(bits, largest);
      if (!std::isfinite(scale)) bad.report(where);
      vanished += largest > 0.0f && scale == 0.0f;
    };
    for (int64_t row = begin; row < end && !bad.any(); ++row) {
      float row_max = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        load_group(desc, w + row * ldw, g, values);
        const float largest = absmax(values);
        if (per_group || !std::isfinite(largest)) look_at(largest, row * groups + g);
        row_max = std::max(row_max, largest);
      }
      if (!per_group) look_at(row_max, row * groups);
    }
    flushed.fetch_add(vanished, std::memory_order_relaxed);
  });
  if (bad.any()) refuse(desc, w, ldw, bad.where() / groups, bad.where() % groups);

  parallel_ranges(executor, desc.n, grain, [&](int64_t begin, int64_t end) {
    float values[kGroup];
    int8_t codes[kGroup];
    for (int64_t row = begin; row < end; ++row) {
      Half scale{0};
      if (!per_group) {
        float largest = 0.0f;
        for (int64_t g = 0; g < groups; ++g) {
          load_group(desc, w + row * ldw, g, values);
          largest = std::max(largest, absmax(values));
        }
        ScaleSearch search(bits, largest);
        for (int64_t g = 0; g < groups; ++g) {
          load_group(desc, w + row * ldw, g, values);
          search.add(values);
        }
        scale = search.best();
        scales[row] = scale.bits;
      }
      for (int64_t g = 0; g < groups; ++g) {
        load_group(desc, w + row * ldw, g, values);
        if (per_group) {
          ScaleSearch search(bits, absmax(values));
          search.add(values);
          scale = search.best();
          scales[row * groups + g] = scale.bits;
        }
        const float stored = to_float(scale);
        for (int i = 0; i < kGroup; ++i) {
          codes[i] = stored == 0.0f ? int8_t{0} : static_cast<int8_t>(round_to_code(values[i] / stored, max_code));
        }
        pack_group(bits, codes, planes + (row * groups + g) * group_bytes(bits));
      }
    }
  });
  return flushed.load();
}

}  // namespace

ScaleShares scale_shares(int bits) {
  const double step = bits <= 5 ? 0.05 : 0.025;
  ScaleShares shares{bits == 4 ? 10 : 7, {}};
  for (int i = 0; i < shares.count; ++i) shares.share[i] = static_cast<float>(1.0 - step * i);
  return shares;
}

void refuse_weight(const flexq_weight_desc& desc, const void* w, flexq_dtype dtype, int64_t ldw, int64_t row,
                   int64_t group) {
  dispatch_dtype(dtype, [&](auto type) { refuse(desc, static_cast<const decltype(type)*>(w), ldw, row, group); });
  std::abort();  // refuse has thrown
}

void refuse_code(int bits, int64_t row, int64_t k, int code) {
  fail(FLEXQ_BAD_VALUE, "codes[", row, "][", k, "] is ", code, "; ", bits, "-bit codes are ", min_weight_code(bits),
       " to ", max_weight_code(bits));
}

int64_t quantize_weight(const flexq_executor* executor, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                        int64_t ldw, uint8_t* planes, uint16_t* scales) {
  return dispatch_dtype(dtype, [&](auto type) {
    return quantize(executor, desc, static_cast<const decltype(type)*>(w), ldw, planes, scales);
  });
}

void dequantize_weight(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes,
                       const uint16_t* scales, void* w, flexq_dtype dtype, int64_t ldw) {
  const int64_t groups = num_groups(desc.k);
  const int64_t row_scales = scales_per_row(desc);
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    auto* out = static_cast<T*>(w);
    parallel_ranges(executor, desc.n, balanced_grain(executor, desc.n), [&](int64_t begin, int64_t end) {
      int8_t codes[kGroup];
      float values[kGroup];
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t g = 0; g < groups; ++g) {
          unpack_group(desc.weight_bits, planes + (row * groups + g) * group_bytes(desc.weight_bits), codes);
          const float scale = to_float(Half{scales[row * row_scales + (row_scales == 1 ? 0 : g)]});
          const bool rotated = desc.rotation == FLEXQ_ROTATION_HADAMARD128;
          for (int i = 0; i < kGroup; ++i) values[i] = static_cast<float>(codes[i]);
          if (rotated) hadamard128(values);  // integers up to 2^14: exact
          const int count = static_cast<int>(std::min<int64_t>(kGroup, desc.k - g * kGroup));
          const float factor = rotated ? scale * kHadamardNorm : scale;
          for (int i = 0; i < count; ++i) out[row * ldw + g * kGroup + i] = from_float<T>(values[i] * factor);
        }
      }
    });
  });
}

void pack_codes(const flexq_executor* executor, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc,
                uint8_t* planes) {
  const int64_t groups = num_groups(desc.k);
  const int64_t kp = padded_k(desc.k);
  const int bits = desc.weight_bits;
  for (int64_t row = 0; row < desc.n; ++row) {
    for (int64_t k = 0; k < kp; ++k) {
      const int code = codes[row * ldc + k];
      if (code < min_weight_code(bits) || code > max_weight_code(bits)) {
        refuse_code(bits, row, k, code);
      }
    }
  }
  parallel_ranges(executor, desc.n, balanced_grain(executor, desc.n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        pack_group(bits, codes + row * ldc + g * kGroup, planes + (row * groups + g) * group_bytes(bits));
      }
    }
  });
}

void unpack_codes(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes, int8_t* codes,
                  int64_t ldc) {
  const int64_t groups = num_groups(desc.k);
  const int bits = desc.weight_bits;
  parallel_ranges(executor, desc.n, balanced_grain(executor, desc.n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        unpack_group(bits, planes + (row * groups + g) * group_bytes(bits), codes + row * ldc + g * kGroup);
      }
    }
  });
}

}  // namespace flexq
