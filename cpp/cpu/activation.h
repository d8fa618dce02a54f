// The bytes of a quantized activation on the CPU.
#pragma once

#include "core/format.h"
#include "cpu/kernels.h"

namespace flexq::cpu {

// Codes, then scales, then sums, each aligned.
struct ActivationLayout {
  explicit ActivationLayout(const flexq_activation_desc& desc) {
    const auto groups = static_cast<size_t>(num_groups(desc.k));
    const auto m = static_cast<size_t>(desc.m);
    scales = groups * m * kGroup;
    sums = scales + align_up(static_cast<size_t>(scales_per_token(desc)) * m * sizeof(float));
    size = sums + align_up(groups * m * sizeof(int32_t));
  }
  Activation at(void* quantized) const {
    auto* bytes = static_cast<uint8_t*>(quantized);
    return {reinterpret_cast<int8_t*>(bytes), reinterpret_cast<float*>(bytes + scales),
            reinterpret_cast<int32_t*>(bytes + sums)};
  }
  size_t scales;
  size_t sums;
  size_t size;
};

}  // namespace flexq::cpu
