// Round-to-nearest quantization of weights into the canonical format. Host memory.
#pragma once

#include <cstdint>

#include "flexq/flexq.h"

namespace flexq {

// Returns how many scales vanished in fp16 though not all of their values are zero.
int64_t quantize_weight(const flexq_executor* executor, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                        int64_t ldw, uint8_t* planes, uint16_t* scales);

void dequantize_weight(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes,
                       const uint16_t* scales, void* w, flexq_dtype dtype, int64_t ldw);

void pack_codes(const flexq_executor* executor, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc,
                uint8_t* planes);

void unpack_codes(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes, int8_t* codes,
                  int64_t ldc);

}  // namespace flexq
