// Argument checks shared by the API's functions. Each throws Error and names the argument, what was given and what
// is accepted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "flexq/flexq.h"

namespace flexq::api {

// The backend of a checked stream.
const Backend& backend_of(const flexq_stream* stream);
// The same, for functions that work on host memory only.
void check_cpu_stream(const flexq_stream* stream, const char* function);

void check_weight_desc(const flexq_weight_desc* desc);
void check_activation_desc(const flexq_activation_desc* desc);
void check_act_bits(int32_t act_bits);
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
