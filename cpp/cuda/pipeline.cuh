// A pipeline of shared memory stages between producers and consumers: a full and an empty mbarrier for each stage.
#pragma once

#include "cuda/ptx.cuh"

namespace flexq::cuda {

#if FLEXQ_SM90A

// A stage, and the parity of its barriers' current phase.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
  __device__ int previous_stage() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// An empty stage's first wait passes at once.
template <int kStages>
__device__ PipelineState<kStages> producer_start() {
  return {.parity = 1};
}

template <int kStages>
struct PipelineBarriers {
  static constexpr int kBytes = kStages * 2 * 8;

  uint32_t base;  // shared memory address

  __device__ uint32_t full(int stage) const { return base + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(stage) + kStages * 8; }

  // By one thread. A stage is full once its bytes have arrived, empty once `consumers` warps have released it.
  __device__ void init(int consumers) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), static_cast<uint32_t>(consumers));
    }
    ptx::fence_mbarrier_init();
  }
  __device__ void wait_full(const PipelineState<kStages>& state) const {
    ptx::mbarrier_wait(full(state.stage), state.parity);
  }
  __device__ void wait_empty(const PipelineState<kStages>& state) const {
    ptx::mbarrier_wait(empty(state.stage), state.parity);
  }
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda
