// Reductions over a whole token: its sum of squares, its largest magnitude.
#pragma once

#include <bit>

#include "cuda/quantize/params.h"
#include "cuda/quantize/values.cuh"

namespace flexq::cuda::quantize {

// This CTA's rank in its cluster, once all of the cluster's CTAs have started and can be written to, with pairs of
// tables of reductions. All threads must come.
template <typename... Tables>
__device__ int join_cluster(int cluster, Tables (&... tables)[2]) {
  int rank = 0;
#if FLEXQ_SM90A
  if (cluster > 1) {
    rank = static_cast<int>(ptx::cluster_rank());
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) (ptx::mbarrier_init(ptx::shared_address(&tables[i].arrived), 1), ...);
      ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync_relaxed();
  }
#endif
  return rank;
}

// Reduces one value for each token of a tile over all warps of the cluster, always in the same order. Each warp sends
// its value to every CTA, whose mbarrier counts the bytes: a cluster barrier would first wait for the codes of the tile
// before. Two tables alternate for each statistic: a warp sends a tile's value after it has read the table of the tile
// before, so that none is overwritten. `kCtas`: the most that a cluster may have.
template <int kLanes, int kMaxThreads = kMaxTokenThreads, int kCtas = kMaxCluster>
class TokenReduce {
 public:
  static constexpr int kTokens = 32 / kLanes;  // of a warp, a CTA and a cluster alike
  struct Table {
    uint64_t arrived;
    uint32_t of_warp[kCtas * kMaxThreads / 32][kTokens];
  };

  // `rank` of join_cluster().
  __device__ TokenReduce(int cluster, int rank)
      : cluster_(cluster),
        warps_(static_cast<int>(blockDim.x / 32)),
        warp_(rank * warps_ + static_cast<int>(threadIdx.x / 32)),
        token_(static_cast<int>(threadIdx.x) % 32 / kLanes),
        lane_(static_cast<int>(threadIdx.x) % kLanes) {}

  // `iteration` counts the tiles of this cluster from 0.
  __device__ float sum(float value, Table (&tables)[2], int iteration) const {
    return reduce(value, tables, iteration, sum_of_lanes<kLanes>, [](float a, float b) { return a + b; });
  }
  __device__ int largest(int value, Table (&tables)[2], int iteration) const {
    return reduce(value, tables, iteration, largest_of_lanes<kLanes>, [](int a, int b) { return max(a, b); });
  }

 private:
  // Each warp sends its value to all CTAs, one lane to each.
  __device__ const Table& exchange(uint32_t value, Table (&tables)[2], int iteration) const {
    Table& table = tables[iteration % 2];
    if (cluster_ == 1) {
      if (lane_ == 0) table.of_warp[warp_][token_] = value;
      __syncthreads();
      return table;
    }
#if FLEXQ_SM90A
    const uint32_t arrived = ptx::shared_address(&table.arrived);
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(arrived, static_cast<uint32_t>(cluster_ * warps_ * kTokens) * sizeof(value));
    }
    const uint32_t slot = ptx::shared_address(&table.of_warp[warp_][token_]);
    for (int cta = lane_; cta < cluster_; cta += kLanes) {
      const auto to = static_cast<uint32_t>(cta);
      ptx::store_async(ptx::remote_address(slot, to), value, ptx::remote_address(arrived, to));
    }
    ptx::mbarrier_wait(arrived, static_cast<uint32_t>(iteration / 2 % 2));
#endif
    return table;
  }

  // Over the warp's lanes, over the warps of the cluster, and over the lanes that share that.
  template <typename Value, typename OverLanes, typename Combine>
  __device__ Value reduce(Value value, Table (&tables)[2], int iteration, const OverLanes& over_lanes,
                          const Combine& combine) const {
    const Table& table = exchange(std::bit_cast<uint32_t>(over_lanes(value)), tables, iteration);
    Value all = 0;
#pragma unroll 4
    for (int i = lane_; i < cluster_ * warps_; i += kLanes) {
      all = combine(all, std::bit_cast<Value>(table.of_warp[i][token_]));
    }
    return over_lanes(all);
  }

  int cluster_, warps_;
  int warp_;  // among those of the cluster
  int token_, lane_;
};

}  // namespace flexq::cuda::quantize
