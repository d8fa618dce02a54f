#include "cpu/prepack.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "core/executor.h"
#include "core/float_types.h"

namespace flexq::cpu {
namespace {

int64_t num_blocks(const flexq_weight_desc& desc) { return ceil_div(desc.n, kBlockRows); }

size_t blocks_bytes(const flexq_weight_desc& desc) {
  return static_cast<size_t>(num_blocks(desc) * num_groups(desc.k)) * kBlockGroupBytes;
}

// Where the byte of (row, k) in a block's group sits among its chunk's four vectors of 64.
int byte_in_quad(int row, int k) { return 4 * row + k % 4; }

void pack_block(const int8_t (&codes)[kBlockRows][kGroup], uint8_t* out) {
  for (int c = 0; c < kChunks; ++c, out += kChunkBytes) {
    for (int row = 0; row < kBlockRows; ++row) {
      for (int i = 0; i < 4; ++i) {
        const int8_t* k = codes[row] + c * kChunkK + i;
        const auto biased = [&](int quad) { return static_cast<unsigned>(k[4 * quad] + kCodeOffset); };
        uint8_t* at = out + byte_in_quad(row, i);
        at[0] = static_cast<uint8_t>(biased(0) | (biased(3) & 0x30) << 2);
        at[64] = static_cast<uint8_t>(biased(1) | (biased(3) & 0x0c) << 4);
        at[128] = static_cast<uint8_t>(biased(2) | (biased(3) & 0x03) << 6);
      }
    }
  }
}

void unpack_block(const uint8_t* in, int8_t (&codes)[kBlockRows][kGroup]) {
  for (int c = 0; c < kChunks; ++c, in += kChunkBytes) {
    for (int row = 0; row < kBlockRows; ++row) {
      for (int i = 0; i < 4; ++i) {
        const uint8_t* at = in + byte_in_quad(row, i);
        int8_t* k = codes[row] + c * kChunkK + i;
        for (int quad = 0; quad < 3; ++quad) k[4 * quad] = static_cast<int8_t>((at[64 * quad] & 0x3f) - kCodeOffset);
        const int last = at[0] >> 6 << 4 | at[64] >> 6 << 2 | at[128] >> 6;
        k[12] = static_cast<int8_t>(last - kCodeOffset);
      }
    }
  }
}

// -0.0 counts as 0.
bool scale_ok(uint16_t bits) {
  constexpr uint16_t kInf = 0x7c00, kMinusZero = 0x8000;
  return bits < kInf || bits == kMinusZero;
}

}  // namespace

void check_scales(const flexq_weight_desc& desc, const uint16_t* scales, const std::string& where) {
  const int64_t row_scales = scales_per_row(desc), count = desc.n * row_scales;
  const int64_t bad = std::find_if_not(scales, scales + count, scale_ok) - scales;
  if (bad == count) return;
  fail(FLEXQ_BAD_VALUE, "the scale of ", where, "row ", bad / row_scales,
       desc.scheme == FLEXQ_SCHEME_GROUP ? cat(", group ", bad % row_scales) : std::string(), " is ",
       to_float(Half{scales[bad]}), "; scales must be finite and 0 or more");
}

size_t prepack_size(const flexq_weight_desc& desc) {
  if (desc.weight_bits != kWeightBits) {
    fail(FLEXQ_UNSUPPORTED, "the CPU backend has weight_bits ", kWeightBits, ", got ", desc.weight_bits);
  }
  const size_t scales = static_cast<size_t>(num_blocks(desc) * scales_per_row(desc)) * kBlockRows * sizeof(uint16_t);
  return blocks_bytes(desc) + align_up(scales);
}

PackedWeight packed_weight(const flexq_weight_desc& desc, const void* prepacked) {
  const auto* bytes = static_cast<const uint8_t*>(prepacked);
  return {bytes, reinterpret_cast<const uint16_t*>(bytes + blocks_bytes(desc))};
}

void prepack(const flexq_executor* executor, const flexq_weight_desc& desc, const uint8_t* planes,
             const uint16_t* scales, void* prepacked) {
  check_scales(desc, scales, "");
  const int64_t groups = num_groups(desc.k);
  const int64_t row_scales = scales_per_row(desc);
  auto* out = static_cast<uint8_t*>(prepacked);
  auto* out_scales = reinterpret_cast<uint16_t*>(out + blocks_bytes(desc));
  const int64_t blocks = num_blocks(desc);
  parallel_ranges(executor, blocks, balanced_grain(executor, blocks), [&](int64_t begin, int64_t end) {
    int8_t codes[kBlockRows][kGroup];
    for (int64_t block = begin; block < end; ++block) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, desc.n - block * kBlockRows));
      std::memset(codes, 0, sizeof codes);
      for (int64_t g = 0; g < groups; ++g) {
        for (int row = 0; row < rows; ++row) {
          unpack_group(kWeightBits, planes + ((block * kBlockRows + row) * groups + g) * group_bytes(kWeightBits),
                       codes[row]);
        }
        pack_block(codes, out + (block * groups + g) * kBlockGroupBytes);
      }
      for (int64_t g = 0; g < row_scales; ++g) {
        for (int row = 0; row < kBlockRows; ++row) {
          out_scales[(block * row_scales + g) * kBlockRows + row] =
              row < rows ? scales[(block * kBlockRows + row) * row_scales + g] : uint16_t{0};
        }
      }
    }
  });
}

void unprepack(const flexq_executor* executor, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales) {
  const int64_t groups = num_groups(desc.k);
  const int64_t row_scales = scales_per_row(desc);
  const PackedWeight packed = packed_weight(desc, prepacked);
  const int64_t blocks = num_blocks(desc);
  parallel_ranges(executor, blocks, balanced_grain(executor, blocks), [&](int64_t begin, int64_t end) {
    int8_t codes[kBlockRows][kGroup];
    for (int64_t block = begin; block < end; ++block) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, desc.n - block * kBlockRows));
      for (int64_t g = 0; g < groups; ++g) {
        unpack_block(packed.blocks + (block * groups + g) * kBlockGroupBytes, codes);
        for (int row = 0; row < rows; ++row) {
          pack_group(kWeightBits, codes[row],
                     planes + ((block * kBlockRows + row) * groups + g) * group_bytes(kWeightBits));
        }
      }
      for (int64_t g = 0; g < row_scales; ++g) {
        for (int row = 0; row < rows; ++row) {
          scales[(block * kBlockRows + row) * row_scales + g] =
              packed.scales[(block * row_scales + g) * kBlockRows + row];
        }
      }
    }
  });
}

}  // namespace flexq::cpu
