// fp16 and bf16 as bit patterns, converted with round to nearest even.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "flexq/flexq.h"

// Always inlined: these headers are compiled for several instruction sets, and the linker would keep just one copy.
#define FLEXQ_INLINE inline __attribute__((always_inline))

namespace flexq {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline constexpr double kMaxHalf = 65504.0;

FLEXQ_INLINE float to_float(float x) { return x; }

FLEXQ_INLINE float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

FLEXQ_INLINE float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return std::bit_cast<float>(sign | (magnitude + 0x1c000u) << 13);
  // A subnormal m * 2^-24 is 2^-14 + m * 2^-24 less 2^-14: no step has a subnormal float, which callers may have told
  // the FPU to take for zero.
  const float value = std::bit_cast<float>((magnitude + 0x1c400u) << 13) - 0x1p-14f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

template <typename T>
T from_float(float x);

template <>
FLEXQ_INLINE float from_float<float>(float x) {
  return x;
}

template <>
FLEXQ_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // quiet NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
FLEXQ_INLINE Half from_float<Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 makes the FPU round at fp16's last place, 2^-24.
    const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

inline size_t dtype_size(flexq_dtype dtype) { return dtype == FLEXQ_F32 ? 4 : 2; }

// Calls f with a value of the C++ type behind `dtype`, which the API has checked.
template <typename F>
decltype(auto) dispatch_dtype(flexq_dtype dtype, F&& f) {
  switch (dtype) {
    case FLEXQ_F16:
      return f(Half{});
    case FLEXQ_BF16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

}  // namespace flexq
