// Stream-K tiles (arXiv 2301.03598): partial sums of a tile meet in the workspace.
//
// A CTA takes its range of K steps from the last tile to the first. The part of a tile that does not end it is thus its
// CTA's first stream-K work, which waits for nobody. The CTA whose part ends the tile adds the others, all of lower
// blockIdx. CTAs start in order of blockIdx, so waiting ends even where a single one is resident at a time.
#pragma once

#include "cuda/wgmma/cta.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

template <typename Cta>
struct StreamKFixup {
  using Sums = float[Cta::kSums];

  const Cta& cta;

  // This CTA's part of a tile that a later CTA stores.
  __device__ __forceinline__ void publish(const Sums& sums) const {
    float* to = partials_of(static_cast<int>(blockIdx.x));
#pragma unroll
    for (int i = 0; i < Cta::kSums; ++i) __stcg(to + i * kConsumerThreads, sums[i]);
    __threadfence();
    ptx::named_barrier(kConsumerBarrier, kConsumerThreads);
    if (threadIdx.x == 0) ptx::store_release(cta.p.ready + blockIdx.x, cta.p.token);
    __syncwarp();  // else the compiler takes warps for divergent and uses no uniform registers in the loops
  }

  // Always from the part next to this one down to the tile's first, so that every run gives the same bits.
  __device__ __forceinline__ void add_others(const Work& work, Sums& sums) const {
    const int tile_begin = (work.tile - cta.p.whole_tiles) * cta.steps;  // among the stream-K steps
    for (int other = static_cast<int>(blockIdx.x) - 1; stream_k_begin(cta.p, other + 1) > tile_begin; --other) {
      // All lanes poll alike, so that the compiler keeps what is uniform in a warp in uniform registers.
      while (!__all_sync(~0u, ptx::load_acquire(cta.p.ready + other) == cta.p.token)) {
      }
      ptx::named_barrier(kConsumerBarrier, kConsumerThreads);
      if (threadIdx.x == 0) cta.p.ready[other] = 0;  // the next launch must not take it for its own
      const float* from = partials_of(other);
#pragma unroll
      for (int i = 0; i < Cta::kSums; ++i) sums[i] += __ldcg(from + i * kConsumerThreads);
    }
  }

 private:
  __device__ float* partials_of(int of) const {
    return cta.p.partials + static_cast<int64_t>(of) * Cta::kSums * kConsumerThreads + threadIdx.x;
  }
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
