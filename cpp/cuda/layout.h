// Memory layouts of the CUDA backend, for host and device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/format.h"
#include "flexq/flexq.h"

namespace flexq::cuda {

// Prepacked weights are records of 16 rows x 128 k (records.cuh says what is in them), in tiles of 128 rows,
// [N / 128][G][8], the last tile with as many as there are: a tile's groups are contiguous, for bulk copies. Scales are
// fp16, 16 to a record. In scheme group they follow their 8 records (a separate stream of 64 bytes at a time would cost
// more than its share of bandwidth); in scheme channel, [N / 16], they follow the last tile and its gap.
inline constexpr int kRecordRows = 16;
inline constexpr int kRecordScaleBytes = kRecordRows * 2;
constexpr int record_bytes(int bits) { return kRecordRows * group_bytes(bits); }
// Products are of bytes that hold a code in their top bits.
constexpr int code_factor(int bits) { return 1 << (8 - bits); }

inline constexpr int kTileBlocks = 8;

inline int64_t num_row_blocks(const flexq_weight_desc& desc) { return ceil_div(desc.n, kRecordRows); }

// How many blocks of 16 rows the tile of this one has.
constexpr int64_t blocks_of_tile(int64_t block, int64_t row_blocks) {
  const int64_t left = row_blocks - block / kTileBlocks * kTileBlocks;
  return left < kTileBlocks ? left : kTileBlocks;
}

// Of a record and its part of the scales, if they are side by side.
constexpr int record_and_scale_bytes(int bits, bool per_group) {
  return record_bytes(bits) + (per_group ? kRecordScaleBytes : 0);
}

// Between tiles. A group of a tile is 10 KB with 5 bits, so that tiles would begin at multiples of 5 times a high power
// of two, probably in the same of an H100's five stacks of memory: up to 6% slower with few tokens. 2 to 5 KB help,
// with long rows; scales between groups do as well, and on an H100 other widths do not need it.
constexpr int64_t tile_gap_bytes(int64_t groups, int bits, bool per_group) {
  return bits == 5 && !per_group && groups >= 32 ? 5120 : 0;
}

// Where the records of a tile's group begin.
constexpr int64_t tile_offset(int64_t block, int64_t group, int64_t row_blocks, int64_t groups, int bits,
                              bool per_group) {
  const int64_t first = block / kTileBlocks * kTileBlocks;
  return (first * groups + group * blocks_of_tile(block, row_blocks)) * record_and_scale_bytes(bits, per_group) +
         first / kTileBlocks * tile_gap_bytes(groups, bits, per_group);
}
constexpr int64_t record_offset(int64_t block, int64_t group, int64_t row_blocks, int64_t groups, int bits,
                                bool per_group) {
  return tile_offset(block, group, row_blocks, groups, bits, per_group) + block % kTileBlocks * record_bytes(bits);
}
// Scheme group's.
constexpr int64_t scales_offset(int64_t block, int64_t group, int64_t row_blocks, int64_t groups, int bits) {
  return tile_offset(block, group, row_blocks, groups, bits, true) +
         blocks_of_tile(block, row_blocks) * record_bytes(bits) + block % kTileBlocks * kRecordScaleBytes;
}

struct WeightLayout {
  explicit WeightLayout(const flexq_weight_desc& desc) {
    const int64_t row_blocks = num_row_blocks(desc), groups = num_groups(desc.k);
    const bool per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
    const int64_t records = row_blocks * groups * record_and_scale_bytes(desc.weight_bits, per_group) +
                            ceil_div(row_blocks, kTileBlocks) * tile_gap_bytes(groups, desc.weight_bits, per_group);
    scales = static_cast<size_t>(records);
    size = align_up(static_cast<size_t>(records + (per_group ? 0 : row_blocks * kRecordScaleBytes)));
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
