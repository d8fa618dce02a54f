// Sizes and bit order of the canonical format (docs/reference/formats.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "flexq/flexq.h"

namespace flexq {

inline constexpr int kGroup = FLEXQ_GROUP_SIZE;
inline constexpr int kPlaneBytes = kGroup / 8;

// Of weights of so many bits: the bytes of a row's group, and two's complement codes.
constexpr bool is_weight_bits(int32_t bits) { return bits == 4 || bits == 5 || bits == 6 || bits == 8; }
constexpr int group_bytes(int bits) { return bits * kPlaneBytes; }
constexpr int max_weight_code(int bits) { return (1 << (bits - 1)) - 1; }
constexpr int min_weight_code(int bits) { return -(1 << (bits - 1)); }
// Kernels that want unsigned weights add this, and take it back through the activations' group sums.
constexpr int code_offset(int bits) { return 1 << (bits - 1); }

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

inline size_t planes_size(const flexq_weight_desc& desc) {
  return static_cast<size_t>(desc.n * num_groups(desc.k) * group_bytes(desc.weight_bits));
}
inline size_t num_scales(const flexq_weight_desc& desc) { return static_cast<size_t>(desc.n * scales_per_row(desc)); }

// One expert's projection as a weight, and its input as an activation of `m` tokens.
inline const flexq_projection_format& format_of(const flexq_experts_desc& desc, flexq_projection projection) {
  return projection == FLEXQ_GATE_UP ? desc.gate_up : desc.down;
}
inline flexq_weight_desc weight_of_expert(const flexq_experts_desc& desc, flexq_projection projection) {
  const bool up = projection == FLEXQ_GATE_UP;
  const flexq_projection_format& format = format_of(desc, projection);
  return {sizeof(flexq_weight_desc),
          up ? 2 * desc.intermediate : desc.hidden,
          up ? desc.hidden : desc.intermediate,
          format.weight_bits,
          format.scheme,
          format.rotation,
          0};
}
inline flexq_activation_desc activation_of_expert(const flexq_experts_desc& desc, flexq_projection projection,
                                                  int64_t m) {
  const flexq_projection_format& format = format_of(desc, projection);
  const int64_t k = projection == FLEXQ_GATE_UP ? desc.hidden : desc.intermediate;
  return {sizeof(flexq_activation_desc), m, k, format.act_bits, format.scheme, format.rotation, 0};
}

// Calls f with an integral_constant of `bits`, which the API has checked.
template <typename F>
decltype(auto) dispatch_weight_bits(int32_t bits, F&& f) {
  switch (bits) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
    default:
      return f(std::integral_constant<int, 8>{});
  }
}

// One group: 128 codes <-> `bits` planes of 16 bytes.
void pack_group(int bits, const int8_t* codes, uint8_t* planes);
void unpack_group(int bits, const uint8_t* planes, int8_t* codes);

}  // namespace flexq
