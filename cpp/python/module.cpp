#include "conversions.h"

NB_MODULE(_core, m) {
  m.doc() = "libflexq through its C API. Private: use the functions and modules of flexq.";
  nb::set_leak_warnings(false);  // flexq's caches of streams and descriptors live until the interpreter is gone
  m.attr("GROUP_SIZE") = FLEXQ_GROUP_SIZE;
  m.attr("WEIGHT_BITS") = FLEXQ_WEIGHT_BITS;
  m.attr("ALIGNMENT") = FLEXQ_ALIGNMENT;
  m.def("version", &flexq_version);
  flexq::python::bind_stream(m);
  flexq::python::bind_weight(m);
  flexq::python::bind_activation(m);
  flexq::python::bind_linear(m);
  flexq::python::bind_experts(m);
  flexq::python::bind_torch_ops(m);
}
