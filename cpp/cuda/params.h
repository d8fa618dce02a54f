// A linear layer as its GEMM kernels see it: y = x * w^T + bias.
#pragma once

#include "cuda/kernels.h"
#include "cuda/layout.h"

namespace flexq::cuda {

struct LinearParams {
  const uint8_t* records;   // prepacked weights (layout.h)
  const uint16_t* scales;   // fp16 [n] in scheme channel; in scheme group they lie beside the records
  const uint8_t* codes;     // quantized activations
  const float* act_scales;  // fp32, by token and group or by token
  const void* bias;         // [n], or null
  flexq_dtype bias_dtype;
  void* y;  // [m][ldy]
  flexq_dtype y_dtype;
  int64_t ldy;
  bool y_vectors;  // 16-byte stores to rows of y are aligned
  int64_t n, m;
  bool read_once;  // weights: they leave L2 first
  float unit;      // 1 / code_factor: products are of bytes, not of codes
};

inline LinearParams linear_params(const GemmArgs& args) {
  const auto* records = static_cast<const uint8_t*>(args.prepacked);
  const auto* codes = static_cast<const uint8_t*>(args.quantized);
  const int element = args.y_dtype == FLEXQ_F32 ? 4 : 2;
  return {
      .records = records,
      .scales = reinterpret_cast<const uint16_t*>(records + WeightLayout(args.desc).scales),
      .codes = codes,
      .act_scales = reinterpret_cast<const float*>(codes + ActivationLayout(args.act).scales),
      .bias = args.bias,
      .bias_dtype = args.bias_dtype,
      .y = args.y,
      .y_dtype = args.y_dtype,
      .ldy = args.ldy,
      .y_vectors = reinterpret_cast<uintptr_t>(args.y) % 16 == 0 && args.ldy * element % 16 == 0,
      .n = args.desc.n,
      .m = args.act.m,
      .read_once = false,
      .unit = 1.0f / static_cast<float>(code_factor(args.desc.weight_bits)),
  };
}

}  // namespace flexq::cuda
