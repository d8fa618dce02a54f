// Weights: quantize, convert, prepack.
#include "conversions.h"

namespace flexq::python {

void bind_weight(nb::module_& m) {
  nb::class_<flexq_weight_desc>(m, "WeightDesc")
      .def(
          "__init__",
          [](flexq_weight_desc* self, int64_t n, int64_t k, std::string_view scheme, std::string_view rotation,
             int32_t weight_bits) {
            new (self) flexq_weight_desc{sizeof(flexq_weight_desc), n, k, weight_bits, scheme_of(scheme),
                                         rotation_of(rotation),     0};
            size_t planes = 0, scales = 0;
            check(flexq_weight_size(self, &planes, &scales));
          },
          nb::arg("n"), nb::arg("k"), nb::arg("scheme"), nb::arg("rotation"),
          nb::arg("weight_bits") = FLEXQ_WEIGHT_BITS)
      .def_ro("n", &flexq_weight_desc::n)
      .def_ro("k", &flexq_weight_desc::k);

  struct Canonical {
    Canonical(const flexq_weight_desc& desc, const nb::ndarray<>& planes_array, const nb::ndarray<>& scales_array) {
      size_t planes_bytes = 0, scales_bytes = 0;
      check(flexq_weight_size(&desc, &planes_bytes, &scales_bytes));
      planes = array_of<uint8_t>(planes_array, "planes", planes_bytes);
      scales = array_of<uint16_t>(scales_array, "scales", scales_bytes / sizeof(uint16_t));
    }
    uint8_t* planes;
    uint16_t* scales;
  };

  m.def(
      "quantize_weight",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> w, nb::ndarray<> planes, nb::ndarray<> scales) {
        const Matrix matrix(w, "weight");
        if (matrix.rows != desc.n || matrix.cols != desc.k) refuse("weight must be [n, k]");
        const Canonical out(desc, planes, scales);
        int64_t vanished = 0;
        const NoGil released;
        check(flexq_quantize_weight(&s.stream, &desc, matrix.data, matrix.dtype, matrix.ld, out.planes, out.scales,
                                    &vanished));
        return vanished;
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("weight"), nb::arg("planes"), nb::arg("scales"),
      "Returns how many scales vanished in float16.");
  m.def(
      "dequantize_weight",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> planes, nb::ndarray<> scales, nb::ndarray<> w) {
        const Canonical in(desc, planes, scales);
        const Matrix matrix(w, "weight");
        if (matrix.rows != desc.n || matrix.cols != desc.k) refuse("weight must be [n, k]");
        const NoGil released;
        check(flexq_dequantize_weight(&s.stream, &desc, in.planes, in.scales, matrix.data, matrix.dtype, matrix.ld));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("planes"), nb::arg("scales"), nb::arg("weight"));
  m.def(
      "pack_codes",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> codes, nb::ndarray<> planes) {
        size_t planes_bytes = 0, scales_bytes = 0;
        check(flexq_weight_size(&desc, &planes_bytes, &scales_bytes));
        const int64_t kp = (desc.k + FLEXQ_GROUP_SIZE - 1) / FLEXQ_GROUP_SIZE * FLEXQ_GROUP_SIZE;
        const int8_t* in = array_of<int8_t>(codes, "codes", static_cast<size_t>(desc.n * kp));
        uint8_t* out = array_of<uint8_t>(planes, "planes", planes_bytes);
        const NoGil released;
        check(flexq_pack_codes(&s.stream, &desc, in, kp, out));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("codes"), nb::arg("planes"));
  m.def(
      "unpack_codes",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> planes, nb::ndarray<> codes) {
        size_t planes_bytes = 0, scales_bytes = 0;
        check(flexq_weight_size(&desc, &planes_bytes, &scales_bytes));
        const int64_t kp = (desc.k + FLEXQ_GROUP_SIZE - 1) / FLEXQ_GROUP_SIZE * FLEXQ_GROUP_SIZE;
        const uint8_t* in = array_of<uint8_t>(planes, "planes", planes_bytes);
        int8_t* out = array_of<int8_t>(codes, "codes", static_cast<size_t>(desc.n * kp));
        const NoGil released;
        check(flexq_unpack_codes(&s.stream, &desc, in, out, kp));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("planes"), nb::arg("codes"));

  m.def(
      "prepack_size",
      [](const Stream& s, const flexq_weight_desc& desc) {
        size_t bytes = 0;
        check(flexq_prepack_size(&s.stream, &desc, &bytes));
        return bytes;
      },
      nb::arg("stream"), nb::arg("desc"));
  m.def(
      "prepack",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> planes, nb::ndarray<> scales,
         nb::ndarray<> packed) {
        const Canonical in(desc, planes, scales);
        uint8_t* out = array_of<uint8_t>(packed, "packed");
        const size_t bytes = packed.size();
        const NoGil released;
        check(flexq_prepack(&s.stream, &desc, in.planes, in.scales, out, bytes));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("planes"), nb::arg("scales"), nb::arg("packed"));
  m.def(
      "unprepack",
      [](const Stream& s, const flexq_weight_desc& desc, nb::ndarray<> packed, nb::ndarray<> planes,
         nb::ndarray<> scales) {
        const uint8_t* in = array_of<uint8_t>(packed, "packed");
        const size_t bytes = packed.size();
        const Canonical out(desc, planes, scales);
        const NoGil released;
        check(flexq_unprepack(&s.stream, &desc, in, bytes, out.planes, out.scales));
      },
      nb::arg("stream"), nb::arg("desc"), nb::arg("packed"), nb::arg("planes"), nb::arg("scales"));
}

}  // namespace flexq::python
