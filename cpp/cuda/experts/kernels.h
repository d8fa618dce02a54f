// The launch functions of a mixture-of-experts layer, in the order in which they run.
#pragma once

#include "cuda/experts/params.h"
#include "cuda/kernels.h"

namespace flexq::cuda::experts {

// More would not fit into the shared memory of the CTA that sorts.
constexpr int64_t kMaxExperts = 8192;

struct RouteArgs {
  Ids ids;
  int64_t pairs;
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

// The same for many pairs, from quantized tokens: copied to their places, a tile of 8 at a time.
struct GatherArgs {
  flexq_activation_desc tokens, places;
  const void* from;
  void* to;
  ExpertTable table;
  const int32_t* pairs;  // of rows
  int64_t top_k;
  const void* weights;  // to multiply scales by, or null
  flexq_dtype weights_dtype;
};
void gather(cudaStream_t stream, const Device& device, const GatherArgs& args);

// y = quantized * weight^T + bias of each tile's expert. y has a row for each pair.
struct ExpertsGemmArgs {
  GemmArgs gemm;  // of expert 0 and all places
  ExpertTable table;
  int64_t max_tiles;
  bool read_once;  // most experts have a single tile
};
void gemm_mma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan);
void gemm_wgmma(cudaStream_t stream, const Device& device, const ExpertsGemmArgs& args, const GemmPlan& plan);
// Whether the family has a kernel of this config for experts.
bool has_experts_mma(const Device& device, int config, int32_t weight_bits, bool per_group);
bool has_experts_wgmma(int config);

// h = f(gate) * up of every pair, quantized.
struct HiddenArgs {
  flexq_experts_desc desc;
  flexq_activation_desc act;
  void* quantized;
  const void* u;  // [pairs][2I] of `dtype`
  flexq_dtype dtype;
  int64_t pairs;
  const Place* places;  // null: pair i is the first token of tile i
  ExpertTable table;    // where places are told by it
};
void quantize_hidden(cudaStream_t stream, const Device& device, const HiddenArgs& args);
// The same for many pairs, a tile of 8 places at a time.
void quantize_hidden_tiles(cudaStream_t stream, const Device& device, const HiddenArgs& args);

// y = sum of weight * product over a token's pairs, in their order.
struct CombineArgs {
  int64_t tokens, top_k, n;
  const Place* places;
  const void* products;  // [pairs][n]
  flexq_dtype products_dtype;
  const void* weights;  // [tokens][top_k], or null: all are 1
  flexq_dtype weights_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
};
void combine(cudaStream_t stream, const Device& device, const CombineArgs& args);

// The GEMMs of few tokens, whose pairs are not sorted. `x` is [tokens][ldx] of x_dtype to gate_up, which quantizes it;
// to down it is quantized h, pair i being the first token of tile i, and y is the sum over a token's pairs.
struct DirectArgs {
  flexq_experts_desc desc;
  Ids ids;
  int64_t tokens, top_k;
  const void* x;
  flexq_dtype x_dtype;
  int64_t ldx;
  const void* prepacked;
  int64_t weight_stride;
  const void* bias;  // [experts][n], or null
  flexq_dtype bias_dtype;
  const void* weights;  // [tokens][top_k], by which gate_up multiplies x and down products; or null
  flexq_dtype weights_dtype;
  void* y;  // gate_up's [pairs][ldy], down's [tokens][ldy]
  flexq_dtype y_dtype;
  int64_t ldy;
};
void direct_gate_up(cudaStream_t stream, const Device& device, const DirectArgs& args);
void direct_down(cudaStream_t stream, const Device& device, const DirectArgs& args);
// Whether a token's pairs are few and short enough for them, on this device.
bool has_direct(const Device& device, const flexq_experts_desc& desc, int64_t top_k);

}  // namespace flexq::cuda::experts
