// The quantizer where the whole token decides: scheme channel, and a fused RMS norm in either scheme.
#pragma once

#include "cuda/quantize/group_part.cuh"
#include "cuda/quantize/token_reduce.cuh"

namespace flexq::cuda::quantize {

// A cluster of CTAs has a tile of 8 tokens (4 lanes to a group), or one token (32 lanes); its warps share the groups.
// Groups beyond what they keep in registers are read again. A cluster that takes several tiles copies the next one
// ahead.
template <typename T, ActivationSource::Kind kKind, int kLanes>
__global__ void __launch_bounds__(kMaxTokenThreads, min_ctas(kLanes))
    quantize_tokens(const __grid_constant__ Params p) {
  using Values = float[Part<kLanes>::kValues];
  constexpr bool kNorm = kKind == ActivationSource::kRmsNorm;
  constexpr int kKept = kept_groups(kKind, kLanes);
  constexpr bool kPrefetch = kLanes == 4;
  __shared__ typename TokenReduce<kLanes>::Table for_norm[2], for_scale[2];
  extern __shared__ uint4 staging[];
  ptx::launch_dependents();
  const int rank = join_cluster(p.cluster, for_norm, for_scale);
  const TokenReduce<kLanes> reduce(p.cluster, rank);
  const ActivationSource& s = p.source;
  constexpr int kTokens = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Part<kLanes> part(lane);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int64_t own = rank * warps + static_cast<int>(threadIdx.x / 32);
  const int64_t stride = p.cluster * warps;
  const int64_t rounds = (p.groups + stride - 1) / stride;  // the same for all, so that shuffles find all their lanes
  if constexpr (kNorm) {
    // To L2 only: the kernel before may not have written it yet.
    constexpr int kLine = 128, kLineValues = kLine / static_cast<int>(sizeof(T));
    for (int64_t group = own; lane < kGroup / kLineValues && group < p.groups; group += stride) {
      const int64_t at = group * kGroup + lane * kLineValues;
      if (at < p.k) ptx::prefetch_to_l2(static_cast<const T*>(p.source.weight) + at);
    }
  }

  ptx::wait_for_previous_kernel();

  constexpr int kInputs = inputs_of(kKind);
  const auto slots = [&](int i) {
    return staging + static_cast<int64_t>(i * kInputs * Part<kLanes>::template kCopies<T>) * blockDim.x + threadIdx.x;
  };
  const auto prefetch = [&](int64_t token) {
    if constexpr (kPrefetch) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        part.template copy_source<T, kKind>(p, token, min(own + i * stride, p.groups), slots(i));
      }
      ptx::cp_async_commit();
    }
  };
  const auto read_prefetched = [&](int i, Values& v) {
    if constexpr (kPrefetch) part.template read_source<T, kKind>(p, slots(i), v);
  };
  const int64_t first = static_cast<int64_t>(blockIdx.x / p.cluster) * kTokens;
  const int64_t token_stride = static_cast<int64_t>(gridDim.x / p.cluster) * kTokens;
  if (kPrefetch && p.prefetch) prefetch(first + lane / kLanes);
  int iteration = 0;
  for (int64_t tile = first; tile < p.m; tile += token_stride, ++iteration) {
    const int64_t token = tile + lane / kLanes;
    const bool valid = token < p.m;
    float squares = 0.0f;
    const auto count = [&](int64_t group, const Values& v) {
      if constexpr (kNorm) {
#pragma unroll
        for (const float value : v) squares += value * value;
        if (s.sum != nullptr) part.template save<T>(p, s.sum, s.ld_sum, token, group, v);
      }
    };
    const auto read = [&](int64_t group, Values& v) {
#pragma unroll
      for (float& value : v) value = 0.0f;
      if (!valid || group >= p.groups) return;
      part.template load_source<T, kKind>(p, token, group, v);
      count(group, v);
    };
    float norm = 1.0f;
    // From what was read, and perhaps stored in place, to what is quantized; this lane's largest of the group.
    using Weights = typename Part<kLanes>::template Stored<T>;
    const auto weights_of = [&](int64_t group) {
      return kNorm && group < p.groups ? part.template load_stored<T>(p, s.weight, 0, 0, group) : Weights{};
    };
    const auto finish = [&](const Weights& weights, Values& v) {
      if constexpr (kNorm) {
#pragma unroll
        for (int i = 0; i < Part<kLanes>::kValues; ++i) {
          v[i] = rounded<T>(rounded<T>(v[i] * norm) * weights.value(i));
        }
      }
      return part.rotate_and_max(p, v);
    };
    const auto read_again = [&](int64_t group, Values& v) {
      if (kNorm && s.sum != nullptr) {
        if (valid && group < p.groups) part.template load<T>(p, s.sum, s.ld_sum, token, group, v);
      } else {
        read(group, v);  // the squares are done with
      }
    };

    Values kept[kKept];
    if (kPrefetch && p.prefetch) {
      ptx::cp_async_wait<0>();
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        read_prefetched(i, kept[i]);
        if (valid && own + i * stride < p.groups) count(own + i * stride, kept[i]);
      }
      prefetch(token + token_stride);
    } else {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < rounds) read(own + i * stride, kept[i]);
      }
    }
    Weights kept_weights[kKept];  // asked for before they are needed
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept_weights[i] = weights_of(own + i * stride);
    if constexpr (kNorm) {
      for (int64_t round = kKept; round < rounds; ++round) {
        Values v;
        read(own + round * stride, v);
      }
      squares = reduce.sum(squares, for_norm, iteration);
      norm = rsqrtf(squares / static_cast<float>(p.k) + s.eps);
    }
    // Each group's values, ready to be quantized, and this lane's largest.
    const auto each = [&](const auto& use) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < rounds) use(own + i * stride, kept[i], finish(kept_weights[i], kept[i]));
      }
      for (int64_t round = kKept; round < rounds; ++round) {
        const int64_t group = own + round * stride;
        Values v = {};
        read_again(group, v);
        use(group, v, finish(weights_of(group), v));
      }
    };
    if (p.per_group) {
      each([&](int64_t group, const Values& v, int of_lane) {
        const int of_group = largest_of_lanes<kLanes>(of_lane);
        if (valid && group < p.groups) store_group(p, part, token, group, v, of_group);
      });
      continue;
    }
    int largest = 0;
    each([&](int64_t, const Values&, int of_lane) { largest = max(largest, of_lane); });
    largest = reduce.largest(largest, for_scale, iteration);
    const Scale scale = scale_of(largest, p.rotate, p.qmax);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int64_t group = own + i * stride;
      if (valid && group < p.groups) part.store_codes(p, token, group, kept[i], scale.inverse);
    }
    for (int64_t round = kKept; round < rounds; ++round) {
      const int64_t group = own + round * stride;
      Values v = {};
      read_again(group, v);
      finish(weights_of(group), v);
      if (valid && group < p.groups) part.store_codes(p, token, group, v, scale.inverse);
    }
    if (valid && own == 0 && part.lane == 0) p.scales[token] = scale.scale;
  }
}

}  // namespace flexq::cuda::quantize
