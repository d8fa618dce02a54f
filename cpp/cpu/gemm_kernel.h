// The GEMM that every instruction set shares, over a policy V:
//   V::kVectors             vectors of output rows in a block of 16
//   V::kTokens              tokens in a register tile
//   V::kPackedTokens        as many at most multiply weights straight from their packed form
//   V::Int, V::Float        vectors of 16 / kVectors int32 or fp32
//   V::Bytes                vectors of 64 / kVectors bytes, a quad of as many rows
//   V::Token                four codes of a token, for as many rows
//   V::insert               moves a field of cpu/packing.h; may change the bits above it
//   V::kQuads               quads that are multiplied together
//   V::kSigned<bits, act>   whether multiply takes codes + 2^(bits-1) and gives the products of the codes
//   V::kActBitsMatter<bits> whether multiply depends on act_bits
//   V::multiply<bits, act>  adds the products of kQuads quads of weights and of a token
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/float_types.h"
#include "cpu/kernels.h"

namespace flexq::cpu {

// Tokens that share one unpacking: enough to hide it, few enough for accumulators and activations to stay in L1.
inline constexpr int kTokenBlock = 64;
inline constexpr int kPrefetchBytes = 6144;

// Of a policy that multiplies one quad at a time, unsigned weights of any width by signed codes, and overflows nowhere.
struct ExactProducts {
  static constexpr int kQuads = 1;
  template <int kBits, int kActBits>
  static constexpr bool kSigned = false;
  template <int kBits>
  static constexpr bool kActBitsMatter = false;
};

template <typename V>
struct GemmKernel {
  using Int = typename V::Int;
  using Float = typename V::Float;
  using Bytes = typename V::Bytes;
  using Token = typename V::Token;
  static constexpr int kLanes = kBlockRows / V::kVectors;

  static constexpr int kPartBytes = kQuadBytes / V::kVectors;

  struct Scratch {
    alignas(64) uint8_t weights[kGroupQuads * kQuadBytes];
    alignas(64) float sums[kTokenBlock * kBlockRows];      // scheme group, then the result of both
    alignas(64) int32_t totals[kTokenBlock * kBlockRows];  // scheme channel
  };

  // Part `v` of a chunk's quads, as codes + 2^(bits-1).
  template <int kBits>
  static FLEXQ_INLINE void unpack_chunk(const uint8_t* chunk, int v, Bytes* quads) {
    static constexpr Packing packing = packing_of(kBits);
    Bytes vectors[packing.vectors];
    for (int j = 0; j < packing.vectors; ++j) {
      vectors[j] = V::load(chunk + j * kQuadBytes + v * kPartBytes);
      quads[j] = V::template low<kBits>(vectors[j]);
    }
    [&]<size_t... i>(std::index_sequence<i...>) {
      ((quads[packing.fields[i].quad] =
            V::template insert<packing.fields[i].from, packing.fields[i].to, packing.fields[i].count>(
                quads[packing.fields[i].quad], vectors[packing.fields[i].vector])),
       ...);
    }(std::make_index_sequence<packing.num_fields>());
  }

  template <int kBits>
  static void unpack(const uint8_t* packed, uint8_t* out) {
    constexpr Packing packing = packing_of(kBits);
    for (int q = 0; q < kGroupQuads; q += packing.quads) {
      for (int v = 0; v < V::kVectors; ++v) {
        Bytes quads[packing.quads];
        unpack_chunk<kBits>(packed, v, quads);
        for (int j = 0; j < packing.quads; ++j) V::store(out + (q + j) * kQuadBytes + v * kPartBytes, quads[j]);
      }
      packed += packing.vectors * kQuadBytes;
    }
  }

  // A token's codes of kQuads quads, for all rows.
  static FLEXQ_INLINE void load_token(const int8_t* codes, Token* out) {
    for (int j = 0; j < V::kQuads; ++j) out[j] = V::broadcast(codes + j * kQuadK);
  }

  // Adds the products of an unpacked group and T tokens.
  template <int kBits, int kActBits, int T>
  static FLEXQ_INLINE void dot(const uint8_t* weights, const int8_t* codes, Int (&dots)[T][V::kVectors]) {
    for (int q = 0; q < kGroupQuads; q += V::kQuads) {
      Bytes w[V::kVectors][V::kQuads];
      for (int v = 0; v < V::kVectors; ++v) {
        for (int j = 0; j < V::kQuads; ++j) w[v][j] = V::load(weights + (q + j) * kQuadBytes + v * kPartBytes);
      }
      for (int t = 0; t < T; ++t) {
        Token a[V::kQuads];
        load_token(codes + t * kGroup + q * kQuadK, a);
        for (int v = 0; v < V::kVectors; ++v) {
          dots[t][v] = V::template multiply<kBits, kActBits>(dots[t][v], w[v], a);
        }
      }
    }
  }

  // The same of a packed group, where unpacked weights would be read only once.
  template <int kBits, int kActBits, int T>
  static FLEXQ_INLINE void dot_packed(const uint8_t* packed, const int8_t* codes, Int (&dots)[T][V::kVectors]) {
    constexpr Packing packing = packing_of(kBits);
    static_assert(packing.quads % V::kQuads == 0);
    for (int q = 0; q < kGroupQuads; q += packing.quads, packed += packing.vectors * kQuadBytes) {
      for (int v = 0; v < V::kVectors; ++v) {
        Bytes w[packing.quads];
        unpack_chunk<kBits>(packed, v, w);
        for (int j = 0; j < packing.quads; j += V::kQuads) {
          for (int t = 0; t < T; ++t) {
            Token a[V::kQuads];
            load_token(codes + t * kGroup + (q + j) * kQuadK, a);
            dots[t][v] = V::template multiply<kBits, kActBits>(dots[t][v], w + j, a);
          }
        }
      }
    }
  }

  template <int kBits, int kActBits, int T, bool kPacked>
  static FLEXQ_INLINE void group_tile(const GemmArgs& args, Scratch& scratch, const uint8_t* weights,
                                      const Float* weight_scales, int64_t group, int64_t token_begin, int64_t t) {
    constexpr int32_t kOffset = V::template kSigned<kBits, kActBits> ? 0 : code_offset(kBits);
    const int64_t at = group * args.m + token_begin + t;
    const int8_t* codes = args.act.codes + at * kGroup;
    Int dots[T][V::kVectors];
    for (int i = 0; i < T; ++i) {
      for (int v = 0; v < V::kVectors; ++v) dots[i][v] = V::set(-kOffset * args.act.sums[at + i]);
    }
    if constexpr (kPacked) {
      dot_packed<kBits, kActBits>(weights, codes, dots);
    } else {
      dot<kBits, kActBits>(weights, codes, dots);
    }
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

  // Not inlined: compilers keep a tile's sums in registers where nothing else asks for any.
  template <int kBits, int kActBits, int T>
  static __attribute__((noinline)) void unpacked_tile(const GemmArgs& args, Scratch& scratch, const uint8_t* weights,
                                                      const Float* weight_scales, int64_t group, int64_t token_begin,
                                                      int64_t t) {
    group_tile<kBits, kActBits, T, false>(args, scratch, weights, weight_scales, group, token_begin, t);
  }

  // Tokens [t, count) of the block, which are at most T.
  template <int kBits, int kActBits, int T, bool kPacked>
  static void group_tail(const GemmArgs& args, Scratch& scratch, const uint8_t* weights, const Float* weight_scales,
                         int64_t group, int64_t token_begin, int64_t t, int64_t count) {
    if constexpr (T > 0) {
      if (count - t == T) {
        if constexpr (kPacked) {
          group_tile<kBits, kActBits, T, true>(args, scratch, weights, weight_scales, group, token_begin, t);
        } else {
          unpacked_tile<kBits, kActBits, T>(args, scratch, weights, weight_scales, group, token_begin, t);
        }
      } else {
        group_tail<kBits, kActBits, T - 1, kPacked>(args, scratch, weights, weight_scales, group, token_begin, t,
                                                    count);
      }
    }
  }

  template <int kBits, int kActBits>
  static void block_tile(const GemmArgs& args, Scratch& scratch, int64_t block, int64_t token_begin, int64_t count) {
    constexpr int kGroupBytes = block_group_bytes(kBits);
    const int64_t groups = num_groups(args.desc.k);
    const bool per_group = args.desc.scheme == FLEXQ_SCHEME_GROUP;
    const uint8_t* packed = args.weight.blocks + block * groups * kGroupBytes;
    const uint16_t* scales = args.weight.scales + block * (per_group ? groups : 1) * kBlockRows;
    const size_t bytes = static_cast<size_t>(count) * kBlockRows * sizeof(float);
    std::memset(scratch.sums, 0, bytes);
    if (!per_group) std::memset(scratch.totals, 0, bytes);
    Float weight_scales[V::kVectors];
    V::load_scales(scales, weight_scales);
    for (int64_t g = 0; g < groups; ++g, packed += kGroupBytes) {
      // Weights stream from memory once: ask for them before they are needed.
      for (int line = 0; line < kGroupBytes; line += 64) V::prefetch(packed + kPrefetchBytes + line);
      if (per_group) V::load_scales(scales + g * kBlockRows, weight_scales);
      const uint8_t* weights = packed;
      if constexpr (kBits < 8) {
        if (count <= V::kPackedTokens) {
          group_tail<kBits, kActBits, V::kPackedTokens, true>(args, scratch, packed, weight_scales, g, token_begin, 0,
                                                              count);
          continue;
        }
        unpack<kBits>(packed, scratch.weights);
        weights = scratch.weights;
      }
      int64_t t = 0;
      for (; t + V::kTokens <= count; t += V::kTokens) {
        unpacked_tile<kBits, kActBits, V::kTokens>(args, scratch, weights, weight_scales, g, token_begin, t);
      }
      group_tail<kBits, kActBits, V::kTokens - 1, false>(args, scratch, weights, weight_scales, g, token_begin, t,
                                                         count);
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
        if (rows == kBlockRows) {
          std::memcpy(y, rounded, sizeof rounded);  // no call for a size that is known
        } else {
          std::memcpy(y, rounded, static_cast<size_t>(rows) * sizeof(T));
        }
      }
    });
  }

  template <int kBits, int kActBits>
  static void run_blocks(const GemmArgs& args, int64_t block_begin, int64_t block_end, int64_t token_begin,
                         int64_t token_end) {
    Scratch scratch;
    for (int64_t block = block_begin; block < block_end; ++block) {
      for (int64_t t = token_begin; t < token_end; t += kTokenBlock) {
        const int64_t count = std::min<int64_t>(kTokenBlock, token_end - t);
        block_tile<kBits, kActBits>(args, scratch, block, t, count);
        store_tile(args, scratch, block, t, count);
      }
    }
  }

  static void run(const GemmArgs& args, int64_t block_begin, int64_t block_end, int64_t token_begin,
                  int64_t token_end) {
    dispatch_weight_bits(args.desc.weight_bits, [&](auto bits) {
      if constexpr (V::template kActBitsMatter<bits>) {
        if (args.act_bits == 6) return run_blocks<bits, 6>(args, block_begin, block_end, token_begin, token_end);
      }
      return run_blocks<bits, 8>(args, block_begin, block_end, token_begin, token_end);
    });
  }
};

}  // namespace flexq::cpu
