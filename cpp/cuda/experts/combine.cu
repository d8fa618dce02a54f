// y of each token from its pairs' products.
#include "cuda/elements.cuh"
#include "cuda/experts/kernels.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/quantize/values.cuh"

namespace flexq::cuda::experts {
namespace {

constexpr int kThreads = 128;
constexpr int kPairs = 8;  // whose products are loaded at once

// A thread has kCount neighbouring columns of a token; roundings as on the CPU. kCount 4: rows are aligned for that.
template <int kCount, typename T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineArgs a) {
  using Vector = quantize::Vector<T, kCount>;
  ptx::launch_dependents();
  const int64_t token = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kCount;
  if (column >= a.n) return ptx::wait_for_previous_kernel();
  float sums[kCount] = {};
  for (int64_t first = 0; first < a.top_k; first += kPairs) {
    // These are known before the GEMM ahead has finished.
    int rows[kPairs];
    float weights[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int64_t pair = token * a.top_k + first + j;
      rows[j] = first + j < a.top_k ? a.places[pair].row : -1;
      weights[j] = rows[j] < 0 || a.weights == nullptr ? 1.0f : load_float(a.weights, a.weights_dtype, pair);
    }
    if (first == 0) ptx::wait_for_previous_kernel();
    Vector products[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (rows[j] >= 0)
        products[j] = *reinterpret_cast<const Vector*>(static_cast<const T*>(a.products) + rows[j] * a.n + column);
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (rows[j] < 0) continue;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sums[i] = __fadd_rn(sums[i], __fmul_rn(weights[j], quantize::to_float(products[j].value[i])));
      }
    }
  }
  const int64_t at = token * a.ldy + column;
  if constexpr (kCount == 4) {
    if (a.y_dtype == FLEXQ_F32) {
      *reinterpret_cast<float4*>(static_cast<float*>(a.y) + at) = {sums[0], sums[1], sums[2], sums[3]};
    } else {
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(a.y) + at) = {to_16_bits(sums[0], sums[1], a.y_dtype),
                                                                     to_16_bits(sums[2], sums[3], a.y_dtype)};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) store_float(a.y, a.y_dtype, at + i, sums[i]);
  }
}

}  // namespace

void combine(cudaStream_t stream, const Device& device, const CombineArgs& args) {
  const bool vectors = args.n % 4 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0 && args.ldy % 4 == 0;
  quantize::dispatch_type(args.products_dtype, [&](auto type) {
    using T = decltype(type);
    launch(stream, "combine", vectors ? combine_kernel<4, T> : combine_kernel<1, T>,
           {.grid = checked_grid("combine", args.tokens, ceil_div(args.n, kThreads * (vectors ? 4 : 1))),
            .block = dim3(kThreads),
            .overlapped = device.has_sm90},
           args);
  });
}

}  // namespace flexq::cuda::experts
