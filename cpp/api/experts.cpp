// Mixture-of-experts layers.
#include "api/checks.h"
#include "api/status.h"
#include "core/error.h"
#include "core/float_types.h"
#include "core/format.h"

namespace {

using namespace flexq;
using namespace flexq::api;

void check_range(const flexq_experts_desc& desc, flexq_projection projection, int64_t first, int64_t count,
                 const void* planes, const void* scales) {
  require(first >= 0 && count >= 0 && first <= desc.experts && count <= desc.experts - first,
          "experts [first, first + count) must be among the ", desc.experts, " there are, got first ", first,
          ", count ", count);
  const flexq_weight_desc weight = weight_of_expert(desc, projection);
  check_array(planes, "planes", static_cast<size_t>(count) * planes_size(weight), 1);
  check_array(scales, "scales", static_cast<size_t>(count) * num_scales(weight), sizeof(uint16_t));
}

void check_bias(const void* bias, const char* name, int64_t experts, int64_t n, flexq_dtype dtype) {
  if (bias == nullptr) return;
  check_dtype(dtype, "bias_dtype");
  check_array(bias, name, static_cast<size_t>(experts * n), dtype_size(dtype));
}

}  // namespace

extern "C" {

flexq_status flexq_experts_prepack_size(const flexq_stream* stream, const flexq_experts_desc* desc,
                                        flexq_projection projection, size_t* bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_experts_desc experts = experts_of(desc);
    check_projection(projection);
    check_result(bytes, "bytes");
    *bytes = on.backend.experts_prepack_size(experts, projection);
  });
}

flexq_status flexq_experts_prepack(const flexq_stream* stream, const flexq_experts_desc* desc,
                                   flexq_projection projection, int64_t first, int64_t count, const uint8_t* planes,
                                   const uint16_t* scales, void* prepacked, size_t bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_experts_desc experts = experts_of(desc);
    check_projection(projection);
    check_range(experts, projection, first, count, planes, scales);
    check_buffer(prepacked, "prepacked", bytes, on.backend.experts_prepack_size(experts, projection));
    if (count > 0) on.backend.experts_prepack(on.stream, experts, projection, first, count, planes, scales, prepacked);
  });
}

flexq_status flexq_experts_unprepack(const flexq_stream* stream, const flexq_experts_desc* desc,
                                     flexq_projection projection, int64_t first, int64_t count, const void* prepacked,
                                     size_t bytes, uint8_t* planes, uint16_t* scales) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_experts_desc experts = experts_of(desc);
    check_projection(projection);
    check_buffer(prepacked, "prepacked", bytes, on.backend.experts_prepack_size(experts, projection));
    check_range(experts, projection, first, count, planes, scales);
    if (count > 0) {
      on.backend.experts_unprepack(on.stream, experts, projection, first, count, prepacked, planes, scales);
    }
  });
}

flexq_status flexq_experts_workspace_size(const flexq_stream* stream, const flexq_experts_desc* desc, int64_t m,
                                          int64_t top_k, flexq_dtype x_dtype, size_t* bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_experts_desc experts = experts_of(desc);
    check_pairs(experts, m, top_k);
    check_dtype(x_dtype, "x_dtype");
    check_result(bytes, "bytes");
    *bytes = on.backend.experts_workspace_size(on.stream, experts, m, top_k, x_dtype);
  });
}

flexq_status flexq_experts_forward(const flexq_stream* stream, const flexq_experts_desc* desc, const void* gate_up,
                                   size_t gate_up_bytes, const void* down, size_t down_bytes,
                                   const flexq_routing* routing, const void* x, flexq_dtype x_dtype, int64_t ldx,
                                   const void* gate_up_bias, const void* down_bias, flexq_dtype bias_dtype, void* y,
                                   flexq_dtype y_dtype, int64_t ldy, void* workspace, size_t workspace_bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_experts_desc experts = experts_of(desc);
    const flexq_routing route = routing_of(routing);
    const int64_t m = route.m;
    check_pairs(experts, m, route.top_k);
    check_buffer(gate_up, "gate_up", gate_up_bytes, on.backend.experts_prepack_size(experts, FLEXQ_GATE_UP));
    check_buffer(down, "down", down_bytes, on.backend.experts_prepack_size(experts, FLEXQ_DOWN));
    const auto pairs = static_cast<size_t>(m * route.top_k);
    check_array(route.ids, "ids", pairs, route.ids_type == FLEXQ_I64 ? sizeof(int64_t) : sizeof(int32_t));
    check_array(route.weights, "weights", pairs, dtype_size(route.weights_dtype));
    check_dtype(x_dtype, "x_dtype");
    check_matrix(x, "x", m, experts.hidden, ldx, "ldx", dtype_size(x_dtype));
    check_bias(gate_up_bias, "gate_up_bias", experts.experts, 2 * experts.intermediate, bias_dtype);
    check_bias(down_bias, "down_bias", experts.experts, experts.hidden, bias_dtype);
    check_dtype(y_dtype, "y_dtype");
    check_matrix(y, "y", m, experts.hidden, ldy, "ldy", dtype_size(y_dtype));
    check_buffer(workspace, "workspace", workspace_bytes,
                 on.backend.experts_workspace_size(on.stream, experts, m, route.top_k, x_dtype));
    if (m == 0) return;
    on.backend.experts_forward(on.stream, {experts, gate_up, down, route, x, x_dtype, ldx, gate_up_bias, down_bias,
                                           bias_dtype, y, y_dtype, ldy, workspace});
  });
}

}  // extern "C"
