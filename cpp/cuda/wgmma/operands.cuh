// The operands of wgmma: A is weight codes that a warp unpacks into registers, B is activations as they lie in a stage.
#pragma once

#include "cuda/records.cuh"
#include "cuda/wgmma/cta.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

// A fragments of a warp's 16 rows: [group of the stage][k step of 32][register].
template <typename Cta>
struct Fragments {
  uint32_t a[Cta::kStageGroups][4][4];
};

// Where a stage's first record of this warp is in the stage.
template <typename Cta>
__device__ int record_offset_of(const Cta& cta) {
  return cta.block * record_bytes(Cta::kBits);
}

template <int g, typename Cta>
__device__ __forceinline__ void unpack_group(const Cta& cta, const Tile& tile, int stage, int record_offset,
                                             Fragments<Cta>& fragments) {
  const uint8_t* record = cta.shared + stage * Cta::kC.stage_bytes() + record_offset + g * tile.blocks * Cta::kRecord;
  const Record<Cta::kBits> packed(record, cta.lane);
#pragma unroll
  for (int s = 0; s < 4; ++s) packed.unpack(s, fragments.a[g][s]);
}

// The matrix descriptor of k step s of a stage's group: no swizzle, core matrices 128 bytes apart along k and 1 KB
// along tokens.
template <typename Cta>
__device__ __forceinline__ uint64_t b_descriptor(const Cta& cta, int stage, int g, int s, int first_token) {
  // Addresses count 16 bytes. The bits above them name a CTA of the cluster; no sum here carries into those.
  const uint64_t first = static_cast<uint64_t>(cta.acts(0) >> 4 & 0x3fff) |
                         static_cast<uint64_t>(kCoreMatrixBytes >> 4) << 16 |
                         static_cast<uint64_t>(kTileGroupBytes >> 4) << 32;
  const uint32_t offset = static_cast<uint32_t>(stage) * (Cta::kC.stage_bytes() / 16);
  const int within = (g * Cta::kTokens + first_token) * kGroup + s * 2 * kCoreMatrixBytes;
  return first + offset + static_cast<uint32_t>(within / 16);
}

// This warp is done with a stage, here and at the peers that copy to it: one lane arrives at each of them.
template <typename Cta>
__device__ __forceinline__ void release(const Cta& cta, int stage) {
  __syncwarp();
  if (cta.lane < cta.p.multicast) ptx::mbarrier_arrive_cluster(cta.peer_empty + stage * 8);
}

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
