// Epilogue: scales, bias and rounding, then stores to y through shared memory, a chunk of tokens at a time. Where a
// cluster splits K, the parts are first added through distributed shared memory in a fixed order.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/wgmma/cta.cuh"

namespace flexq::cuda::wgmma {

#if FLEXQ_SM90A

template <typename Cta>
struct Epilogue {
  using Sum = typename Cta::Sum;
  using Sums = Sum[Cta::kSums];
  static constexpr int kTokens = Cta::kTokens;
  static constexpr int kChunkTokens = Cta::kC.chunk_tokens(), kChunks = kTokens / kChunkTokens;
  static constexpr int kChunkSums = kChunkTokens / 2;
  static constexpr int kTokenScales = (kTokens + kWarpgroup - 1) / kWarpgroup;  // a thread's

  using TokenTile = typename Cta::TokenTile;

  // Scheme channel's, as this thread loads them: of tokens, and of its two rows.
  struct Scales {
    float tokens[kTokenScales];
    uint16_t rows[2];  // fp16
  };

  const Cta& cta;

  __device__ __forceinline__ void run(const TokenTile& tokens, const Tile& tile, const Scales& scales,
                                      const Sums& sums) const {
    const auto& linear = cta.linear(tokens, tile);
    const Rows rows = rows_of(linear, tile, scales);
    if (cta.p.splits > 1) return add_parts(linear, tile, rows, sums);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (Cta::kPartTiles && c > 0 && c * kChunkTokens / kTokenTile >= cta.token_tiles(tokens, tile)) break;
      Sum chunk[kChunkSums];
#pragma unroll
      for (int i = 0; i < kChunkSums; ++i) chunk[i] = sums[c * kChunkSums + i];
      store(linear, tile, rows, c, chunk);
    }
  }

  // Scheme channel's scales are loaded before the mainloop. Those of tokens are then shared by the warpgroup, where
  // scheme group has those of the stages.
  __device__ __forceinline__ void load_scales(const TokenTile& tokens, const Tile& tile, Scales& scales) const {
    const auto& linear = cta.linear(tokens, tile);
#pragma unroll
    for (int i = 0; i < kTokenScales; ++i) {
      const int64_t token =
          static_cast<int64_t>(tile.token_tile) * kTokenTile + i * kWarpgroup + threadIdx.x % kWarpgroup;
      scales.tokens[i] = token < linear.m ? __ldcg(linear.act_scales + token) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_of(tile, i);
      scales.rows[i] = row < linear.n ? linear.scales[row] : uint16_t{0};
    }
  }
  __device__ __forceinline__ void share_scales(const Scales& scales) const {
    static_assert(kConsumers * kTokens * 4 <= Cta::kStages * Cta::kC.scale_bytes(), "room for the tokens' scales");
    ptx::named_barrier(kWarpgroupBarrier + cta.warp / 4, kWarpgroup);  // the tile before has been stored
#pragma unroll
    for (int i = 0; i < kTokenScales; ++i) {
      const int token = i * kWarpgroup + static_cast<int>(threadIdx.x) % kWarpgroup;
      if (token < kTokens) shared_token_scales()[token] = scales.tokens[i];
    }
    ptx::named_barrier(kWarpgroupBarrier + cta.warp / 4, kWarpgroup);
  }

 private:
  __device__ float* shared_token_scales() const {
    return reinterpret_cast<float*>(cta.shared + Cta::kScalesAt) + cta.warp / 4 * kTokens;
  }

  // One of this lane's two rows.
  __device__ int64_t row_of(const Tile& tile, int i) const {
    return static_cast<int64_t>(tile.row_block + cta.block) * kRecordRows + cta.lane / 4 + 8 * i;
  }
  struct Rows {
    float scale[2], bias[2];
  };
  __device__ Rows rows_of(const LinearParams& linear, const Tile& tile, const Scales& scales) const {
    Rows rows{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.scale[i] = (Cta::kPerGroup ? 1.0f : __half2float(__ushort_as_half(scales.rows[i]))) * linear.unit;
      const int64_t row = row_of(tile, i);
      if (linear.bias != nullptr && row < linear.n) rows.bias[i] = load_float(linear.bias, linear.bias_dtype, row);
    }
    return rows;
  }

  // Each CTA of the cluster adds and stores every splits-th chunk.
  __device__ void add_parts(const LinearParams& linear, const Tile& tile, const Rows& rows, const Sums& sums) const {
    static_assert(Cta::kSums * kConsumerThreads * 4 <= Cta::kScalesAt, "sums overlay the stages");
    // Past this barrier nobody here reads the stages, and every copy to them has arrived.
    ptx::named_barrier(kConsumerBarrier, kConsumerThreads);
    auto* mine = reinterpret_cast<Sum*>(cta.shared) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < Cta::kSums; ++i) mine[i * kConsumerThreads] = sums[i];
    ptx::cluster_sync();  // the producers meet here too
    for (int c = cta.part; c < kChunks; c += cta.p.splits) {
      Sum chunk[kChunkSums] = {};
      for (int part = 0; part < cta.p.splits; ++part) {
#pragma unroll
        for (int i = 0; i < kChunkSums; ++i) {
          const uint32_t at = cta.base + ((c * kChunkSums + i) * kConsumerThreads + threadIdx.x) * 4;
          const uint32_t bits = ptx::load_remote(at, static_cast<uint32_t>(part * cta.p.multicast + cta.peer));
          if constexpr (Cta::kPerGroup) {
            chunk[i] += __uint_as_float(bits);
          } else {
            chunk[i] += static_cast<int32_t>(bits);
          }
        }
      }
      store(linear, tile, rows, c, chunk);
    }
  }

  // Transposes a warp's 16 rows of a chunk in shared memory, so that neighbouring rows of a token are stored together.
  __device__ __forceinline__ void store(const LinearParams& linear, const Tile& tile, const Rows& rows, int chunk,
                                        const Sum (&sums)[kChunkSums]) const {
    float values[kChunkSums];
#pragma unroll
    for (int j = 0; j < kChunkSums / 4; ++j) {
      float2 act{1, 1};
      if constexpr (!Cta::kPerGroup) {
        const int token = chunk * kChunkTokens + j * kTokenTile + cta.lane % 4 * 2;
        act = *reinterpret_cast<const float2*>(shared_token_scales() + token);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = rows.scale[i / 2] * (i % 2 == 0 ? act.x : act.y);
        values[4 * j + i] = static_cast<float>(sums[4 * j + i]) * scale + rows.bias[i / 2];
      }
    }
    uint8_t* staging = cta.shared + Cta::kStagingAt + cta.warp * kChunkTokens * kRecordRows * 4;
    __syncwarp();  // the chunk before has left
    if (cta.p.y_dtype == FLEXQ_F32) {
      stage_32_bits(values, reinterpret_cast<float*>(staging));
      __syncwarp();
      copy_out<float>(linear, tile, chunk, staging);
    } else {
      stage_16_bits(values, ptx::shared_address(staging));
      __syncwarp();
      copy_out<uint16_t>(linear, tile, chunk, staging);
    }
  }

  // Staged outputs are [tokens][16 rows]. Of 16 bits each, a token's two vectors of 8 rows are swapped in every other
  // four tokens: a swizzle that puts the vectors of eight tokens into different banks.
  static __device__ int swizzle(int token) { return token / 4 % 2; }

  __device__ __forceinline__ void stage_16_bits(const float (&values)[kChunkSums], uint32_t staging) const {
    const int token = cta.lane / 16 * kTokenTile + cta.lane % 8, vector = cta.lane / 8 % 2;  // this lane's address
    const uint32_t at = staging + token * kRecordRows * 2 + (vector ^ swizzle(token)) * 16;
#pragma unroll
    for (int j = 0; j < kChunkSums / 8; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = to_16_bits(values[8 * j + 2 * i], values[8 * j + 2 * i + 1], cta.p.y_dtype);
      }
      ptx::stmatrix_x4_trans(at + j * 2 * kTokenTile * kRecordRows * 2, words);
    }
  }

  __device__ __forceinline__ void stage_32_bits(const float (&values)[kChunkSums], float* staging) const {
#pragma unroll
    for (int i = 0; i < kChunkSums; ++i) {
      const int token = i / 4 * kTokenTile + cta.lane % 4 * 2 + i % 2;
      staging[token * kRecordRows + cta.lane / 4 + i % 4 / 2 * 8] = values[i];
    }
  }

  // A warp's staged outputs, elements T, to y.
  template <typename T>
  __device__ __forceinline__ void copy_out(const LinearParams& linear, const Tile& tile, int chunk,
                                           const uint8_t* staging) const {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kVectors = kRecordRows / kElements;  // of a token
    const int64_t token0 = static_cast<int64_t>(tile.token_tile) * kTokenTile + chunk * kChunkTokens;
    const int64_t row0 = static_cast<int64_t>(tile.row_block + cta.block) * kRecordRows;
    for (int i = cta.lane; i < kChunkTokens * kVectors; i += 32) {
      const int64_t token = token0 + i / kVectors;
      const int64_t row = row0 + i % kVectors * kElements;
      if (token >= linear.m || row >= linear.n) continue;
      const int at = sizeof(T) == 2 ? i ^ swizzle(i / kVectors) : i;
      const T* from = reinterpret_cast<const T*>(staging + at * 16);
      T* to = static_cast<T*>(linear.y) + token * linear.ldy + row;
      if (linear.y_vectors && row + kElements <= linear.n) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        const auto count = static_cast<int>(min(static_cast<int64_t>(kElements), linear.n - row));
#pragma unroll 1
        for (int e = 0; e < count; ++e) to[e] = from[e];
      }
    }
  }
};

#endif  // FLEXQ_SM90A

}  // namespace flexq::cuda::wgmma
