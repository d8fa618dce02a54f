// Round-to-nearest quantization of weights into the canonical format. Host memory; what other backends need to give the
// same bits.
#pragma once

#include <cstdint>

#include "flexq/flexq.h"

namespace flexq {

// Returns how many scales vanished in fp16 though not all of their values are zero.
int64_t quantize_weight(const flexq_executor* executor, const flexq_weight_desc& desc, const void* w, flexq_dtype dtype,
                        int64_t ldw, uint8_t* planes, uint16_t* scales);

// The shares of absmax that a scale may reach: the fewer the codes, the more is gained by leaving out the largest
// values.
struct ScaleShares {
  static constexpr int kMost = 10;
  int count;
  float share[kMost];
};
ScaleShares scale_shares(int bits);

// Throws what is wrong with row `row` of w, or with its group `group`: a weight that is not finite, or a scale that
// leaves fp16's range.
[[noreturn]] void refuse_weight(const flexq_weight_desc& desc, const void* w, flexq_dtype dtype, int64_t ldw,
                                int64_t row, int64_t group);
[[noreturn]] void refuse_code(int bits, int64_t row, int64_t k, int code);

void dequantize_weight(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes,
                       const uint16_t* scales, void* w, flexq_dtype dtype, int64_t ldw);

void pack_codes(const flexq_executor* executor, const flexq_weight_desc& desc, const int8_t* codes, int64_t ldc,
                uint8_t* planes);

void unpack_codes(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes, int8_t* codes,
                  int64_t ldc);

}  // namespace flexq
