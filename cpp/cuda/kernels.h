// The kernels' launch functions. Each queues its work on `stream` of the current device and checks the launch.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/backend.h"
#include "cuda/costs.h"
#include "flexq/flexq.h"

namespace flexq::cuda {

constexpr int kMaxSplits = 4;  // parts of K in a cluster

// What launches and the cost model need to know of the device.
struct Device {
  int num_sms;
  bool has_sm90;   // clusters, and kernels that start before the one ahead of them has finished
  bool has_wgmma;  // sm_90a code runs
  int64_t
      shared_per_cta;  // bytes, the most that a kernel may ask for: 99 KB on sm_86, sm_89 and sm_120, 227 KB on sm_90
  double dram_bytes_per_us, clocks_per_us;
  CostTable costs;
  std::string cost_table_name, cost_table_text;
  std::array<int, kMaxSplits + 1> clusters;  // [size]: clusters of so many CTAs, one to an SM, that run at once
};

// Throws FLEXQ_DEVICE_ERROR.
void check(cudaError_t error, const char* what);

// quantize/weight.cu: the CPU's bits. They look at everything before they write anything, and wait for the stream.
int64_t quantize_weight(cudaStream_t stream, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                        int64_t ldw, uint8_t* planes, uint16_t* scales);
void pack_codes(cudaStream_t stream, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc, uint8_t* planes);

void prepack(cudaStream_t stream, const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
             void* prepacked);
void unprepack(cudaStream_t stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales);

// Up to so many tokens a quantizer's warp has a group of one token, and the kernel fits beside a GEMM; of more, a warp
// has a group of 8. The limit is higher where the whole token decides.
constexpr int64_t max_single_tokens(bool of_tokens) { return of_tokens ? 64 : 32; }
void quantize_activation(cudaStream_t stream, const Device& device, const flexq_activation_desc& desc,
                         const ActivationSource& source, void* quantized);
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

// How a GEMM is run; dispatch.h chooses.
struct GemmPlan {
  enum Family { kMma, kWgmma };
  Family family;
  int config;      // of the family's table
  int splits;      // parts of K, each computed by a CTA of its own
  int multicast;   // CTAs of a cluster that share activations (wgmma)
  int blocks = 0;  // of 16 rows a warp has (mma)
};

// Both GEMMs start, and read weights, before the kernel ahead of them in the stream has finished (launch.h).

// mma/: mma.sync, s8 or b1; sm_80 and later.
struct MmaShape {
  const char* product;
  int act_bits;                // that it takes, 0 for any
  int warps_n;                 // side by side along N
  int min_blocks, max_blocks;  // of 16 rows for each of them; split-K takes the most
  int tokens;                  // of a tile
  int ctas_per_sm;
  int warps_k;
  bool shared_act;  // the activations go through shared memory
};
int num_mma_configs();
MmaShape mma_shape(int config);
// Whether there is such a kernel, and the device has the shared memory that it needs.
bool has_mma(const Device& device, int config, int32_t weight_bits, bool per_group);
// Also throws FLEXQ_UNSUPPORTED for what is too large for a launch.
size_t mma_workspace_size(const GemmPlan& plan, const flexq_weight_desc& desc, int64_t m);
void gemm_mma(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan);

// wgmma/: wgmma on s8; sm_90a. Stream-K needs a workspace.
struct WgmmaShape {
  int rows, tokens;     // of a tile
  int stage_groups;     // groups of 128 k in a stage
  bool group, channel;  // the schemes of scales that it is for
  bool stream_k;        // tiles that fill no whole wave are shared along K
};
int num_wgmma_configs();
WgmmaShape wgmma_shape(int config);
// Device::clusters of the current device.
std::array<int, kMaxSplits + 1> wgmma_clusters();
// As mma_workspace_size.
size_t wgmma_workspace_size(const Device& device, const GemmPlan& plan, const flexq_weight_desc& desc, int64_t m);
void gemm_wgmma(cudaStream_t stream, const Device& device, const GemmArgs& args, const GemmPlan& plan);

}  // namespace flexq::cuda
