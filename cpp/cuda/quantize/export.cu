// Quantized activations in plain form.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

__global__ void export_kernel(int64_t m, int64_t groups, int64_t tiles, bool per_group, const uint8_t* in_codes,
                              const float* in_scales, int8_t* codes, float* scales) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= m * groups * kGroup) return;
  const int k = static_cast<int>(index % kGroup);
  const int64_t group = index / kGroup % groups;
  const int64_t token = index / kGroup / groups;
  const uint8_t* tile = in_codes + (group * tiles + token / kTokenTile) * kTileGroupBytes;
  const int at = chunk_offset(static_cast<int>(token % kTokenTile), k / kChunkBytes) + k % kChunkBytes;
  codes[index] = static_cast<int8_t>(tile[at]);
  if (k != 0) return;
  if (per_group) {
    scales[token * groups + group] = in_scales[group * tiles * kTokenTile + token];
  } else if (group == 0) {
    scales[token] = in_scales[token];
  }
}

}  // namespace

void activation_export(cudaStream_t stream, const flexq_activation_desc& desc, const void* quantized, int8_t* codes,
                       float* scales) {
  const ActivationLayout layout(desc);
  const auto* bytes = static_cast<const uint8_t*>(quantized);
  constexpr int kThreads = 256;
  const int64_t groups = num_groups(desc.k);
  const int64_t ctas = ceil_div(desc.m * groups * kGroup, kThreads);
  launch(stream, "activation_export", export_kernel,
         {.grid = checked_grid("activation_export", ctas), .block = dim3(kThreads)}, desc.m, groups, layout.tiles,
         desc.scheme == FLEXQ_SCHEME_GROUP, bytes, reinterpret_cast<const float*>(bytes + layout.scales), codes,
         scales);
}

}  // namespace flexq::cuda
