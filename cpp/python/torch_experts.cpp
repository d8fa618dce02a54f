// Operators on experts.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "conversions.h"
#include "torch_arguments.h"
#include "torch_ops.h"

namespace flexq::python {
namespace {

// The arguments of flexq.ops.ExpertsDesc, in its order.
flexq_experts_desc read_experts_desc(Arguments& arguments) {
  const int64_t experts = arguments.integer(), hidden = arguments.integer(), intermediate = arguments.integer();
  struct Projection {
    std::string scheme, rotation;
    int64_t act_bits;
  } projections[2];
  for (Projection& projection : projections) {
    projection.scheme = arguments.string();
    projection.rotation = arguments.string();
    projection.act_bits = arguments.integer();
  }
  const std::string function = arguments.string();
  float numbers[3];
  for (float& number : numbers) number = static_cast<float>(arguments.number());
  const bool interleaved = arguments.boolean();
  const int32_t up_bits = weight_bits_of(arguments.integer()), down_bits = weight_bits_of(arguments.integer());
  const auto& [up, down] = projections;
  return experts_desc(experts, hidden, intermediate, up.scheme, up.rotation, act_bits_of(up.act_bits), down.scheme,
                      down.rotation, act_bits_of(down.act_bits), function, numbers[0], numbers[1], numbers[2],
                      interleaved, up_bits, down_bits);
}

struct ExpertBias {
  ExpertBias(const Tensor& t, const char* name, int64_t experts, int64_t n, const Device& device) {
    if (!t.defined()) return;
    const int64_t expected[] = {experts, n};
    if (t.dim != 2 || t.sizes[0] != experts || t.sizes[1] != n || !t.contiguous() || t.device != device) {
      refuse(std::string(name) + " must be contiguous " + text_of(expected, 2) + " on " + device.name() + ", got " +
             t.shape() + " on " + t.device.name());
    }
    data = t.data;
    dtype = dtype_of(t.dtype, name);
  }
  const void* data = nullptr;
  flexq_dtype dtype = FLEXQ_F32;
};

// (Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias,
//  Tensor? expert_map, bool weights_on_input, ...ExpertsDesc) -> Tensor
void experts_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), ids = arguments.tensor(), weights = arguments.tensor();
  const Tensor gate_up = arguments.tensor(), down = arguments.tensor();
  const Tensor gate_up_bias = arguments.optional_tensor(), down_bias = arguments.optional_tensor();
  const Tensor expert_map = arguments.optional_tensor();
  const bool weights_on_input = arguments.boolean();
  const flexq_experts_desc desc = read_experts_desc(arguments);

  const Rows rows(x);
  if (rows.k != desc.hidden) refuse("x must be [..., " + std::to_string(desc.hidden) + "], got " + x.shape());
  const bool same_rows = ids.dim == x.dim && std::equal(ids.sizes, ids.sizes + ids.dim - 1, x.sizes);
  if ((ids.dtype != shim().int32 && ids.dtype != shim().int64) || !same_rows || ids.sizes[ids.dim - 1] == 0) {
    std::string expected = text_of(x.sizes, x.dim - 1);
    expected.insert(expected.size() - 1, x.dim > 1 ? ", 'top_k'" : "'top_k'");
    refuse("ids must be int32 or int64 " + expected + ", got " + dtype_name(ids.dtype) + " " + ids.shape());
  }
  if (!weights.same_shape(ids)) refuse("weights must be like ids, " + ids.shape() + ", got " + weights.shape());
  flexq_routing routing = FLEXQ_ROUTING_INIT;
  routing.weights_dtype = dtype_of(weights.dtype, "weights");
  if (expert_map.defined()) {
    if (expert_map.dtype != shim().int32 || expert_map.dim != 1 || !expert_map.contiguous()) {
      refuse("expert_map must be contiguous int32 [experts everywhere], got " + dtype_name(expert_map.dtype) + " " +
             expert_map.shape());
    }
    routing.expert_map = static_cast<const int32_t*>(expert_map.data);
    routing.map_size = expert_map.numel();
  }
  const std::pair<const char*, const Tensor*> others[] = {
      {"ids", &ids}, {"weights", &weights}, {"gate_up", &gate_up}, {"down", &down}, {"expert_map", &expert_map}};
  for (const auto& [name, tensor] : others) {
    if (tensor->defined() && tensor->device != x.device) refuse("x is on " + x.device.name() + ", " + name + " not");
  }
  const ExpertBias up_bias(gate_up_bias, "gate_up_bias", desc.experts, 2 * desc.intermediate, x.device);
  const ExpertBias out_bias(down_bias, "down_bias", desc.experts, desc.hidden, x.device);
  if (up_bias.data != nullptr && out_bias.data != nullptr && up_bias.dtype != out_bias.dtype) {
    refuse("gate_up_bias and down_bias must have the same dtype");
  }
  const size_t gate_up_bytes = buffer_size(gate_up, "gate_up"), down_bytes = buffer_size(down, "down");
  const Tensor ids_copy = ids.contiguous() ? Tensor() : contiguous_copy(ids);
  const Tensor weights_copy = weights.contiguous() ? Tensor() : contiguous_copy(weights);
  routing.m = rows.rows;
  routing.top_k = ids.sizes[ids.dim - 1];
  routing.ids = ids_copy.defined() ? ids_copy.data : ids.data;
  routing.weights = weights_copy.defined() ? weights_copy.data : weights.data;
  routing.ids_type = ids.dtype == shim().int64 ? FLEXQ_I64 : FLEXQ_I32;
  routing.weights_on_input = weights_on_input;
  const flexq_stream stream = stream_on(x.device);
  size_t bytes = 0;
  check(flexq_experts_workspace_size(&stream, &desc, rows.rows, routing.top_k, rows.dtype, &bytes));
  const Tensor workspace = bytes > 0 ? Tensor::bytes(bytes, x.device) : Tensor();
  Tensor y = Tensor::empty(x.sizes, x.dim, x.dtype, x.device);
  check(flexq_experts_forward(&stream, &desc, gate_up.data, gate_up_bytes, down.data, down_bytes, &routing, rows.data,
                              rows.dtype, rows.ld, up_bias.data, out_bias.data, std::max(up_bias.dtype, out_bias.dtype),
                              y.data, rows.dtype, desc.hidden, workspace.data, bytes));
  stack[0] = result(std::move(y));
}

constexpr Operator kOperators[] = {{"experts_forward", experts_forward}};

}  // namespace

std::span<const Operator> experts_operators() { return kOperators; }

}  // namespace flexq::python
