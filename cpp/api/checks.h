// Argument checks shared by the API's functions. Each throws Error and names the argument, what was given and what
// is accepted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "flexq/flexq.h"

namespace flexq::api {

// A checked stream and its backend.
struct Target {
  flexq_stream stream;
  const Backend& backend;
};
Target target_of(const flexq_stream* stream);
// The same, for functions that work on host memory only.
flexq_stream cpu_stream_of(const flexq_stream* stream, const char* function);

// Checked copies of callers' structs, as this version knows them.
flexq_weight_desc weight_of(const flexq_weight_desc* desc);
flexq_activation_desc activation_of(const flexq_activation_desc* desc);
// The activation of `m` tokens that goes with a weight.
flexq_activation_desc activation_of(const flexq_weight_desc& weight, int32_t act_bits, int64_t m);

flexq_experts_desc experts_of(const flexq_experts_desc* desc);
flexq_routing routing_of(const flexq_routing* routing);
void check_projection(flexq_projection projection);
// Tokens, their experts and all that is as large as either.
void check_pairs(const flexq_experts_desc& desc, int64_t m, int64_t top_k);

// The bytes that a caller's struct says it has, of which this version knows `known`.
size_t struct_size_of(const void* given, const char* name, size_t known);

// The output of a GEMM.
void check_output_shape(int64_t m, int64_t n);
void check_dtype(flexq_dtype dtype, const char* name);

// A matrix [rows][cols] with rows `ld` apart: `p` may be null only if it has no elements.
void check_matrix(const void* p, const char* name, int64_t rows, int64_t cols, int64_t ld, const char* ld_name,
                  size_t element_size);
// An array of `count` elements.
void check_array(const void* p, const char* name, size_t count, size_t element_size);
// A buffer of private layout: size and FLEXQ_ALIGNMENT.
void check_buffer(const void* p, const char* name, size_t given, size_t needed);
// A place for one result.
void check_result(const void* p, const char* name);

}  // namespace flexq::api
