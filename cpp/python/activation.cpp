// Activation quantization.
#include "conversions.h"

namespace flexq::python {

void bind_activation(nb::module_& m) {
  nb::class_<flexq_activation_desc>(m, "ActivationDesc")
      .def(
          "__init__",
          [](flexq_activation_desc* self, int64_t rows, int64_t k, int32_t act_bits, std::string_view scheme,
             std::string_view rotation) {
            new (self) flexq_activation_desc{sizeof(flexq_activation_desc), rows, k, act_bits, scheme_of(scheme),
                                             rotation_of(rotation),         0};
            const flexq_stream cpu = FLEXQ_STREAM_INIT;
            size_t bytes = 0;
            check(flexq_activation_size(&cpu, self, &bytes));
          },
          nb::arg("m"), nb::arg("k"), nb::arg("act_bits"), nb::arg("scheme"), nb::arg("rotation"));

  m.def(
      "activation_size",
      [](const Stream& s, const flexq_activation_desc& desc) {
        size_t bytes = 0;
        check(flexq_activation_size(&s.stream, &desc, &bytes));
        return bytes;
      },
      nb::arg("stream"), nb::arg("desc"));
  m.def(
      "quantize_activation",
      [](const Stream& s, const flexq_activation_desc& desc, uintptr_t x, int32_t dtype, int64_t ldx,
         uintptr_t quantized, size_t bytes) {
        const NoGil released;
        check(flexq_quantize_activation(&s.stream, &desc, at(x), dtype, ldx, at(quantized), bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("x"), nb::arg("dtype"), nb::arg("ldx"), nb::arg("quantized"),
      nb::arg("bytes"));
  m.def(
      "rms_norm_quantize",
      [](const Stream& s, const flexq_activation_desc& desc, uintptr_t x, int64_t ldx, uintptr_t residual,
         int64_t ld_residual, uintptr_t weight, float eps, int32_t dtype, uintptr_t sum, int64_t ld_sum,
         uintptr_t quantized, size_t bytes) {
        const NoGil released;
        check(flexq_rms_norm_quantize(&s.stream, &desc, at(x), ldx, at(residual), ld_residual, at(weight), eps, dtype,
                                      at(sum), ld_sum, at(quantized), bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("x"), nb::arg("ldx"), nb::arg("residual"), nb::arg("ld_residual"),
      nb::arg("weight"), nb::arg("eps"), nb::arg("dtype"), nb::arg("sum"), nb::arg("ld_sum"), nb::arg("quantized"),
      nb::arg("bytes"));
  m.def(
      "silu_mul_quantize",
      [](const Stream& s, const flexq_activation_desc& desc, uintptr_t gate, int64_t ld_gate, uintptr_t up,
         int64_t ld_up, int32_t dtype, uintptr_t quantized, size_t bytes) {
        const NoGil released;
        check(flexq_silu_mul_quantize(&s.stream, &desc, at(gate), ld_gate, at(up), ld_up, dtype, at(quantized), bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("gate"), nb::arg("ld_gate"), nb::arg("up"), nb::arg("ld_up"),
      nb::arg("dtype"), nb::arg("quantized"), nb::arg("bytes"));
  m.def(
      "activation_export",
      [](const Stream& s, const flexq_activation_desc& desc, nb::ndarray<> quantized, nb::ndarray<> codes,
         nb::ndarray<> scales) {
        const uint8_t* in = array_of<uint8_t>(quantized, "quantized");
        const size_t bytes = quantized.size();
        const int64_t groups = (desc.k + FLEXQ_GROUP_SIZE - 1) / FLEXQ_GROUP_SIZE;
        const int64_t token_scales = desc.scheme == FLEXQ_SCHEME_GROUP ? groups : 1;
        int8_t* out = array_of<int8_t>(codes, "codes", static_cast<size_t>(desc.m * groups * FLEXQ_GROUP_SIZE));
        float* out_scales = array_of<float>(scales, "scales", static_cast<size_t>(desc.m * token_scales));
        const NoGil released;
        check(flexq_activation_export(&s.stream, &desc, in, bytes, out, out_scales));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("quantized"), nb::arg("codes"), nb::arg("scales"));
}

}  // namespace flexq::python
