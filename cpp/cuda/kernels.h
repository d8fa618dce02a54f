// The kernels' launch functions. Each queues its work on `stream` of the current device and checks the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "flexq/flexq.h"

namespace flexq::cuda {

// What the launches want to know of the device.
struct Device {
  int num_sms;
  bool has_sm90;  // clusters, and kernels that start before the one ahead of them has finished
};

// Throws FLEXQ_DEVICE_ERROR.
void check(cudaError_t error, const char* what);

void prepack(cudaStream_t stream, const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
             void* prepacked);
void unprepack(cudaStream_t stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales);

void quantize_activation(cudaStream_t stream, const Device& device, const flexq_activation_desc& desc, const void* x,
                         flexq_dtype dtype, int64_t ldx, void* quantized);
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
  int64_t tiles;  // of rows
  int splits;     // parts of K, each a thread block's for each tile
  size_t workspace_bytes;
};
inline constexpr int kMaxTokensPerPass = 32;
GemmPlan plan_gemm_s8(const Device& device, const flexq_weight_desc& desc, int64_t m);
// Tokens [token_begin, token_begin + tokens). `overlapped`: the kernel before it in the stream is the quantization of
// its activations (or the pass before), which it may start beside.
void gemm_s8(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan, int64_t token_begin,
             int64_t tokens, bool overlapped);

}  // namespace flexq::cuda
