// GEMM and linear.
#include "conversions.h"

namespace flexq::python {
namespace {

struct Bias {
  Bias(const std::optional<nb::ndarray<>>& t, int64_t n) {
    if (!t) return;
    if (t->ndim() != 1 || static_cast<int64_t>(t->shape(0)) != n) refuse("bias must be [n]");
    if (n > 1 && t->stride(0) != 1) refuse("bias must be contiguous");
    data = t->data();
    dtype = dtype_of(*t, "bias");
  }
  const void* data = nullptr;
  flexq_dtype dtype = FLEXQ_F32;
};

}  // namespace

void bind_linear(nb::module_& m) {
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
  m.def(
      "gemm",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> packed, const flexq_activation_desc& act_desc,
         nb::ndarray<> quantized, std::optional<nb::ndarray<>> bias, nb::ndarray<> y, nb::ndarray<> workspace) {
        const Matrix out(y, "y");
        if (out.rows != act_desc.m || out.cols != desc.n) refuse("y must be [m, n]");
        const Bias b(bias, desc.n);
        const uint8_t* weight = array_of<uint8_t>(packed, "packed");
        const uint8_t* activation = array_of<uint8_t>(quantized, "quantized");
        uint8_t* scratch = array_of<uint8_t>(workspace, "workspace");
        const size_t sizes[] = {packed.size(), quantized.size(), workspace.size()};
        const NoGil released;
        check(flexq_gemm(&s.stream, &desc, weight, sizes[0], &act_desc, activation, sizes[1], b.data, b.dtype, out.data,
                         out.dtype, out.ld, scratch, sizes[2]));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("packed"), nb::arg("act_desc"), nb::arg("quantized"),
      nb::arg("bias").none(), nb::arg("y"), nb::arg("workspace"));
  m.def(
      "linear",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> packed, int32_t act_bits, nb::ndarray<> x,
         std::optional<nb::ndarray<>> bias, nb::ndarray<> y, nb::ndarray<> workspace) {
        const Matrix in(x, "x");
        const Matrix out(y, "y");
        if (in.cols != desc.k) refuse("x must be [m, k]");
        if (out.rows != in.rows || out.cols != desc.n) refuse("y must be [m, n]");
        const Bias b(bias, desc.n);
        const uint8_t* weight = array_of<uint8_t>(packed, "packed");
        uint8_t* scratch = array_of<uint8_t>(workspace, "workspace");
        const size_t sizes[] = {packed.size(), workspace.size()};
        const NoGil released;
        check(flexq_linear(&s.stream, &desc, weight, sizes[0], act_bits, in.rows, in.data, in.dtype, in.ld, b.data,
                           b.dtype, out.data, out.dtype, out.ld, scratch, sizes[1]));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("packed"), nb::arg("act_bits"), nb::arg("x"),
      nb::arg("bias").none(), nb::arg("y"), nb::arg("workspace"));
}

}  // namespace flexq::python
