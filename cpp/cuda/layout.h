// Memory layouts of the CUDA backend, for host and device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/format.h"
#include "flexq/flexq.h"

namespace flexq::cuda {

// Prepacked weights are records of 16 rows x 128 k. Three vectors of 16 bytes for each of 32 lanes, vector-major, so
// that a warp reads whole lines. Word s (0..3) of vector j (0..2) of lane (g = lane / 4, t = lane % 4) is Bj of k step
// s, and the four words of an A fragment of 8-bit MMAs (m16n8k32, and a warp's part of wgmma's m64nNk32) are
//   a0 = B0 & 0xfcfcfcfc, a1 = B1 & 0xfcfcfcfc, a2 = B2 & 0xfcfcfcfc,
//   a3 = bits 7-6 of its bytes from B0's low two bits, 5-4 from B1's, 3-2 from B2's.
// Bytes are 4 * code, signed, of rows g (a0, a2) and g + 8 (a1, a3) and k = 32 * s + 4 * t + i (a0, a1) or 16 more
// (a2, a3), i = 0..3. Nine instructions unpack 16 codes; bit planes would take twenty-four (docs: kernels/format.md).
// Records lie in tiles of 128 rows, [N / 128][G][8], the last tile with as many as there are: a tile's groups are
// contiguous, for bulk copies. Scales are fp16, 16 to a record. In scheme group they follow their 8 records (a separate
// stream of 64 bytes at a time would cost more than its share of bandwidth); in scheme channel, [N / 16], they follow
// the last record.
inline constexpr int kWeightBits = 6;  // the width these kernels have
inline constexpr int kPlanes = kWeightBits;
inline constexpr int kGroupBytes = group_bytes(kWeightBits);
inline constexpr int kRecordRows = 16;
inline constexpr int kRecordBytes = kRecordRows * kGroupBytes;
inline constexpr int kRecordScaleBytes = kRecordRows * 2;
inline constexpr int kCodeFactor = 4;  // bytes are code * 4, because a code sits in a byte's top six bits

inline constexpr int kTileBlocks = 8;

inline int64_t num_row_blocks(const flexq_weight_desc& desc) { return ceil_div(desc.n, kRecordRows); }

// How many blocks of 16 rows the tile of this one has.
constexpr int64_t blocks_of_tile(int64_t block, int64_t row_blocks) {
  const int64_t left = row_blocks - block / kTileBlocks * kTileBlocks;
  return left < kTileBlocks ? left : kTileBlocks;
}

// Of a record and its part of the scales, if they are side by side.
constexpr int record_and_scale_bytes(bool per_group) { return kRecordBytes + (per_group ? kRecordScaleBytes : 0); }

// Where the records of a tile's group begin.
constexpr int64_t tile_offset(int64_t block, int64_t group, int64_t row_blocks, int64_t groups, bool per_group) {
  const int64_t first = block / kTileBlocks * kTileBlocks;
  return (first * groups + group * blocks_of_tile(block, row_blocks)) * record_and_scale_bytes(per_group);
}
constexpr int64_t record_offset(int64_t block, int64_t group, int64_t row_blocks, int64_t groups, bool per_group) {
  return tile_offset(block, group, row_blocks, groups, per_group) + block % kTileBlocks * kRecordBytes;
}
// Scheme group's.
constexpr int64_t scales_offset(int64_t block, int64_t group, int64_t row_blocks, int64_t groups) {
  return tile_offset(block, group, row_blocks, groups, true) + blocks_of_tile(block, row_blocks) * kRecordBytes +
         block % kTileBlocks * kRecordScaleBytes;
}

struct WeightLayout {
  explicit WeightLayout(const flexq_weight_desc& desc) {
    const auto row_blocks = static_cast<size_t>(num_row_blocks(desc));
    const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
    scales =
        row_blocks * static_cast<size_t>(num_groups(desc.k)) * static_cast<size_t>(record_and_scale_bytes(per_group));
    size = align_up(scales + (per_group ? 0 : row_blocks * kRecordScaleBytes));
  }
  size_t scales;  // offset of scheme channel's
  size_t size;
};

// Quantized activations: [G][M / 8] tiles of 8 tokens x 128 k, 1 KB each, so that a group's tokens are contiguous, for
// bulk copies. A tile is [8 chunks][8 tokens][16 codes]: the core matrices of wgmma's K-major layout
// without swizzle, and eight-by-sixteen-byte matrices for ldmatrix. Tokens that pad the last tile are not written.
// Scales fp32: [G][M / 8][8] (group) or [M] (channel).
inline constexpr int kTokenTile = 8;
inline constexpr int kChunkBytes = 16;
inline constexpr int kCoreMatrixBytes = kTokenTile * kChunkBytes;
inline constexpr int kTileGroupBytes = kTokenTile * kGroup;

// Where chunk k / 16 of a tile's token is in it.
constexpr int chunk_offset(int token, int chunk) { return chunk * kCoreMatrixBytes + token * kChunkBytes; }

struct ActivationLayout {
  explicit ActivationLayout(const flexq_activation_desc& desc) : tiles(ceil_div(desc.m, kTokenTile)) {
    const auto tile_groups = static_cast<size_t>(tiles) * static_cast<size_t>(num_groups(desc.k));
    scales = tile_groups * kTileGroupBytes;
    const size_t count = desc.scheme == FLEXQ_SCHEME_GROUP ? tile_groups * kTokenTile : static_cast<size_t>(desc.m);
    size = scales + align_up(count * sizeof(float));
  }
  int64_t tiles;
  size_t scales;  // offset
  size_t size;
};

}  // namespace flexq::cuda
