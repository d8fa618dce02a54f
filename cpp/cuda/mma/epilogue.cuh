// Epilogue: the sums of warps and parts of K meet, and y is stored.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/mma/warp.cuh"

namespace flexq::cuda::mma {

// y = sum, scaled, with the bias, rounded once.
template <bool kPerGroup, typename Sum>
__device__ void store(const Params& p, int64_t row, int64_t token, Sum sum) {
  if (row >= p.n || token >= p.m) return;
  float value = static_cast<float>(sum) * p.unit;
  if constexpr (!kPerGroup) value *= __half2float(reinterpret_cast<const __half*>(p.scales)[row]) * p.act_scales[token];
  if (p.bias != nullptr) value += load_float(p.bias, p.bias_dtype, row);
  store_float(p.y, p.y_dtype, token * p.ldy + row, value);
}

// Adds the warps along K, and stores the tile or, where K is split, this part's sums.
template <typename W>
__device__ void finish(W& w) {
  ptx::cp_async_wait<0>();
  __syncthreads();  // the rings are done with
  typename W::Sum* mine = w.sums + w.warp_k * W::kC.sums();
#pragma unroll
  for (int b = 0; b < W::kC.blocks; ++b) {
#pragma unroll
    for (int t = 0; t < W::kC.token_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = w.warp_n * W::kC.warp_rows() + b * kRecordRows + w.lane / 4 + i / 2 * 8;
        const int token = t * kTokenTile + w.lane % 4 * 2 + i % 2;
        mine[token * W::kC.rows() + row] = w.acc[b][t][i];
      }
    }
  }
  __syncthreads();
  const int64_t tile = static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
  const int rows = W::kC.warps_n * w.p.blocks * kRecordRows;  // of W::kC.rows() at most
  typename W::Sum* partials = static_cast<typename W::Sum*>(w.p.partials) +
                              (blockIdx.y * static_cast<int64_t>(gridDim.z) * gridDim.x + tile) * W::kC.sums();
  for (int i = static_cast<int>(threadIdx.x); i < w.tiles * kTokenTile * W::kC.rows(); i += W::kC.threads()) {
    typename W::Sum sum = w.sums[i];
#pragma unroll
    for (int k = 1; k < W::kC.warps_k; ++k) sum += w.sums[k * W::kC.sums() + i];
    if (gridDim.y > 1) {
      partials[i] = sum;
    } else if (i % W::kC.rows() < rows) {
      store<W::kPerGroup>(w.p, static_cast<int64_t>(blockIdx.x) * rows + i % W::kC.rows(),
                          w.first_tile * kTokenTile + i / W::kC.rows(), sum);
    }
  }
}

constexpr int kReduceThreads = 128;

// Adds the parts of K from first to last, so that every run gives the same bits.
template <bool kPerGroup>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ Params p, int tile_rows, int tile_tokens, int64_t row_tiles, int64_t tiles,
                  int splits) {
  using Sum = std::conditional_t<kPerGroup, float, int32_t>;
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int sums = tile_rows * tile_tokens;
  const int64_t tile = index / sums;
  const int i = static_cast<int>(index % sums);
  const int64_t row = tile % row_tiles * tile_rows + i % tile_rows;
  const int64_t token = tile / row_tiles * tile_tokens + i / tile_rows;
  if (tile >= tiles || row >= p.n || token >= p.m) return;
  const Sum* partials = static_cast<const Sum*>(p.partials) + index;
  Sum sum = 0;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += __ldcg(partials + split * tiles * sums);
  store<kPerGroup>(p, row, token, sum);
}

}  // namespace flexq::cuda::mma
