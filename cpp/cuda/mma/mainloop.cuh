// Mainloops: a warp multiplies its records by its group's activations, with activations of its own or shared ones.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/mma/activations.cuh"
#include "cuda/mma/bits.cuh"
#include "cuda/mma/producer.cuh"
#include "cuda/records.cuh"

namespace flexq::cuda::mma {

// Record of block b times the group's activations.
template <typename W>
__device__ __forceinline__ void multiply(W& w, int b, const uint8_t* record, const Activations<W>& act) {
  const Record<W::kBits> packed(record, w.lane);
  int32_t dots[W::kC.token_tiles][4];
#pragma unroll
  for (int t = 0; t < W::kC.token_tiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dots[t][i] = W::kPerGroup ? 0 : static_cast<int32_t>(w.acc[b][t][i]);
  }
  uint32_t low_bits[8], high_bits[8];  // of rows g and g + 8
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    uint32_t a[4];
    packed.unpack(s, a);
    if constexpr (W::kC.product == Product::kS8) {
#pragma unroll
      for (int t = 0; t < W::kC.token_tiles; ++t) {
        ptx::mma_m16n8k32_s8(dots[t], a, act.codes[t][2 * s], act.codes[t][2 * s + 1]);
      }
    } else {
      low_bits[2 * s] = a[0];
      low_bits[2 * s + 1] = a[2];
      high_bits[2 * s] = a[1];
      high_bits[2 * s + 1] = a[3];
    }
  }
  if constexpr (W::kC.product != Product::kS8) {
    static_assert(W::kC.token_tiles == 1, "bits are for few tokens");
    transpose_bits(low_bits);
    transpose_bits(high_bits);
    b1_products<W::kBits, W::kC.product == Product::kB1A6 ? 6 : 8>(dots[0], low_bits, high_bits, act.codes[0]);
  }
  if constexpr (W::kPerGroup) {
    const auto* scales = reinterpret_cast<const __half*>(record + Record<W::kBits>::kBytes);
    const float low = __half2float(scales[w.lane / 4]);
    const float high = __half2float(scales[w.lane / 4 + 8]);
#pragma unroll
    for (int t = 0; t < W::kC.token_tiles; ++t) {
      w.acc[b][t][0] += static_cast<float>(dots[t][0]) * (low * act.scales[t].x);
      w.acc[b][t][1] += static_cast<float>(dots[t][1]) * (low * act.scales[t].y);
      w.acc[b][t][2] += static_cast<float>(dots[t][2]) * (high * act.scales[t].x);
      w.acc[b][t][3] += static_cast<float>(dots[t][3]) * (high * act.scales[t].y);
    }
  } else {
#pragma unroll
    for (int t = 0; t < W::kC.token_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w.acc[b][t][i] = dots[t][i];
    }
  }
}

// Each warp runs by itself: as soon as a record has been used, the copy of another one takes its slot.
template <typename W>
__device__ void run_independent(W& w) {
  // Weights do not depend on the kernel before this one; activations do. One record at a time: the quantizer, which
  // still runs, waits behind each load.
  for (int i = 0; i < W::kC.slots; ++i) {
    ptx::cp_async_wait<0>();
    copy_record(w, i);
    ptx::cp_async_commit();
  }
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  constexpr bool kAhead = W::kC.act_ahead();
  Activations<W> now{}, next{};
  if (kAhead && w.steps > 0) load_activations(w, next);
  int slot = 0;
  for (int step = 0; step < w.steps; ++step) {
    if constexpr (kAhead) {
      now = next;
      w.group += W::kC.warps_k;
      if (step + 1 < w.steps) load_activations(w, next);
    } else {
      load_activations(w, now);
      w.group += W::kC.warps_k;
    }
    if constexpr (W::kC.product != Product::kS8) transpose_bits(now.codes[0]);
#pragma unroll
    for (int b = 0; b < W::kC.blocks; ++b) {
      if (b >= w.blocks) break;
      ptx::cp_async_wait<W::kC.slots - 1>();
      __syncwarp();
      multiply(w, b, w.ring + slot * W::kSlotBytes, now);
      __syncwarp();
      copy_record(w, slot);
      ptx::cp_async_commit();  // commits an empty group too: waits count groups
      slot = slot + 1 == W::kC.slots ? 0 : slot + 1;
    }
  }
}

// All warps of the CTA step together, since they share the activations.
template <typename W>
__device__ void run_shared(W& w, int steps) {
  constexpr int kStages = W::kC.stages();
  const auto copy_weights = [&](int stage) {
    for (int b = 0; b < w.blocks; ++b) copy_record(w, stage * W::kC.blocks + b);
  };
  for (int i = 0; i < kStages - 1; ++i) copy_weights(i);
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) copy_activations(w, i);
    ptx::cp_async_commit();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    if (step < w.steps) {
      Activations<W> now;
      read_activations(w, stage, now);
#pragma unroll
      for (int b = 0; b < W::kC.blocks; ++b) {
        if (b >= w.blocks) break;
        multiply(w, b, w.ring + (stage * W::kC.blocks + b) * W::kSlotBytes, now);
      }
    }
    const int free = stage == 0 ? kStages - 1 : stage - 1;
    copy_weights(free);
    if (step + kStages - 1 < steps) copy_activations(w, free);
    ptx::cp_async_commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

}  // namespace flexq::cuda::mma
