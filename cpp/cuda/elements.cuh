// Elements of the GEMMs: 16- and 32-bit floats in and out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "flexq/flexq.h"

namespace flexq::cuda {

__device__ inline float load_float(const void* p, flexq_dtype dtype, int64_t i) {
  if (dtype == FLEXQ_F32) return static_cast<const float*>(p)[i];
  if (dtype == FLEXQ_F16) return __half2float(static_cast<const __half*>(p)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}

// The bits of two values of a 16-bit type, the first in the low half.
__device__ inline uint32_t to_16_bits(float low, float high, flexq_dtype dtype) {
  return dtype == FLEXQ_F16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}
__device__ inline uint16_t to_16_bits(float value, flexq_dtype dtype) {
  return static_cast<uint16_t>(to_16_bits(value, 0.0f, dtype));
}

__device__ inline void store_float(void* p, flexq_dtype dtype, int64_t i, float value) {
  if (dtype == FLEXQ_F32) {
    static_cast<float*>(p)[i] = value;
  } else {
    static_cast<uint16_t*>(p)[i] = to_16_bits(value, dtype);
  }
}

}  // namespace flexq::cuda
