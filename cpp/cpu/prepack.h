// Canonical planes and scales <-> the CPU's prepacked layout (cpu/packing.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "flexq/flexq.h"

namespace flexq::cpu {

size_t prepack_size(const flexq_weight_desc& desc);
PackedWeight packed_weight(const flexq_weight_desc& desc, const void* prepacked);
// Scales of `desc` must be finite and not negative; `where` begins the message of one that is not.
void check_scales(const flexq_weight_desc& desc, const uint16_t* scales, const std::string& where);
void prepack(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes,
             const uint16_t* scales, void* prepacked);
void unprepack(const flexq_executor* executor, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales);

}  // namespace flexq::cpu
