// A mixture-of-experts layer on the GPU: how it is run, its workspace, and the order of launches.
#pragma once

#include <array>

#include "core/backend.h"
#include "cuda/experts/kernels.h"

namespace flexq::cuda::experts {

// That are worked on at once, for the workspace: more tokens than have them go through the layer in batches.
constexpr int64_t kMaxPairs = 65536;

// On tokens of which there is at least one.
size_t workspace_size(const Device& device, const flexq_stream& stream, const flexq_experts_desc& desc, int64_t m,
                      int64_t top_k, flexq_dtype x_dtype);

// weight_strides: bytes of an expert's gate_up, and of its down.
void forward(const Device& device, const flexq_stream& stream, const ExpertsCall& call,
             const std::array<int64_t, 2>& weight_strides);

}  // namespace flexq::cuda::experts
