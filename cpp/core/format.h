// Sizes and bit order of the canonical format (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>

#include "flexq/flexq.h"

namespace flexq {

inline constexpr int kGroup = FLEXQ_GROUP_SIZE;
inline constexpr int kPlanes = FLEXQ_WEIGHT_BITS;
inline constexpr int kPlaneBytes = kGroup / 8;
inline constexpr int kGroupBytes = kPlanes * kPlaneBytes;
inline constexpr int kMinCode = -32;
inline constexpr int kMaxCode = 31;
// Kernels that want unsigned weights add this, and take it back through the activations' group sums.
inline constexpr int kCodeOffset = 32;

// Orthonormal scaling of the 128-point Hadamard transform, 1 / sqrt(128).
inline constexpr float kHadamardNorm = 0.08838834764831845f;

static_assert(sizeof(size_t) >= 8, "sizes of tensors with up to 2^46 elements are computed in size_t");

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
constexpr int64_t num_groups(int64_t k) { return ceil_div(k, kGroup); }
constexpr int64_t padded_k(int64_t k) { return num_groups(k) * kGroup; }
constexpr size_t align_up(size_t bytes) { return (bytes + FLEXQ_ALIGNMENT - 1) / FLEXQ_ALIGNMENT * FLEXQ_ALIGNMENT; }

inline int64_t scales_per_row(const flexq_weight_desc& desc) {
  return desc.scheme == FLEXQ_SCHEME_GROUP ? num_groups(desc.k) : 1;
}
inline int64_t scales_per_token(const flexq_activation_desc& desc) {
  return desc.scheme == FLEXQ_SCHEME_GROUP ? num_groups(desc.k) : 1;
}
inline int act_max_code(int32_t act_bits) { return act_bits == 6 ? 31 : 127; }

// One group: 128 codes <-> 6 planes of 16 bytes.
void pack_group(const int8_t* codes, uint8_t* planes);
void unpack_group(const uint8_t* planes, int8_t* codes);

}  // namespace flexq
