// The launch functions of a mixture-of-experts layer, in the order in which they run.
#pragma once

#include "cuda/experts/params.h"
#include "cuda/kernels.h"

namespace flexq::cuda::experts {

// More would not fit into the shared memory of the CTA that sorts.
constexpr int64_t kMaxExperts = 8192;

struct RouteArgs {
  const void* ids;  // [pairs]
  flexq_index_type ids_type;
  const int32_t* expert_map;  // or null
  int64_t map_size;
  int64_t experts, pairs;
  int tile_tokens;
  int64_t max_tiles;
  Routed to;
};
void route(cudaStream_t stream, const Device& device, const RouteArgs& args);

// Quantizes tokens of x, each to the places of its pairs. `act` is that of all places.
struct InputsArgs {
  flexq_activation_desc act;
  void* quantized;
  const void* x;
  flexq_dtype dtype;
  int64_t ldx, tokens, top_k;
  const Place* places;
  const void* weights;  // to multiply scales by, or null
  flexq_dtype weights_dtype;
};
void quantize_inputs(cudaStream_t stream, const Device& device, const InputsArgs& args);

// y = quantized * weight^T + bias of each tile's expert. y has a row for each pair.
struct ExpertsGemmArgs {
  GemmArgs gemm;  // of expert 0 and all places
  ExpertTable table;
  int64_t max_tiles;
};
void gemm_mma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan);
void gemm_wgmma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan);
// Whether the family has a kernel of this config for experts.
bool has_mma(int config);
bool has_wgmma(int config);

// h = f(gate) * up of every pair, quantized.
struct HiddenArgs {
  flexq_experts_desc desc;
  flexq_activation_desc act;
  void* quantized;
  const void* u;  // [pairs][2I] of `dtype`
  flexq_dtype dtype;
  int64_t pairs;
  const Place* places;
};
void quantize_hidden(cudaStream_t stream, const Device& device, const HiddenArgs& args);

// y = sum of weight * product over a token's pairs, in their order.
struct CombineArgs {
  int64_t tokens, top_k, n;
  const Place* places;
  const float* products;  // [pairs][n]
  const void* weights;    // [tokens][top_k], or null: all are 1
  flexq_dtype weights_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
};
void combine(cudaStream_t stream, const Device& device, const CombineArgs& args);

}  // namespace flexq::cuda::experts
