// Activations and linear layers.
#include "api/checks.h"
#include "api/status.h"
#include "core/error.h"
#include "core/float_types.h"
#include "core/format.h"

namespace {

using namespace flexq;
using namespace flexq::api;

flexq_activation_desc activation_of(const flexq_weight_desc& desc, int32_t act_bits, int64_t m) {
  const flexq_activation_desc act{m, desc.k, act_bits, desc.scheme, desc.rotation};
  check_activation_desc(&act);
  return act;
}

void check_match(const flexq_weight_desc& weight, const flexq_activation_desc& act) {
  require(act.k == weight.k, "activation and weight must have the same k, got ", act.k, " and ", weight.k);
  require(act.scheme == weight.scheme, "activation and weight must have the same scheme, got ",
          static_cast<int>(act.scheme), " and ", static_cast<int>(weight.scheme));
  require(act.rotation == weight.rotation, "activation and weight must have the same rotation, got ",
          static_cast<int>(act.rotation), " and ", static_cast<int>(weight.rotation));
}

void check_output(const flexq_weight_desc& desc, int64_t m, const void* bias, flexq_dtype bias_dtype, const void* y,
                  flexq_dtype y_dtype, int64_t ldy) {
  check_dtype(y_dtype, "y_dtype");
  check_matrix(y, "y", m, desc.n, ldy, "ldy", dtype_size(y_dtype));
  if (bias == nullptr) return;
  check_dtype(bias_dtype, "bias_dtype");
  check_array(bias, "bias", static_cast<size_t>(desc.n), dtype_size(bias_dtype));
}

}  // namespace

extern "C" {

flexq_status flexq_activation_size(const flexq_stream* stream, const flexq_activation_desc* desc, size_t* bytes) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_activation_desc(desc);
    check_result(bytes, "bytes");
    *bytes = backend.activation_size(*desc);
  });
}

flexq_status flexq_quantize_activation(const flexq_stream* stream, const flexq_activation_desc* desc, const void* x,
                                       flexq_dtype dtype, int64_t ldx, void* quantized, size_t bytes) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_activation_desc(desc);
    check_dtype(dtype, "dtype");
    check_matrix(x, "x", desc->m, desc->k, ldx, "ldx", dtype_size(dtype));
    check_buffer(quantized, "quantized", bytes, backend.activation_size(*desc));
    if (desc->m > 0) backend.quantize_activation(*stream, *desc, x, dtype, ldx, quantized);
  });
}

flexq_status flexq_activation_export(const flexq_stream* stream, const flexq_activation_desc* desc,
                                     const void* quantized, size_t bytes, int8_t* codes, float* scales) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_activation_desc(desc);
    check_buffer(quantized, "quantized", bytes, backend.activation_size(*desc));
    const auto m = static_cast<size_t>(desc->m);
    check_array(codes, "codes", m * static_cast<size_t>(padded_k(desc->k)), 1);
    check_array(scales, "scales", m * static_cast<size_t>(scales_per_token(*desc)), sizeof(float));
    if (desc->m > 0) backend.activation_export(*stream, *desc, quantized, codes, scales);
  });
}

flexq_status flexq_gemm_workspace_size(const flexq_stream* stream, const flexq_weight_desc* desc, int32_t act_bits,
                                       int64_t m, size_t* bytes) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_weight_desc(desc);
    activation_of(*desc, act_bits, m);
    check_result(bytes, "bytes");
    *bytes = backend.gemm_workspace_size(*stream, *desc, act_bits, m);
  });
}

flexq_status flexq_linear_workspace_size(const flexq_stream* stream, const flexq_weight_desc* desc, int32_t act_bits,
                                         int64_t m, size_t* bytes) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_weight_desc(desc);
    const flexq_activation_desc act = activation_of(*desc, act_bits, m);
    check_result(bytes, "bytes");
    *bytes = align_up(backend.activation_size(act)) + backend.gemm_workspace_size(*stream, *desc, act_bits, m);
  });
}

flexq_status flexq_gemm(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                        size_t prepacked_bytes, const flexq_activation_desc* act_desc, const void* quantized,
                        size_t quantized_bytes, const void* bias, flexq_dtype bias_dtype, void* y, flexq_dtype y_dtype,
                        int64_t ldy, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_weight_desc(desc);
    check_activation_desc(act_desc);
    check_match(*desc, *act_desc);
    check_buffer(prepacked, "prepacked", prepacked_bytes, backend.prepack_size(*desc));
    check_buffer(quantized, "quantized", quantized_bytes, backend.activation_size(*act_desc));
    check_output(*desc, act_desc->m, bias, bias_dtype, y, y_dtype, ldy);
    check_buffer(workspace, "workspace", workspace_bytes,
                 backend.gemm_workspace_size(*stream, *desc, act_desc->act_bits, act_desc->m));
    if (act_desc->m == 0 || desc->n == 0) return;
    backend.gemm(*stream, {*desc, prepacked, *act_desc, quantized, bias, bias_dtype, y, y_dtype, ldy, workspace});
  });
}

flexq_status flexq_linear(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                          size_t prepacked_bytes, int32_t act_bits, int64_t m, const void* x, flexq_dtype x_dtype,
                          int64_t ldx, const void* bias, flexq_dtype bias_dtype, void* y, flexq_dtype y_dtype,
                          int64_t ldy, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    const Backend& backend = backend_of(stream);
    check_weight_desc(desc);
    const flexq_activation_desc act = activation_of(*desc, act_bits, m);
    check_buffer(prepacked, "prepacked", prepacked_bytes, backend.prepack_size(*desc));
    check_dtype(x_dtype, "x_dtype");
    check_matrix(x, "x", m, desc->k, ldx, "ldx", dtype_size(x_dtype));
    check_output(*desc, m, bias, bias_dtype, y, y_dtype, ldy);
    const size_t act_bytes = align_up(backend.activation_size(act));
    check_buffer(workspace, "workspace", workspace_bytes,
                 act_bytes + backend.gemm_workspace_size(*stream, *desc, act_bits, m));
    if (m == 0 || desc->n == 0) return;
    const GemmCall call{*desc,      prepacked, act,     workspace, bias,
                        bias_dtype, y,         y_dtype, ldy,       static_cast<uint8_t*>(workspace) + act_bytes};
    backend.linear(*stream, {x, x_dtype, ldx}, call);
  });
}

}  // extern "C"
