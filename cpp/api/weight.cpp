// Weights: quantize, convert, prepack.
#include "api/checks.h"
#include "api/status.h"
#include "core/float_types.h"
#include "core/format.h"
#include "core/quantize_weight.h"

namespace {

using namespace flexq;
using namespace flexq::api;

void check_canonical(const flexq_weight_desc& desc, const void* planes, const void* scales) {
  check_array(planes, "planes", planes_size(desc), 1);
  check_array(scales, "scales", num_scales(desc), sizeof(uint16_t));
}

}  // namespace

extern "C" {

flexq_status flexq_weight_size(const flexq_weight_desc* desc, size_t* planes_bytes, size_t* scales_bytes) {
  return guarded([&] {
    const flexq_weight_desc weight = weight_of(desc);
    check_result(planes_bytes, "planes_bytes");
    check_result(scales_bytes, "scales_bytes");
    *planes_bytes = planes_size(weight);
    *scales_bytes = num_scales(weight) * sizeof(uint16_t);
  });
}

flexq_status flexq_quantize_weight(const flexq_stream* stream, const flexq_weight_desc* desc, const void* w,
                                   flexq_dtype dtype, int64_t ldw, uint8_t* planes, uint16_t* scales,
                                   int64_t* vanished) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    check_dtype(dtype, "dtype");
    check_matrix(w, "w", weight.n, weight.k, ldw, "ldw", dtype_size(dtype));
    check_canonical(weight, planes, scales);
    const int64_t count =
        weight.n == 0 ? 0 : on.backend.quantize_weight(on.stream, weight, w, dtype, ldw, planes, scales);
    if (vanished != nullptr) *vanished = count;
  });
}

flexq_status flexq_dequantize_weight(const flexq_stream* stream, const flexq_weight_desc* desc, const uint8_t* planes,
                                     const uint16_t* scales, void* w, flexq_dtype dtype, int64_t ldw) {
  return guarded([&] {
    const flexq_stream on = cpu_stream_of(stream, "flexq_dequantize_weight");
    const flexq_weight_desc weight = weight_of(desc);
    check_dtype(dtype, "dtype");
    check_canonical(weight, planes, scales);
    check_matrix(w, "w", weight.n, weight.k, ldw, "ldw", dtype_size(dtype));
    dequantize_weight(on.executor, weight, planes, scales, w, dtype, ldw);
  });
}

flexq_status flexq_pack_codes(const flexq_stream* stream, const flexq_weight_desc* desc, const int8_t* codes,
                              int64_t ldc, uint8_t* planes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    check_matrix(codes, "codes", weight.n, padded_k(weight.k), ldc, "ldc", 1);
    check_array(planes, "planes", planes_size(weight), 1);
    if (weight.n > 0) on.backend.pack_codes(on.stream, weight, codes, ldc, planes);
  });
}

flexq_status flexq_unpack_codes(const flexq_stream* stream, const flexq_weight_desc* desc, const uint8_t* planes,
                                int8_t* codes, int64_t ldc) {
  return guarded([&] {
    const flexq_stream on = cpu_stream_of(stream, "flexq_unpack_codes");
    const flexq_weight_desc weight = weight_of(desc);
    check_array(planes, "planes", planes_size(weight), 1);
    check_matrix(codes, "codes", weight.n, padded_k(weight.k), ldc, "ldc", 1);
    unpack_codes(on.executor, weight, planes, codes, ldc);
  });
}

flexq_status flexq_prepack_size(const flexq_stream* stream, const flexq_weight_desc* desc, size_t* bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    check_result(bytes, "bytes");
    *bytes = on.backend.prepack_size(weight);
  });
}

flexq_status flexq_prepack(const flexq_stream* stream, const flexq_weight_desc* desc, const uint8_t* planes,
                           const uint16_t* scales, void* prepacked, size_t bytes) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    check_canonical(weight, planes, scales);
    check_buffer(prepacked, "prepacked", bytes, on.backend.prepack_size(weight));
    if (weight.n > 0) on.backend.prepack(on.stream, weight, planes, scales, prepacked);
  });
}

flexq_status flexq_unprepack(const flexq_stream* stream, const flexq_weight_desc* desc, const void* prepacked,
                             size_t bytes, uint8_t* planes, uint16_t* scales) {
  return guarded([&] {
    const Target on = target_of(stream);
    const flexq_weight_desc weight = weight_of(desc);
    check_buffer(prepacked, "prepacked", bytes, on.backend.prepack_size(weight));
    check_canonical(weight, planes, scales);
    if (weight.n > 0) on.backend.unprepack(on.stream, weight, prepacked, planes, scales);
  });
}

}  // extern "C"
