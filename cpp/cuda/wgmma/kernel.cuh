// y = x * w^T by wgmma on int8 codes (sm_90a): a persistent, warp-specialized GEMM for 16 tokens to many thousands.
//
// A CTA computes tiles of 128 rows and up to 256 tokens. A producer warpgroup fills a pipeline of stages by bulk
// copies; each of two consumer warpgroups has 64 rows, unpacks records into A fragments in registers and takes B
// straight from shared memory. It unpacks, and in scheme group scales, while the tensor cores multiply.
//
// A cluster is `multicast` CTAs side by side along N, each copying a share of the activations to all of them, times
// `splits` parts of K.
#pragma once

#include "cuda/wgmma/epilogue.cuh"
#include "cuda/wgmma/mainloop_channel.cuh"
#include "cuda/wgmma/mainloop_group.cuh"
#include "cuda/wgmma/producer.cuh"
#include "cuda/wgmma/stream_k.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

template <typename Cta>
__device__ void consume(const Cta& cta) {
  typename Cta::State state;
  cta.for_each_work([&](const Work& work, const typename Cta::TokenTile& tokens) {
    const Tile tile = cta.tile_at(work.tile);
    const Epilogue<Cta> epilogue{cta};
    typename Epilogue<Cta>::Scales scales;
    typename Cta::Sum sums[Cta::kSums];
#pragma unroll
    for (int i = 0; i < Cta::kSums; ++i) sums[i] = 0;
    if constexpr (Cta::kPerGroup) {
      GroupMainloop<Cta>{cta}.run(tile, work, state, sums);
    } else {
      const ChannelMainloop<Cta> mainloop{cta};
      Fragments<Cta> even, odd;
      mainloop.unpack_stage(tile, state, work.begin, even);
      // The first activations have arrived, so their scales have been written too.
      epilogue.load_scales(tokens, tile, scales);
      mainloop.run(tile, work, cta.token_tiles(tokens, tile), state, even, odd, sums);
      epilogue.share_scales(scales);
    }
    if constexpr (Cta::kPerGroup && Cta::kC.stream_k) {
      if (work.steps() < cta.steps) {
        const StreamKFixup<Cta> fixup{cta};
        if (work.end < cta.steps) return fixup.publish(sums);
        fixup.add_others(work, sums);
      }
    }
    // The tile is computed again: the mainloop has no registers to keep it in.
    epilogue.run(tokens, cta.tile_at(ptx::keep_in_register(work.tile)), scales, sums);
  });
}

template <typename Cta>
__device__ void run(const Cta& cta) {
  if (threadIdx.x == 0) cta.barriers().init(kConsumers * 4 * cta.p.multicast);
  __syncthreads();
  ptx::cluster_sync_relaxed();
  if (cta.warp >= 4 * kConsumers) {
    ptx::setmaxnreg_dec<Cta::kProducerRegisters>();
    if (cta.lane == 0) Producer<Cta>{cta}.run();
    __syncwarp();
    if (cta.p.splits > 1) ptx::cluster_sync();  // that of Epilogue::add_parts
  } else {
    ptx::setmaxnreg_inc<Cta::kConsumerRegisters>();
    consume(cta);
  }
  // No CTA exits while a peer may still copy to it, arrive at its barriers or read its sums.
  ptx::cluster_sync_relaxed();
}

#endif  // FLEXQ_SM90A

template <int kConfig, bool kPerGroup, int kBits>
__global__ void __launch_bounds__(65536 / kConfigs[kConfig].launch_registers() / kWarpgroup * kWarpgroup, 1)
    gemm_wgmma_kernel(const __grid_constant__ Params params) {
#if FLEXQ_SM90A
  extern __shared__ __align__(1024) uint8_t shared[];
  run(Cta<kConfig, kPerGroup, kBits>(params, shared));
#endif
}

template <int kConfig, bool kPerGroup, int kBits>
Family::Function Family::kernel() {
  if constexpr (kPerGroup ? kConfigs[kConfig].group : kConfigs[kConfig].channel) {
    return gemm_wgmma_kernel<kConfig, kPerGroup, kBits>;
  } else {
    return nullptr;
  }
}

}  // namespace flexq::cuda::wgmma
