// What a backend offers. The API has checked every argument before any of these is called.
#pragma once

#include <cstddef>
#include <cstdint>

#include "flexq/flexq.h"

namespace flexq {

struct GemmCall {
  const flexq_weight_desc& desc;
  const void* prepacked;
  const flexq_activation_desc& act_desc;
  const void* quantized;
  const void* bias;  // or null
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  void* workspace;
};

// What an activation is quantized from: rows of `dtype`, x [m][k] as it is or with the operation before it fused in.
struct ActivationSource {
  enum Kind {
    kPlain,    // x
    kRmsNorm,  // rms_norm(x + other) * weight, or of x alone where other is null; sum, unless null, gets x + other
    kSiluMul,  // silu(x) * other
  };
  Kind kind;
  flexq_dtype dtype;
  const void* x;
  int64_t ldx;
  const void* other = nullptr;
  int64_t ld_other = 0;
  const void* weight = nullptr;  // [k]
  float eps = 0.0f;
  void* sum = nullptr;
  int64_t ld_sum = 0;
};

struct ExpertsCall {
  const flexq_experts_desc& desc;
  const void* gate_up;
  const void* down;
  const flexq_routing& routing;
  const void* x;
  flexq_dtype x_dtype;
  int64_t ldx;
  const void* gate_up_bias;  // or null
  const void* down_bias;     // or null
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
  void* workspace;
};

struct CostTableText {
  const char* name;
  const char* text;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Throws FLEXQ_UNAVAILABLE with the reason.
  virtual void check_available(int32_t device_index) const = 0;
  virtual const char* isa(int32_t device_index) const = 0;

  // Canonical weights; core/quantize_weight.h says what they are. Returns how many scales vanished.
  virtual int64_t quantize_weight(const flexq_stream& stream, const flexq_weight_desc& desc, const void* w,
                                  flexq_dtype dtype, int64_t ldw, uint8_t* planes, uint16_t* scales) const = 0;
  virtual void pack_codes(const flexq_stream& stream, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc,
                          uint8_t* planes) const = 0;

  virtual size_t prepack_size(const flexq_weight_desc& desc) const = 0;
  virtual void prepack(const flexq_stream& stream, const flexq_weight_desc& desc, const uint8_t* planes,
                       const uint16_t* scales, void* prepacked) const = 0;
  virtual void unprepack(const flexq_stream& stream, const flexq_weight_desc& desc, const void* prepacked,
                         uint8_t* planes, uint16_t* scales) const = 0;

  virtual size_t activation_size(const flexq_activation_desc& desc) const = 0;
  virtual void quantize_activation(const flexq_stream& stream, const flexq_activation_desc& desc,
                                   const ActivationSource& source, void* quantized) const = 0;
  virtual void activation_export(const flexq_stream& stream, const flexq_activation_desc& desc, const void* quantized,
                                 int8_t* codes, float* scales) const = 0;

  virtual size_t gemm_workspace_size(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t act_bits,
                                     int64_t m) const = 0;
  // What could run the GEMM, the choice first: at most `capacity` of them into `infos`; returns how many there are.
  virtual int32_t gemm_kernels(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t act_bits, int64_t m,
                               flexq_kernel_info* infos, int32_t capacity) const = 0;
  // The table by which it chooses kernels on this device.
  virtual CostTableText cost_table(const flexq_stream&) const { return {"none", ""}; }
  virtual void gemm(const flexq_stream& stream, const GemmCall& call) const = 0;

  // Quantizes `source` into `call.quantized`, then multiplies.
  virtual void linear(const flexq_stream& stream, const ActivationSource& source, const GemmCall& call) const {
    quantize_activation(stream, call.act_desc, source, const_cast<void*>(call.quantized));
    gemm(stream, call);
  }

  // Experts [first, first + count) of a projection. Unless a backend has its own, the layout is one prepacked weight
  // after another, expert_bytes apart.
  virtual size_t experts_prepack_size(const flexq_experts_desc& desc, flexq_projection projection) const;
  virtual void experts_prepack(const flexq_stream& stream, const flexq_experts_desc& desc, flexq_projection projection,
                               int64_t first, int64_t count, const uint8_t* planes, const uint16_t* scales,
                               void* prepacked) const;
  virtual void experts_unprepack(const flexq_stream& stream, const flexq_experts_desc& desc,
                                 flexq_projection projection, int64_t first, int64_t count, const void* prepacked,
                                 uint8_t* planes, uint16_t* scales) const;
  size_t expert_bytes(const flexq_experts_desc& desc, flexq_projection projection) const;

  // FLEXQ_UNSUPPORTED in a backend without them.
  virtual size_t experts_workspace_size(const flexq_stream& stream, const flexq_experts_desc& desc, int64_t m,
                                        int64_t top_k, flexq_dtype x_dtype) const;
  virtual void experts_forward(const flexq_stream& stream, const ExpertsCall& call) const;
};

const Backend& cpu_backend();
const Backend* cuda_backend();  // null in a build without CUDA

}  // namespace flexq
