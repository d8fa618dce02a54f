// The kernels' launch functions. Each queues its work on `stream` of the current device and checks the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "flexq/flexq.h"

namespace flexq::cuda {

// Throws FLEXQ_DEVICE_ERROR.
void check(cudaError_t error, const char* what);

void prepack(cudaStream_t stream, const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
             void* prepacked);
void unprepack(cudaStream_t stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales);

// Also sets `num_counters` words at `counters` to zero, for the GEMM that follows.
void quantize_activation(cudaStream_t stream, const flexq_activation_desc& desc, const void* x, flexq_dtype dtype,
                         int64_t ldx, void* quantized, int32_t* counters, int64_t num_counters);
void activation_export(cudaStream_t stream, const flexq_activation_desc& desc, const void* quantized, int8_t* codes,
                       float* scales);

struct GemmArgs {
  flexq_weight_desc desc;
  const void* prepacked;
  flexq_activation_desc act;
  const void* quantized;
  const void* bias;
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  void* workspace;
};

// gemm_s8.cu: int8 tensor cores (mma.sync), up to 32 tokens a pass over the weights.
struct GemmPlan {
  int config;     // of the kernel's table
  int ctas;       // thread blocks, each with an equal share of the work
  int64_t tiles;  // of rows; also the number of counters
  bool split;     // whether tiles are shared between thread blocks, which takes workspace
  size_t counters_bytes;
  size_t workspace_bytes;
};
inline constexpr int kMaxTokensPerPass = 32;
GemmPlan plan_gemm_s8(const flexq_weight_desc& desc, int64_t m, int num_sms);
// Tokens [token_begin, token_begin + tokens). `overlapped`: the kernel before it in the stream is the quantization of
// its activations (or the pass before), which it may start beside. Counters are zero.
void gemm_s8(cudaStream_t stream, const GemmArgs& args, const GemmPlan& plan, int64_t token_begin, int64_t tokens,
             bool overlapped);

}  // namespace flexq::cuda
