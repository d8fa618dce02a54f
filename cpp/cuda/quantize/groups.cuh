// The quantizer of scheme group where nothing of the whole token is needed.
#pragma once

#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda::quantize {

// 32 lanes to a group: a warp has one group of one token, for few tokens. 4 lanes: a warp has a group of a tile of 8
// tokens, writes it whole, and copies the next tile's meanwhile.
template <typename T, ActivationSource::Kind kKind, int kLanes>
__global__ void __launch_bounds__(kWarps * 32, kLanes == 32 ? 6 : 3) quantize_groups(const __grid_constant__ Params p) {
  ptx::launch_dependents();
  ptx::wait_for_previous_kernel();
  extern __shared__ uint4 staging[];
  constexpr int kTokens = 32 / kLanes;
  const int lane = threadIdx.x % 32;
  const Part<kLanes> part(lane);
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (group >= p.groups) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTokens + lane / kLanes;
  const int64_t token_stride = static_cast<int64_t>(gridDim.y) * kTokens;
  using Values = float[Part<kLanes>::kValues];
  const auto quantize = [&](int64_t token, Values& v) {
    const int largest = largest_of_lanes<kLanes>(part.rotate_and_max(p, v));
    if (token < p.m) store_group(p, part, token, group, v, largest);
  };
  const int64_t end = p.m + lane / kLanes;  // as many iterations for all lanes: they shuffle
  if constexpr (kLanes == 4) {
    if (p.prefetch) {
      constexpr int kSlots = inputs_of(kKind) * Part<kLanes>::template kCopies<T>;
      const auto slots = [&](int odd) { return staging + odd * kSlots * static_cast<int>(blockDim.x) + threadIdx.x; };
      const auto prefetch = [&](int64_t token, int odd) {
        part.template copy_source<T, kKind>(p, token, group, slots(odd));
        ptx::cp_async_commit();
      };
      prefetch(first, 0);
      int odd = 0;
      for (int64_t token = first; token < end; token += token_stride, odd ^= 1) {
        prefetch(token + token_stride, odd ^ 1);
        ptx::cp_async_wait<1>();
        Values v;
        part.template read_source<T, kKind>(p, slots(odd), v);
        quantize(token, v);
      }
      return;
    }
  }
  for (int64_t token = first; token < end; token += token_stride) {
    Values v = {};
    if (token < p.m) part.template load_source<T, kKind>(p, token, group, v);
    quantize(token, v);
  }
}

}  // namespace flexq::cuda::quantize
