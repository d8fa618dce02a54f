// Values of the three input types, and reductions over lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "core/format.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda::quantize {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __ushort_as_half(static_cast<unsigned short>(ptx::pack_f16(x, 0.0f)));
  } else {
    return __ushort_as_bfloat16(static_cast<unsigned short>(ptx::pack_bf16(x, 0.0f)));
  }
}

// Calls f with a value of the type.
template <typename F>
decltype(auto) dispatch_type(flexq_dtype dtype, F&& f) {
  switch (dtype) {
    case FLEXQ_F16:
      return f(__half{});
    case FLEXQ_BF16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// What an unfused operation would have stored and read back.
template <typename T>
__device__ float rounded(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(ptx::pack_bf16(0.0f, x));
  } else {
    return to_float(from_float<T>(x));
  }
}

// Two values of a 16-bit type. Sums and products are what rounded<T>() makes of those of floats: a float has at least
// twice the digits and two, so that it does not matter to round to it before.
template <typename T>
struct Packed {
  static constexpr int kCount = 2;

  static __device__ uint32_t pack(const float (&v)[kCount]) {
    if constexpr (std::is_same_v<T, __half>) {
      return ptx::pack_f16(v[0], v[1]);
    } else {
      return ptx::pack_bf16(v[0], v[1]);
    }
  }
  static __device__ void unpack(uint32_t bits, float (&v)[kCount]) {
    if constexpr (std::is_same_v<T, __half>) {
      const float2 both = __half22float2(pair(bits));
      v[0] = both.x, v[1] = both.y;
    } else {
      v[0] = __uint_as_float(bits << 16), v[1] = __uint_as_float(bits & 0xffff0000u);
    }
  }
  static __device__ uint32_t add(uint32_t a, uint32_t b) { return bits_of(__hadd2_rn(pair(a), pair(b))); }
  static __device__ uint32_t multiply(uint32_t a, uint32_t b) { return bits_of(__hmul2_rn(pair(a), pair(b))); }

 private:
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

  static __device__ Pair pair(uint32_t bits) { return reinterpret_cast<const Pair&>(bits); }
  static __device__ uint32_t bits_of(const Pair& pair) { return reinterpret_cast<const uint32_t&>(pair); }
};

// g * sigmoid(alpha * g). What is rounded to 16 bits afterwards can do without the last bits of exact functions.
template <typename T>
__device__ float silu(float g, float alpha = 1.0f) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(g, 1.0f + __expf(-alpha * g));
  } else {
    return __fdiv_rn(g, 1.0f + expf(-alpha * g));
  }
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T value[kCount];
};

// Reductions over `kLanes` neighbouring lanes, with the result in all of them.
template <int kLanes>
__device__ int largest_of_lanes(int value) {
  if constexpr (kLanes == 32) {
    return __reduce_max_sync(~0u, value);
  } else {
#pragma unroll
    for (int stride = kLanes / 2; stride > 0; stride /= 2) value = max(value, __shfl_xor_sync(~0u, value, stride));
    return value;
  }
}
template <int kLanes>
__device__ float sum_of_lanes(float value) {
#pragma unroll
  for (int stride = kLanes / 2; stride > 0; stride /= 2) value += __shfl_xor_sync(~0u, value, stride);
  return value;
}

struct Scale {
  float scale;
  float inverse;  // 0 where all codes are 0
};

// fp32 division rounds as on the CPU: this file is compiled without fast-math.
__device__ inline Scale scale_of(int largest_bits, bool rotate, int qmax) {
  const float largest = __int_as_float(largest_bits);
  if (!(largest <= FLT_MAX)) return {__int_as_float(0x7fffffff), 0.0f};
  const float scale = __fdiv_rn(rotate ? __fmul_rn(largest, kHadamardNorm) : largest, static_cast<float>(qmax));
  if (scale < FLT_MIN) return {0.0f, 0.0f};
  return {scale, __fdiv_rn(static_cast<float>(qmax), largest)};
}

}  // namespace flexq::cuda::quantize
