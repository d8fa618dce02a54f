#include "core/backend.h"

#include "core/error.h"
#include "core/format.h"

namespace flexq {

size_t Backend::expert_bytes(const flexq_experts_desc& desc, flexq_projection projection) const {
  return align_up(prepack_size(weight_of_expert(desc, projection)));
}

size_t Backend::experts_prepack_size(const flexq_experts_desc& desc, flexq_projection projection) const {
  return static_cast<size_t>(desc.experts) * expert_bytes(desc, projection);
}

void Backend::experts_prepack(const flexq_stream& stream, const flexq_experts_desc& desc, flexq_projection projection,
                              int64_t first, int64_t count, const uint8_t* planes, const uint16_t* scales,
                              void* prepacked) const {
  const flexq_weight_desc weight = weight_of_expert(desc, projection);
  const size_t stride = expert_bytes(desc, projection);
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    prepack(stream, weight, planes + at * planes_size(weight), scales + at * num_scales(weight),
            static_cast<uint8_t*>(prepacked) + static_cast<size_t>(first + i) * stride);
  }
}

void Backend::experts_unprepack(const flexq_stream& stream, const flexq_experts_desc& desc, flexq_projection projection,
                                int64_t first, int64_t count, const void* prepacked, uint8_t* planes,
                                uint16_t* scales) const {
  const flexq_weight_desc weight = weight_of_expert(desc, projection);
  const size_t stride = expert_bytes(desc, projection);
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<size_t>(i);
    unprepack(stream, weight, static_cast<const uint8_t*>(prepacked) + static_cast<size_t>(first + i) * stride,
              planes + at * planes_size(weight), scales + at * num_scales(weight));
  }
}

size_t Backend::experts_workspace_size(const flexq_stream& stream, const flexq_experts_desc&, int64_t, int64_t,
                                       flexq_dtype) const {
  fail(FLEXQ_UNSUPPORTED, "experts do not run on ", isa(stream.device_index), " in this version; use the CPU");
}

void Backend::experts_forward(const flexq_stream& stream, const ExpertsCall&) const {
  fail(FLEXQ_UNSUPPORTED, "experts do not run on ", isa(stream.device_index), " in this version; use the CPU");
}

}  // namespace flexq
