// What one instruction set offers: the two kernels of the CPU backend over a layout that all of them share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "core/format.h"
#include "flexq/flexq.h"

namespace flexq::cpu {

// Prepacked weights. A block is 16 rows; a chunk is 16 k of a block. Bytes B0, B1, B2 of a chunk (64 each) hold, for
// row r and i = 0..3 at byte 4 * r + i, code + 32 of k = 4 * j + i in the low 6 bits of Bj; the top bits of B0, B1 and
// B2 are bits 5-4, 3-2 and 1-0 of the one for j = 3. Two masks, shifts and ors give four vectors of bytes, each ready
// for a dot product of 4 k for 4, 8 or 16 rows at a time.
inline constexpr int kWeightBits = 6;
inline constexpr int kCodeOffset = code_offset(kWeightBits);
inline constexpr int kBlockRows = 16;
inline constexpr int kChunkK = 16;
inline constexpr int kChunks = kGroup / kChunkK;
inline constexpr int kChunkBytes = 3 * 4 * kBlockRows;
inline constexpr int kBlockGroupBytes = kChunks * kChunkBytes;
inline constexpr int kUnpackedBytes = kBlockRows * kGroup;
static_assert(kBlockGroupBytes == kBlockRows * group_bytes(kWeightBits), "prepacking neither adds nor loses bits");

struct PackedWeight {
  const uint8_t* blocks;   // [N / 16][G][kBlockGroupBytes]
  const uint16_t* scales;  // [N / 16][G or 1][16], fp16
};

// Quantized activations, group-major so that a block of tokens reads one stretch of memory.
struct Activation {
  int8_t* codes;     // [G][M][128]
  float* scales;     // [G][M], or [M] in scheme channel
  int32_t* offsets;  // [G][M], -32 * (sum of the group's codes): takes back the weights' offset
};

struct GemmArgs {
  flexq_weight_desc desc;
  PackedWeight weight;
  int64_t m;
  int32_t act_bits;
  Activation act;
  const void* bias;
  flexq_dtype bias_dtype;
  void* y;
  flexq_dtype y_dtype;
  int64_t ldy;
};

struct QuantizeArgs {
  flexq_activation_desc desc;
  ActivationSource source;
  Activation act;
};

struct Kernels {
  const char* isa;
  // Output rows [16 * block_begin, 16 * block_end) for tokens [token_begin, token_end).
  void (*gemm)(const GemmArgs& args, int64_t block_begin, int64_t block_end, int64_t token_begin, int64_t token_end);
  void (*quantize)(const QuantizeArgs& args, int64_t token_begin, int64_t token_end);
};

// The best kernels this machine runs, or those named by the environment variable FLEXQ_CPU_ISA.
const Kernels& kernels();

// One per instruction set; null where this build or architecture has none.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* neon_kernels();

}  // namespace flexq::cpu
