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
  return static_cast<size_t>(num_blocks(desc) * num_groups(desc.k)) *
         static_cast<size_t>(block_group_bytes(desc.weight_bits));
}

// Calls f(b, row, k) for each row of each chunk of a block's group and i = 0..3: the chunk's vectors have row's i-th
// bytes at b and at every 64 after it, and they hold the codes of k and of every 4 after it.
template <typename Bytes, typename F>
void for_chunk_bytes(const Packing& packing, Bytes* bytes, const F& f) {
  for (int k = 0; k < kGroup; k += packing.quads * kQuadK, bytes += packing.vectors * kQuadBytes) {
    for (int row = 0; row < kBlockRows; ++row) {
      for (int i = 0; i < kQuadK; ++i) f(bytes + kQuadK * row + i, row, k + i);
    }
  }
}

template <int kBits>
void pack_block(const int8_t (&codes)[kBlockRows][kGroup], uint8_t* out) {
  static constexpr Packing packing = packing_of(kBits);
  for_chunk_bytes(packing, out, [&](uint8_t* bytes, int row, int k) {
    const auto biased = [&](int quad) {
      return static_cast<unsigned>(codes[row][k + kQuadK * quad] + code_offset(kBits));
    };
    unsigned vectors[8];
    for (int v = 0; v < packing.vectors; ++v) vectors[v] = biased(v);
    for (int i = 0; i < packing.num_fields; ++i) {
      const auto& [quad, vector, from, to, count] = packing.fields[i];
      vectors[vector] |= (biased(quad) >> to & ((1u << count) - 1)) << from;
    }
    for (int v = 0; v < packing.vectors; ++v) bytes[v * kQuadBytes] = static_cast<uint8_t>(vectors[v]);
  });
}

template <int kBits>
void unpack_block(const uint8_t* in, int8_t (&codes)[kBlockRows][kGroup]) {
  static constexpr Packing packing = packing_of(kBits);
  for_chunk_bytes(packing, in, [&](const uint8_t* bytes, int row, int k) {
    unsigned quads[8] = {};
    for (int v = 0; v < packing.vectors; ++v) quads[v] = bytes[v * kQuadBytes] & ((1u << kBits) - 1);
    for (int i = 0; i < packing.num_fields; ++i) {
      const auto& [quad, vector, from, to, count] = packing.fields[i];
      quads[quad] |= (static_cast<unsigned>(bytes[vector * kQuadBytes]) >> from & ((1u << count) - 1)) << to;
    }
    for (int q = 0; q < packing.quads; ++q) {
      codes[row][k + kQuadK * q] = static_cast<int8_t>(static_cast<int>(quads[q]) - code_offset(kBits));
    }
  });
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
  const int bits = desc.weight_bits;
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
          unpack_group(bits, planes + ((block * kBlockRows + row) * groups + g) * group_bytes(bits), codes[row]);
        }
        dispatch_weight_bits(bits,
                             [&](auto b) { pack_block<b>(codes, out + (block * groups + g) * block_group_bytes(b)); });
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
  const int bits = desc.weight_bits;
  const PackedWeight packed = packed_weight(desc, prepacked);
  const int64_t blocks = num_blocks(desc);
  parallel_ranges(executor, blocks, balanced_grain(executor, blocks), [&](int64_t begin, int64_t end) {
    int8_t codes[kBlockRows][kGroup];
    for (int64_t block = begin; block < end; ++block) {
      const int rows = static_cast<int>(std::min<int64_t>(kBlockRows, desc.n - block * kBlockRows));
      for (int64_t g = 0; g < groups; ++g) {
        dispatch_weight_bits(
            bits, [&](auto b) { unpack_block<b>(packed.blocks + (block * groups + g) * block_group_bytes(b), codes); });
        for (int row = 0; row < rows; ++row) {
          pack_group(bits, codes[row], planes + ((block * kBlockRows + row) * groups + g) * group_bytes(bits));
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
