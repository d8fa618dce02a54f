// Mixture-of-experts layers.
#include "conversions.h"

namespace flexq::python {
namespace {

// Of one projection of all experts, contiguous.
struct Canonical {
  Canonical(const flexq_experts_desc& desc, flexq_projection projection, const nb::ndarray<>& planes_array,
            const nb::ndarray<>& scales_array) {
    const bool up = projection == FLEXQ_GATE_UP;
    const flexq_projection_format& format = up ? desc.gate_up : desc.down;
    const flexq_weight_desc weight{sizeof(flexq_weight_desc),
                                   up ? 2 * desc.intermediate : desc.hidden,
                                   up ? desc.hidden : desc.intermediate,
                                   format.weight_bits,
                                   format.scheme,
                                   format.rotation,
                                   0};
    size_t planes_bytes = 0, scales_bytes = 0;
    check(flexq_weight_size(&weight, &planes_bytes, &scales_bytes));
    const auto experts = static_cast<size_t>(desc.experts);
    planes = array_of<uint8_t>(planes_array, "planes", experts * planes_bytes);
    scales = array_of<uint16_t>(scales_array, "scales", experts * scales_bytes / sizeof(uint16_t));
  }
  uint8_t* planes;
  uint16_t* scales;
};

}  // namespace

void bind_experts(nb::module_& m) {
  nb::class_<flexq_experts_desc>(m, "ExpertsDesc")
      .def(
          "__init__",
          [](flexq_experts_desc* self, int64_t experts, int64_t hidden, int64_t intermediate,
             std::string_view gate_up_scheme, std::string_view gate_up_rotation, int32_t gate_up_act_bits,
             std::string_view down_scheme, std::string_view down_rotation, int32_t down_act_bits,
             std::string_view function, float alpha, float limit, float up_offset, bool interleaved,
             int32_t gate_up_weight_bits, int32_t down_weight_bits) {
            new (self) flexq_experts_desc(experts_desc(experts, hidden, intermediate, gate_up_scheme, gate_up_rotation,
                                                       gate_up_act_bits, down_scheme, down_rotation, down_act_bits,
                                                       function, alpha, limit, up_offset, interleaved,
                                                       gate_up_weight_bits, down_weight_bits));
            const flexq_stream cpu = FLEXQ_STREAM_INIT;
            size_t bytes = 0;
            check(flexq_experts_prepack_size(&cpu, self, FLEXQ_GATE_UP, &bytes));
          },
          nb::arg("experts"), nb::arg("hidden"), nb::arg("intermediate"), nb::arg("gate_up_scheme"),
          nb::arg("gate_up_rotation"), nb::arg("gate_up_act_bits"), nb::arg("down_scheme"), nb::arg("down_rotation"),
          nb::arg("down_act_bits"), nb::arg("function"), nb::arg("alpha"), nb::arg("limit"), nb::arg("up_offset"),
          nb::arg("interleaved"), nb::arg("gate_up_weight_bits"), nb::arg("down_weight_bits"));

  m.def(
      "experts_prepack_size",
      [](const Stream& s, const flexq_experts_desc& desc, std::string_view projection) {
        size_t bytes = 0;
        check(flexq_experts_prepack_size(&s.stream, &desc, projection_of(projection), &bytes));
        return bytes;
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("projection"));
  m.def(
      "experts_prepack",
      [](const Stream& s, const flexq_experts_desc& desc, std::string_view name, nb::ndarray<> planes,
         nb::ndarray<> scales, nb::ndarray<> packed) {
        const flexq_projection projection = projection_of(name);
        const Canonical in(desc, projection, planes, scales);
        uint8_t* out = array_of<uint8_t>(packed, "packed");
        const size_t bytes = packed.size();
        const NoGil released;
        check(flexq_experts_prepack(&s.stream, &desc, projection, 0, desc.experts, in.planes, in.scales, out, bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("projection"), nb::arg("planes"), nb::arg("scales"),
      nb::arg("packed"));
  m.def(
      "experts_unprepack",
      [](const Stream& s, const flexq_experts_desc& desc, std::string_view name, nb::ndarray<> packed,
         nb::ndarray<> planes, nb::ndarray<> scales) {
        const flexq_projection projection = projection_of(name);
        const uint8_t* in = array_of<uint8_t>(packed, "packed");
        const size_t bytes = packed.size();
        const Canonical out(desc, projection, planes, scales);
        const NoGil released;
        check(
            flexq_experts_unprepack(&s.stream, &desc, projection, 0, desc.experts, in, bytes, out.planes, out.scales));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("projection"), nb::arg("packed"), nb::arg("planes"),
      nb::arg("scales"));
  m.def(
      "experts_workspace_size",
      [](const Stream& s, const flexq_experts_desc& desc, int64_t rows, int64_t top_k, int32_t dtype) {
        size_t bytes = 0;
        check(flexq_experts_workspace_size(&s.stream, &desc, rows, top_k, dtype, &bytes));
        return bytes;
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("m"), nb::arg("top_k"), nb::arg("x_dtype"));
  // Addresses instead of DLPack views, as in linear.cpp.
  m.def(
      "experts_forward",
      [](const Stream& s, const flexq_experts_desc& desc, uintptr_t gate_up, size_t gate_up_bytes, uintptr_t down,
         size_t down_bytes, int64_t rows, int64_t top_k, uintptr_t ids, bool wide_ids, uintptr_t weights,
         int32_t weights_dtype, uintptr_t expert_map, int64_t map_size, bool weights_on_input, uintptr_t x,
         int32_t x_dtype, int64_t ldx, uintptr_t gate_up_bias, uintptr_t down_bias, int32_t bias_dtype, uintptr_t y,
         int32_t y_dtype, int64_t ldy, uintptr_t workspace, size_t workspace_bytes) {
        flexq_routing routing = FLEXQ_ROUTING_INIT;
        routing.m = rows;
        routing.top_k = top_k;
        routing.ids = at(ids);
        routing.ids_type = wide_ids ? FLEXQ_I64 : FLEXQ_I32;
        routing.weights = at(weights);
        routing.weights_dtype = weights_dtype;
        routing.expert_map = static_cast<const int32_t*>(at(expert_map));
        routing.map_size = map_size;
        routing.weights_on_input = weights_on_input;
        const NoGil released;
        check(flexq_experts_forward(&s.stream, &desc, at(gate_up), gate_up_bytes, at(down), down_bytes, &routing, at(x),
                                    x_dtype, ldx, at(gate_up_bias), at(down_bias), bias_dtype, at(y), y_dtype, ldy,
                                    at(workspace), workspace_bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("gate_up"), nb::arg("gate_up_bytes"), nb::arg("down"),
      nb::arg("down_bytes"), nb::arg("m"), nb::arg("top_k"), nb::arg("ids"), nb::arg("wide_ids"), nb::arg("weights"),
      nb::arg("weights_dtype"), nb::arg("expert_map"), nb::arg("map_size"), nb::arg("weights_on_input"), nb::arg("x"),
      nb::arg("x_dtype"), nb::arg("ldx"), nb::arg("gate_up_bias"), nb::arg("down_bias"), nb::arg("bias_dtype"),
      nb::arg("y"), nb::arg("y_dtype"), nb::arg("ldy"), nb::arg("workspace"), nb::arg("workspace_bytes"));
}

}  // namespace flexq::python
