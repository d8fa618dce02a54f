// Mainloop of scheme group: the int32 sums of every group of 128 k are scaled and added to fp32 sums.
#pragma once

#include <utility>

#include "cuda/wgmma/operands.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

// A stage's products are its groups, each by the tile's tokens, kMmaTokens at a time.
template <typename Cta>
struct GroupMainloop {
  static constexpr int kMmaTokens = Cta::kC.mma_n;
  static constexpr int kGroupProducts = Cta::kTokens / kMmaTokens;
  static constexpr int kProducts = Cta::kStageGroups * kGroupProducts;
  static_assert(kProducts % 2 == 0, "every stage begins with the same dots");
  using Sums = float[Cta::kSums];
  using Dots = int32_t[kMmaTokens / 2];

  const Cta& cta;

  __device__ __forceinline__ void run(const Tile& tile, const Work& work, typename Cta::State& state,
                                      Sums& sums) const {
    const Offsets offsets = offsets_of(tile);
    Fragments<Cta> fragments;
    Dots dots[2];
    // The records of the first two products.
    cta.barriers().wait_full(state);
    unpack_group<0>(cta, tile, state.stage, offsets.record, fragments);
    if constexpr (kGroupProducts == 1) unpack_group<1>(cta, tile, state.stage, offsets.record, fragments);
    start<0>(state.stage, fragments, dots[0]);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(dots[0]);
#pragma unroll 1
    for (int step = work.begin; step + 1 < work.end; ++step) {
      advance<false>(tile, offsets, step, state, fragments, dots, sums);
    }
    advance<true>(tile, offsets, work.end - 1, state, fragments, dots, sums);
  }

 private:
  // Where this lane's part of a stage's first group is: its record and its rows' scales in the stage, its tokens'
  // scales in shared memory.
  struct Offsets {
    int record, row_scales, token_scales;
  };
  __device__ Offsets offsets_of(const Tile& tile) const {
    return {
        ptx::keep_in_register(record_offset_of(cta)),
        ptx::keep_in_register(tile.blocks * record_bytes(Cta::kBits) + (cta.block * kRecordRows + cta.lane / 4) * 2),
        ptx::keep_in_register(Cta::kScalesAt + cta.lane % 4 * 8)};
  }

  template <int product>
  __device__ __forceinline__ void start(int stage, const Fragments<Cta>& fragments, Dots& dots) const {
    constexpr int g = product / kGroupProducts, kFirstToken = product % kGroupProducts * kMmaTokens;
    ptx::wgmma_fence();
    ptx::wgmma_s8<false>(dots, fragments.a[g][0], b_descriptor(cta, stage, g, 0, kFirstToken));
#pragma unroll
    for (int s = 1; s < 4; ++s) {
      ptx::wgmma_s8<true>(dots, fragments.a[g][s], b_descriptor(cta, stage, g, s, kFirstToken));
    }
    ptx::wgmma_commit();
  }

  // sums += dots * scales; of bytes, not of codes: the epilogue takes that back.
  template <int product>
  __device__ __forceinline__ void scale(const Tile& tile, const Offsets& offsets, int stage, const Dots& dots,
                                        Sums& sums) const {
    constexpr int g = product / kGroupProducts, kFirstToken = product % kGroupProducts * kMmaTokens;
    const auto* of_rows = reinterpret_cast<const __half*>(cta.shared + stage * Cta::kC.stage_bytes() +
                                                          offsets.row_scales + g * tile.blocks * Cta::kRecord);
    const float low = __half2float(of_rows[0]), high = __half2float(of_rows[8]);
    const auto* of_tokens = reinterpret_cast<const float2*>(
        cta.shared + stage * Cta::kC.scale_bytes() + offsets.token_scales + (g * Cta::kTokens + kFirstToken) * 4);
#pragma unroll
    for (int j = 0; j < kMmaTokens / 8; ++j) {
      const float2 act = of_tokens[4 * j];
      const int32_t* from = dots + 4 * j;
      float* to = sums + kFirstToken / 2 + 4 * j;
      to[0] += static_cast<float>(from[0]) * (low * act.x);
      to[1] += static_cast<float>(from[1]) * (low * act.y);
      to[2] += static_cast<float>(from[2]) * (high * act.x);
      to[3] += static_cast<float>(from[3]) * (high * act.y);
    }
  }

  // The products of a stage, software-pipelined: while one is scaled, the tensor cores have the next, and the one after
  // that is unpacked. None is in flight where the loop turns around: ptxas would serialize all of them. Past the last
  // group the sums are of undefined data and are not used.
  template <bool kLast>
  __device__ __forceinline__ void advance(const Tile& tile, const Offsets& offsets, int step,
                                          typename Cta::State& state, Fragments<Cta>& fragments, Dots (&dots)[2],
                                          Sums& sums) const {
    const int stage = state.stage;
    state.advance();
    const int groups = kLast ? cta.groups_of(step) : Cta::kStageGroups;
    const auto product = [&]<int p>(std::integral_constant<int, p>) {
      constexpr int kNext = (p + 1) % kProducts, kAfter = (p + 2) % kProducts;
      constexpr bool kNextHere = p + 1 < kProducts, kAfterHere = p + 2 < kProducts;
      if constexpr (kNextHere || !kLast) start<kNext>(kNextHere ? stage : state.stage, fragments, dots[kNext % 2]);
      if constexpr (kAfter % kGroupProducts == 0 && (kAfterHere || !kLast)) {
        if constexpr (kAfter == 0) cta.barriers().wait_full(state);
        constexpr int g = kAfter / kGroupProducts;
        unpack_group<g>(cta, tile, kAfterHere ? stage : state.stage, offsets.record, fragments);
      }
      if (p / kGroupProducts < groups) scale<p>(tile, offsets, stage, dots[p % 2], sums);
      ptx::wgmma_wait<0>();
      ptx::fence_registers(dots[kNext % 2]);
    };
    [&]<int... p>(std::integer_sequence<int, p...>) {
      (product(std::integral_constant<int, p>{}), ...);
    }(std::make_integer_sequence<int, kProducts>{});
    release(cta, stage);
  }
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
