// Mixture-of-experts layers on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "flexq/flexq.h"

namespace flexq::cpu {

void check_expert_scales(const flexq_experts_desc& desc, flexq_projection projection, int64_t first, int64_t count,
                         const uint16_t* scales);

size_t experts_workspace_size(const flexq_experts_desc& desc, int64_t m, int64_t top_k, flexq_dtype x_dtype);

// Prepacked experts are so many bytes apart.
void experts_forward(const flexq_executor* executor, const ExpertsCall& call, size_t gate_up_stride,
                     size_t down_stride);

}  // namespace flexq::cpu
