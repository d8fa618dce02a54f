// Activations and linear layers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "api/checks.h"
#include "api/status.h"
#include "core/error.h"
#include "core/float_types.h"
#include "core/format.h"

namespace {

using namespace flexq;
using namespace flexq::api;

void check_match(const flexq_weight_desc& weight, const flexq_activation_desc& act) {
  require(act.k == weight.k, "activation and weight must have the same k, got ", act.k, " and ", weight.k);
  require(act.scheme == weight.scheme, "activation and weight must have the same scheme, got ", act.scheme, " and ",
          weight.scheme);
  require(act.rotation == weight.rotation, "activation and weight must have the same rotation, got ", act.rotation,
          " and ", weight.rotation);
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
    const Target on = target_of(stream);
    const flexq_activation_desc act = activation_of(desc);
    check_result(bytes, "bytes");
    *bytes = on.backend.activation_size(act);
  });
}

flexq_status flexq_quantize_activation(const flexq_stream* stream, const flexq_activation_desc* desc, const void* x,
                                       flexq_dtype dtype, int64_t ldx, void* quantized, size_t bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_activation_desc act = activation_of(desc);
    check_dtype(dtype, "dtype");
    check_matrix(x, "x", act.m, act.k, ldx, "ldx", dtype_size(dtype));
    check_buffer(quantized, "quantized", bytes, on.backend.activation_size(act));
    if (act.m > 0) on.backend.quantize_activation(on.stream, act, {ActivationSource::kPlain, dtype, x, ldx}, quantized);
  });
}

flexq_status flexq_rms_norm_quantize(const flexq_stream* stream, const flexq_activation_desc* desc, const void* x,
                                     int64_t ldx, const void* residual, int64_t ld_residual, const void* weight,
                                     float eps, flexq_dtype dtype, void* sum, int64_t ld_sum, void* quantized,
                                     size_t bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_activation_desc act = activation_of(desc);
    check_dtype(dtype, "dtype");
    const size_t element = dtype_size(dtype);
    check_matrix(x, "x", act.m, act.k, ldx, "ldx", element);
    if (residual != nullptr) check_matrix(residual, "residual", act.m, act.k, ld_residual, "ld_residual", element);
    if (sum != nullptr) check_matrix(sum, "sum", act.m, act.k, ld_sum, "ld_sum", element);
    check_array(weight, "weight", static_cast<size_t>(act.k), element);
    require(eps >= 0.0f && std::isfinite(eps), "eps must be 0 or more and finite, got ", eps);
    check_buffer(quantized, "quantized", bytes, on.backend.activation_size(act));
    const ActivationSource source{.kind = ActivationSource::kRmsNorm,
                                  .dtype = dtype,
                                  .x = x,
                                  .ldx = ldx,
                                  .other = residual,
                                  .ld_other = residual != nullptr ? ld_residual : 0,
                                  .weight = weight,
                                  .eps = eps,
                                  .sum = sum,
                                  .ld_sum = sum != nullptr ? ld_sum : 0};
    if (act.m > 0) on.backend.quantize_activation(on.stream, act, source, quantized);
  });
}

flexq_status flexq_silu_mul_quantize(const flexq_stream* stream, const flexq_activation_desc* desc, const void* gate,
                                     int64_t ld_gate, const void* up, int64_t ld_up, flexq_dtype dtype, void* quantized,
                                     size_t bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_activation_desc act = activation_of(desc);
    check_dtype(dtype, "dtype");
    check_matrix(gate, "gate", act.m, act.k, ld_gate, "ld_gate", dtype_size(dtype));
    check_matrix(up, "up", act.m, act.k, ld_up, "ld_up", dtype_size(dtype));
    check_buffer(quantized, "quantized", bytes, on.backend.activation_size(act));
    const ActivationSource source{
        .kind = ActivationSource::kSiluMul, .dtype = dtype, .x = gate, .ldx = ld_gate, .other = up, .ld_other = ld_up};
    if (act.m > 0) on.backend.quantize_activation(on.stream, act, source, quantized);
  });
}

flexq_status flexq_activation_export(const flexq_stream* stream, const flexq_activation_desc* desc,
                                     const void* quantized, size_t bytes, int8_t* codes, float* scales) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_activation_desc act = activation_of(desc);
    check_buffer(quantized, "quantized", bytes, on.backend.activation_size(act));
    const auto m = static_cast<size_t>(act.m);
    check_array(codes, "codes", m * static_cast<size_t>(padded_k(act.k)), 1);
    check_array(scales, "scales", m * static_cast<size_t>(scales_per_token(act)), sizeof(float));
    if (act.m > 0) on.backend.activation_export(on.stream, act, quantized, codes, scales);
  });
}

flexq_status flexq_gemm_kernels(const flexq_stream* stream, const flexq_weight_desc* desc, int32_t act_bits, int64_t m,
                                flexq_kernel_info* infos, int32_t capacity, int32_t* count) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    activation_of(weight, act_bits, m);
    check_output_shape(m, weight.n);
    check_result(count, "count");
    require(capacity >= 0, "capacity must be 0 or more, got ", capacity);
    check_array(infos, "infos", static_cast<size_t>(capacity), alignof(flexq_kernel_info));
    const size_t stride = capacity == 0 ? 0 : struct_size_of(infos, "infos[0]", sizeof(flexq_kernel_info));
    const int32_t all = on.backend.gemm_kernels(on.stream, weight, act_bits, m, nullptr, 0);
    std::vector<flexq_kernel_info> kernels(static_cast<size_t>(std::min(all, capacity)));
    on.backend.gemm_kernels(on.stream, weight, act_bits, m, kernels.data(), static_cast<int32_t>(kernels.size()));
    for (size_t i = 0; i < kernels.size(); ++i) {
      auto* info = reinterpret_cast<unsigned char*>(infos) + i * stride;
      std::memset(info, 0, stride);
      kernels[i].struct_size = stride;
      std::memcpy(info, &kernels[i], sizeof kernels[i]);
    }
    *count = all;
  });
}

flexq_status flexq_gemm_workspace_size(const flexq_stream* stream, const flexq_weight_desc* desc, int32_t act_bits,
                                       int64_t m, size_t* bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    activation_of(weight, act_bits, m);
    check_output_shape(m, weight.n);
    check_result(bytes, "bytes");
    *bytes = on.backend.gemm_workspace_size(on.stream, weight, act_bits, m);
  });
}

flexq_status flexq_linear_workspace_size(const flexq_stream* stream, const flexq_weight_desc* desc, int32_t act_bits,
                                         int64_t m, size_t* bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    const flexq_activation_desc act = activation_of(weight, act_bits, m);
    check_output_shape(m, weight.n);
    check_result(bytes, "bytes");
    *bytes = align_up(on.backend.activation_size(act)) + on.backend.gemm_workspace_size(on.stream, weight, act_bits, m);
  });
}

flexq_status flexq_gemm(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                        size_t prepacked_bytes, const flexq_activation_desc* act_desc, const void* quantized,
                        size_t quantized_bytes, const void* bias, flexq_dtype bias_dtype, void* y, flexq_dtype y_dtype,
                        int64_t ldy, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    const flexq_activation_desc act = activation_of(act_desc);
    check_output_shape(act.m, weight.n);
    check_match(weight, act);
    check_buffer(prepacked, "prepacked", prepacked_bytes, on.backend.prepack_size(weight));
    check_buffer(quantized, "quantized", quantized_bytes, on.backend.activation_size(act));
    check_output(weight, act.m, bias, bias_dtype, y, y_dtype, ldy);
    check_buffer(workspace, "workspace", workspace_bytes,
                 on.backend.gemm_workspace_size(on.stream, weight, act.act_bits, act.m));
    if (act.m == 0 || weight.n == 0) return;
    on.backend.gemm(on.stream, {weight, prepacked, act, quantized, bias, bias_dtype, y, y_dtype, ldy, workspace});
  });
}

flexq_status flexq_linear(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                          size_t prepacked_bytes, int32_t act_bits, int64_t m, const void* x, flexq_dtype x_dtype,
                          int64_t ldx, const void* bias, flexq_dtype bias_dtype, void* y, flexq_dtype y_dtype,
                          int64_t ldy, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    const flexq_activation_desc act = activation_of(weight, act_bits, m);
    check_output_shape(m, weight.n);
    check_buffer(prepacked, "prepacked", prepacked_bytes, on.backend.prepack_size(weight));
    check_dtype(x_dtype, "x_dtype");
    check_matrix(x, "x", m, weight.k, ldx, "ldx", dtype_size(x_dtype));
    check_output(weight, m, bias, bias_dtype, y, y_dtype, ldy);
    const size_t act_bytes = align_up(on.backend.activation_size(act));
    check_buffer(workspace, "workspace", workspace_bytes,
                 act_bytes + on.backend.gemm_workspace_size(on.stream, weight, act_bits, m));
    if (m == 0 || weight.n == 0) return;
    const GemmCall call{weight,     prepacked, act,     workspace, bias,
                        bias_dtype, y,         y_dtype, ldy,       static_cast<uint8_t*>(workspace) + act_bytes};
    on.backend.linear(on.stream, {ActivationSource::kPlain, x_dtype, x, ldx}, call);
  });
}

flexq_status flexq_cost_table(const flexq_stream* stream, const char** name, const char** text) {
  return guarded([&] {
    const Target on = target_of(stream);
    check_result(name, "name");
    check_result(text, "text");
    const CostTableText table = on.backend.cost_table(on.stream);
    *name = table.name;
    *text = table.text;
  });
}

}  // extern "C"
