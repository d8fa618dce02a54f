// Mainloop of scheme channel: the tensor cores sum over all of K in int32.
#pragma once

#include "cuda/wgmma/operands.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

template <typename Cta>
struct ChannelMainloop {
  using Sums = int32_t[Cta::kSums];

  const Cta& cta;

  // Waits for a stage and unpacks this warp's rows of it; zeros past the last group.
  __device__ __forceinline__ void unpack_stage(const Tile& tile, const typename Cta::State& state, int step,
                                               Fragments<Cta>& fragments) const {
    cta.barriers().wait_full(state);
    unpack_group<0>(cta, tile, state.stage, record_offset_of(cta), fragments);
    if constexpr (Cta::kStageGroups == 2) {
      unpack_group<1>(cta, tile, state.stage, record_offset_of(cta), fragments);
      const bool there = cta.groups_of(step) == 2;
#pragma unroll
      for (int i = 0; i < 16; ++i) fragments.a[1][i / 4][i % 4] = there ? fragments.a[1][i / 4][i % 4] : 0;
    }
  }

  // All steps of `work`, whose first one is in `even`, for so many tiles of 8 tokens.
  __device__ __forceinline__ void run(const Tile& tile, const Work& work, int token_tiles, typename Cta::State& state,
                                      Fragments<Cta>& even, Fragments<Cta>& odd, Sums& sums) const {
    if constexpr (Cta::kPartTiles) {
      constexpr int kFew = 64, kSome = 128;
      if constexpr (Cta::kTokens > kFew) {
        if (token_tiles <= kFew / kTokenTile) return run_steps<kFew>(tile, work, state, even, odd, sums);
      }
      if constexpr (Cta::kTokens > kSome) {
        if (token_tiles <= kSome / kTokenTile) return run_steps<kSome>(tile, work, state, even, odd, sums);
      }
    }
    run_steps<Cta::kTokens>(tile, work, state, even, odd, sums);
  }

 private:
  template <int kTokens>
  __device__ __forceinline__ void run_steps(const Tile& tile, const Work& work, typename Cta::State& state,
                                            Fragments<Cta>& even, Fragments<Cta>& odd, Sums& sums) const {
    for (int step = work.begin; step < work.end; step += 2) {
      advance<kTokens>(tile, work, step, state, even, odd, sums);
      if (step + 1 < work.end) advance<kTokens>(tile, work, step + 1, state, odd, even, sums);
    }
    ptx::wgmma_wait<0>();
    ptx::fence_registers(sums);
    release(cta, state.previous_stage());
  }

  // Starts the products of `now` and unpacks the next step into `next` beside them.
  template <int kTokens>
  __device__ __forceinline__ void advance(const Tile& tile, const Work& work, int step, typename Cta::State& state,
                                          const Fragments<Cta>& now, Fragments<Cta>& next, Sums& sums) const {
    auto& of_tokens = reinterpret_cast<int32_t (&)[kTokens / 2]>(sums);
    const int stage = state.stage;
    state.advance();
    ptx::wgmma_fence();
#pragma unroll
    for (int g = 0; g < Cta::kStageGroups; ++g) {
#pragma unroll
      for (int s = 0; s < 4; ++s) ptx::wgmma_s8<true>(of_tokens, now.a[g][s], b_descriptor(cta, stage, g, s, 0));
    }
    ptx::wgmma_commit();
    // This step's products keep the tensor cores busy while the step before is waited for and released.
    ptx::wgmma_wait<1>();
    if (step > work.begin) release(cta, stage == 0 ? Cta::kStages - 1 : stage - 1);
    if (step + 1 < work.end) unpack_stage(tile, state, step + 1, next);
  }
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
