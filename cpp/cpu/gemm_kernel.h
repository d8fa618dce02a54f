// The GEMM that every instruction set shares, over a policy V:
//   V::kVectors       vectors of output rows in a block of 16
//   V::kTokens        tokens in a register tile
//   V::Int, V::Float  vectors of 16 / kVectors int32 or fp32
//   V::unpack         a block's group of packed codes -> bytes code + 32, [32 quads of k][16 rows][4]
//   V::dot<A, T>      adds the products of an unpacked group and T tokens to T x kVectors Int
#pragma once

#include <algorithm>
#include <cstring>

#include "core/float_types.h"
#include "cpu/kernels.h"

namespace flexq::cpu {

// Tokens that share one unpacking: enough to hide it, few enough for accumulators and activations to stay in L1.
inline constexpr int kTokenBlock = 64;

template <typename V>
struct GemmKernel {
  using Int = typename V::Int;
  using Float = typename V::Float;
  static constexpr int kLanes = kBlockRows / V::kVectors;

  struct Scratch {
    alignas(64) uint8_t weights[kUnpackedBytes];
    alignas(64) float sums[kTokenBlock * kBlockRows];      // scheme group, then the result of both
    alignas(64) int32_t totals[kTokenBlock * kBlockRows];  // scheme channel
  };

  template <int kActBits, int T>
  static void group_tile(const GemmArgs& args, Scratch& scratch, const Float* weight_scales, int64_t group,
                         int64_t token_begin, int64_t t) {
    const int64_t at = group * args.m + token_begin + t;
    Int dots[T][V::kVectors];
    for (int i = 0; i < T; ++i) {
      for (int v = 0; v < V::kVectors; ++v) dots[i][v] = V::set(args.act.offsets[at + i]);
    }
    V::template dot<kActBits, T>(scratch.weights, args.act.codes + at * kGroup, dots);
    if (args.desc.scheme == FLEXQ_SCHEME_GROUP) {
      for (int i = 0; i < T; ++i) {
        const Float scale = V::set(args.act.scales[at + i]);
        float* sums = scratch.sums + (t + i) * kBlockRows;
        for (int v = 0; v < V::kVectors; ++v) {
          const Float factor = V::mul(weight_scales[v], scale);
          V::store(sums + v * kLanes, V::fma(V::to_float(dots[i][v]), factor, V::load(sums + v * kLanes)));
        }
      }
    } else {
      for (int i = 0; i < T; ++i) {
        int32_t* totals = scratch.totals + (t + i) * kBlockRows;
        for (int v = 0; v < V::kVectors; ++v) {
          V::store(totals + v * kLanes, V::add(dots[i][v], V::load(totals + v * kLanes)));
        }
      }
    }
  }

  // Tokens [t, count) of the block, which are fewer than T + 1 register tiles' worth.
  template <int kActBits, int T>
  static void group_tail(const GemmArgs& args, Scratch& scratch, const Float* weight_scales, int64_t group,
                         int64_t token_begin, int64_t t, int64_t count) {
    if constexpr (T > 0) {
      if (count - t == T) {
        group_tile<kActBits, T>(args, scratch, weight_scales, group, token_begin, t);
      } else {
        group_tail<kActBits, T - 1>(args, scratch, weight_scales, group, token_begin, t, count);
      }
    }
  }

  template <int kActBits>
  static void block_tile(const GemmArgs& args, Scratch& scratch, int64_t block, int64_t token_begin, int64_t count) {
    const int64_t groups = num_groups(args.desc.k);
    const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
    const uint8_t* packed = args.weight.blocks + block * groups * kBlockGroupBytes;
    const uint16_t* scales = args.weight.scales + block * (per_group ? groups : 1) * kBlockRows;
    const size_t bytes = static_cast<size_t>(count) * kBlockRows * sizeof(float);
    std::memset(scratch.sums, 0, bytes);
    if (!per_group) std::memset(scratch.totals, 0, bytes);
    Float weight_scales[V::kVectors];
    V::load_scales(scales, weight_scales);
    for (int64_t g = 0; g < groups; ++g) {
      V::unpack(packed + g * kBlockGroupBytes, scratch.weights);
      if (per_group) V::load_scales(scales + g * kBlockRows, weight_scales);
      int64_t t = 0;
      for (; t + V::kTokens <= count; t += V::kTokens) {
        group_tile<kActBits, V::kTokens>(args, scratch, weight_scales, g, token_begin, t);
      }
      group_tail<kActBits, V::kTokens - 1>(args, scratch, weight_scales, g, token_begin, t, count);
    }
    if (per_group) return;
    for (int64_t t = 0; t < count; ++t) {
      const Float scale = V::set(args.act.scales[token_begin + t]);
      for (int v = 0; v < V::kVectors; ++v) {
        const int64_t at = t * kBlockRows + v * kLanes;
        const Float total = V::to_float(V::load(scratch.totals + at));
        V::store(scratch.sums + at, V::mul(total, V::mul(weight_scales[v], scale)));
      }
    }
  }

  static void store_tile(const GemmArgs& args, const Scratch& scratch, int64_t block, int64_t token_begin,
                         int64_t count) {
    const int64_t row_begin = block * kBlockRows;
    const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, args.desc.n - row_begin));
    float bias[kBlockRows] = {};
    if (args.bias != nullptr) {
      dispatch_dtype(args.bias_dtype, [&](auto type) {
        const auto* values = static_cast<const decltype(type)*>(args.bias) + row_begin;
        for (int r = 0; r < rows; ++r) bias[r] = to_float(values[r]);
      });
    }
    dispatch_dtype(args.y_dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t t = 0; t < count; ++t) {
        const float* sums = scratch.sums + t * kBlockRows;
        T* y = static_cast<T*>(args.y) + (token_begin + t) * args.ldy + row_begin;
        T rounded[kBlockRows];
        for (int r = 0; r < kBlockRows; ++r) rounded[r] = from_float<T>(sums[r] + bias[r]);
        std::memcpy(y, rounded, static_cast<size_t>(rows) * sizeof(T));
      }
    });
  }

  static void run(const GemmArgs& args, int64_t block_begin, int64_t block_end, int64_t token_begin,
                  int64_t token_end) {
    Scratch scratch;
    for (int64_t block = block_begin; block < block_end; ++block) {
      for (int64_t t = token_begin; t < token_end; t += kTokenBlock) {
        const int64_t count = std::min<int64_t>(kTokenBlock, token_end - t);
        if (args.act_bits == 6) {
          block_tile<6>(args, scratch, block, t, count);
        } else {
          block_tile<8>(args, scratch, block, t, count);
        }
        store_tile(args, scratch, block, t, count);
      }
    }
  }
};

}  // namespace flexq::cpu
