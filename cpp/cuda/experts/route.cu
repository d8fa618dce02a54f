// Sorts pairs by their expert, stably. A CTA places a range of pairs, of which each warp takes a part. How many of
// every expert come before and after its range it counts itself: that takes less time than to wait for others to count.
#include <algorithm>

#include "cuda/experts/kernels.h"
#include "cuda/experts/table.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda::experts {
namespace {

constexpr int kMaxWarps = 32;
constexpr int64_t kPairsPerCta = 1024, kMaxCtas = 32;
constexpr int64_t kSharedBytes = 96 * 1024;  // that every GPU has

struct RouteParams {
  Ids ids;
  int experts, pairs, pairs_per_cta, tile_tokens, max_tiles;
  Routed to;
};

struct Count {
  int tiles, rows;
};

// The sums of all threads before this one.
__device__ Count exclusive_scan(Count own) {
  __shared__ Count of_warp[kMaxWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Count sum = own;
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    const int tiles = __shfl_up_sync(~0u, sum.tiles, stride), rows = __shfl_up_sync(~0u, sum.rows, stride);
    if (lane < stride) continue;
    sum.tiles += tiles;
    sum.rows += rows;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  const Count of_lane = lane < warp ? of_warp[lane] : Count{0, 0};
  return {sum.tiles - own.tiles + __reduce_add_sync(~0u, of_lane.tiles),
          sum.rows - own.rows + __reduce_add_sync(~0u, of_lane.rows)};
}

__global__ void __launch_bounds__(32 * kMaxWarps) route_kernel(const __grid_constant__ RouteParams p) {
  extern __shared__ int32_t shared[];
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int32_t* first_tile = shared;                     // [experts + 1]
  int32_t* first_row = first_tile + p.experts + 1;  // [experts + 1]
  int32_t* next = first_row + p.experts + 1;  // [warps][experts]: a warp's pairs of an expert, then its next one's row
  int32_t* mine = next + warp * p.experts;
  int32_t *before_cta = first_tile, *after_cta = first_row;  // pairs of an expert, until those are known
  for (int i = thread; i < (warps + 2) * p.experts + 2; i += threads) shared[i] = 0;
  // What is behind may read x as soon as it starts: so not before what wrote x has finished.
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  __syncthreads();

  const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
  const int begin_cta = min(cta * p.pairs_per_cta, p.pairs), end_cta = min(begin_cta + p.pairs_per_cta, p.pairs);
  const int share = (end_cta - begin_cta + threads - 1) / threads * 32;
  const int begin = min(begin_cta + warp * share, end_cta), end = min(begin + share, end_cta);
  const auto count = [&](int from, int to, int stride, int32_t* of_experts) {
#pragma unroll 8
    for (int pair = from; pair < to; pair += stride) {
      const int expert = expert_of(p.ids, pair);
      if (expert >= 0) atomicAdd(of_experts + expert, 1);
    }
  };
  count(begin + lane, end, 32, mine);
  count(thread, begin_cta, threads, before_cta);
  count(end_cta + thread, p.pairs, threads, after_cta);
  __syncthreads();

  // A thread has neighbouring experts: their counts, where they begin, and where each warp's pairs of them begin.
  const int per_thread = (p.experts + threads - 1) / threads;
  const int begin_expert = min(thread * per_thread, p.experts), end_expert = min(begin_expert + per_thread, p.experts);
  const auto tiles_of = [&](int rows) { return (rows + p.tile_tokens - 1) / p.tile_tokens; };
  Count own{0, 0};
  for (int expert = begin_expert; expert < end_expert; ++expert) {
    int rows = before_cta[expert] + after_cta[expert];
#pragma unroll 8
    for (int w = 0; w < warps; ++w) rows += next[w * p.experts + expert];
    own.tiles += tiles_of(rows);
    own.rows += rows;
  }
  Count before = exclusive_scan(own);
  for (int expert = begin_expert; expert < end_expert; ++expert) {
    constexpr int kAtOnce = 8;
    int rows = before_cta[expert];
    const int rows_after = after_cta[expert];
    first_tile[expert] = before.tiles;
    first_row[expert] = before.rows;
    for (int first = 0; first < warps; first += kAtOnce) {
      int counts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) counts[i] = first + i < warps ? next[(first + i) * p.experts + expert] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < warps) next[(first + i) * p.experts + expert] = before.rows + rows;
        rows += counts[i];
      }
    }
    rows += rows_after;
    before.tiles += tiles_of(rows);
    before.rows += rows;
  }
  if (thread == threads - 1) {  // whose experts, if any, are the last ones
    first_tile[p.experts] = before.tiles;
    first_row[p.experts] = before.rows;
    if (cta == 0) *p.to.num_tiles = before.tiles;
  }
  __syncthreads();

  for (int tile = cta * threads + thread; tile < first_tile[p.experts]; tile += ctas * threads) {
    int expert = 0;  // the last one that begins at this tile or before: those without pairs begin where the next does
    for (int end_of_search = p.experts; end_of_search - expert > 1;) {
      const int middle = (expert + end_of_search) / 2;
      (first_tile[middle] <= tile ? expert : end_of_search) = middle;
    }
    const int row = first_row[expert] + (tile - first_tile[expert]) * p.tile_tokens;
    p.to.tiles[tile] = {expert, min(p.tile_tokens, first_row[expert + 1] - row), row, 0};
  }
  for (int tile = first_tile[p.experts] + cta * threads + thread; tile < p.max_tiles; tile += ctas * threads) {
    p.to.tiles[tile] = {};
  }

  for (int first = begin; first < end; first += 32) {
    const int pair = first + lane;
    const int expert = pair < end ? expert_of(p.ids, pair) : -1;
    const unsigned same = __match_any_sync(~0u, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int row = expert < 0 ? -1 : mine[expert] + rank;
    __syncwarp();
    if (expert >= 0 && rank == 0) mine[expert] += __popc(same);
    __syncwarp();
    if (pair >= end) continue;
    p.to.places[pair] =
        expert < 0 ? Place{-1, -1} : Place{first_tile[expert] * p.tile_tokens + row - first_row[expert], row};
    if (expert >= 0) p.to.pairs[row] = pair;
  }
}

}  // namespace

void route(cudaStream_t stream, const Device& device, const RouteArgs& args) {
  const int64_t ctas = std::clamp<int64_t>(args.pairs / kPairsPerCta, 1, kMaxCtas);
  const int64_t pairs_per_cta = ceil_div(args.pairs, ctas);
  const RouteParams params{.ids = args.ids,
                           .experts = args.ids.experts,
                           .pairs = static_cast<int>(args.pairs),
                           .pairs_per_cta = static_cast<int>(pairs_per_cta),
                           .tile_tokens = args.tile_tokens,
                           .max_tiles = static_cast<int>(args.max_tiles),
                           .to = args.to};
  const auto shared_bytes = [&](int64_t warps) { return ((warps + 2) * args.ids.experts + 2) * 4; };
  // A warp for 32 pairs and a thread for each expert, as far as there is shared memory.
  int64_t warps = std::clamp<int64_t>(ceil_div(std::max<int64_t>(pairs_per_cta, args.ids.experts), 32), 1, kMaxWarps);
  while (warps > 1 && shared_bytes(warps) > kSharedBytes) --warps;
  launch(stream, "route", route_kernel,
         {.grid = dim3(static_cast<unsigned>(ctas)),
          .block = dim3(static_cast<unsigned>(32 * warps)),
          .shared_bytes = static_cast<size_t>(shared_bytes(warps)),
          .overlapped = device.has_sm90},
         params);
}

}  // namespace flexq::cuda::experts
