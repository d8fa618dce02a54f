// GEMM and linear.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "conversions.h"

namespace flexq::python {
void bind_linear(nb::module_& m) {
  m.def(
      "gemm_kernels",
      [](const Stream& s, const flexq_weight_desc& desc, int32_t act_bits, int64_t rows) {
        int32_t count = 0;
        check(flexq_gemm_kernels(&s.stream, &desc, act_bits, rows, nullptr, 0, &count));
        std::vector<flexq_kernel_info> infos(static_cast<size_t>(count), FLEXQ_KERNEL_INFO_INIT);
        check(flexq_gemm_kernels(&s.stream, &desc, act_bits, rows, infos.data(), count, &count));
        std::vector<std::pair<std::string, double>> kernels;
        for (const flexq_kernel_info& info : infos) kernels.emplace_back(info.name, info.estimated_microseconds);
        return kernels;
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("act_bits"), nb::arg("m"),
      "Names and estimated microseconds of the kernels that could run a GEMM, the library's choice first.");
  m.def(
      "cost_table",
      [](const Stream& s) {
        const char *name = nullptr, *text = nullptr;
        check(flexq_cost_table(&s.stream, &name, &text));
        return std::pair<std::string, std::string>(name, text);
      },
      nb::arg("stream"), "Name of the table that estimates are made from, and the table as a file of FLEXQ_COSTS.");
  m.def(
      "gemm_workspace_size",
      [](const Stream& s, const flexq_weight_desc& desc, int32_t act_bits, int64_t rows) {
        size_t bytes = 0;
        check(flexq_gemm_workspace_size(&s.stream, &desc, act_bits, rows, &bytes));
        return bytes;
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("act_bits"), nb::arg("m"));
  m.def(
      "linear_workspace_size",
      [](const Stream& s, const flexq_weight_desc& desc, int32_t act_bits, int64_t rows) {
        size_t bytes = 0;
        check(flexq_linear_workspace_size(&s.stream, &desc, act_bits, rows, &bytes));
        return bytes;
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("act_bits"), nb::arg("m"));
  // Called for every layer of every token: addresses instead of DLPack views, which take longer than a small layer.
  // The callers in flexq.ops check the tensors.
  m.def(
      "gemm",
      [](const Stream& s, const flexq_weight_desc& desc, uintptr_t packed, size_t packed_bytes,
         const flexq_activation_desc& act_desc, uintptr_t quantized, size_t quantized_bytes, uintptr_t bias,
         int32_t bias_dtype, uintptr_t y, int32_t y_dtype, int64_t ldy, uintptr_t workspace, size_t workspace_bytes) {
        const NoGil released;
        check(flexq_gemm(&s.stream, &desc, at(packed), packed_bytes, &act_desc, at(quantized), quantized_bytes,
                         at(bias), bias_dtype, at(y), y_dtype, ldy, at(workspace), workspace_bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("packed"), nb::arg("packed_bytes"), nb::arg("act_desc"),
      nb::arg("quantized"), nb::arg("quantized_bytes"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("y"),
      nb::arg("y_dtype"), nb::arg("ldy"), nb::arg("workspace"), nb::arg("workspace_bytes"));
  m.def(
      "linear",
      [](const Stream& s, const flexq_weight_desc& desc, uintptr_t packed, size_t packed_bytes, int32_t act_bits,
         int64_t rows, uintptr_t x, int32_t x_dtype, int64_t ldx, uintptr_t bias, int32_t bias_dtype, uintptr_t y,
         int32_t y_dtype, int64_t ldy, uintptr_t workspace, size_t workspace_bytes) {
        const NoGil released;
        check(flexq_linear(&s.stream, &desc, at(packed), packed_bytes, act_bits, rows, at(x), x_dtype, ldx, at(bias),
                           bias_dtype, at(y), y_dtype, ldy, at(workspace), workspace_bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("packed"), nb::arg("packed_bytes"), nb::arg("act_bits"), nb::arg("m"),
      nb::arg("x"), nb::arg("x_dtype"), nb::arg("ldx"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("y"),
      nb::arg("y_dtype"), nb::arg("ldy"), nb::arg("workspace"), nb::arg("workspace_bytes"));
}

}  // namespace flexq::python
