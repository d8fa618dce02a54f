// What one instruction set offers: the two kernels of the CPU backend over a layout that all of them share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.h"
#include "core/format.h"
#include "cpu/packing.h"
#include "flexq/flexq.h"

namespace flexq::cpu {

struct PackedWeight {
  const uint8_t* blocks;   // [N / 16][G][block_group_bytes], as cpu/packing.h has it
  const uint16_t* scales;  // [N / 16][G or 1][16], fp16
};

// Quantized activations, group-major so that a block of tokens reads one stretch of memory.
struct Activation {
  int8_t* codes;  // [G][M][128]
  float* scales;  // [G][M], or [M] in scheme channel
  int32_t* sums;  // [G][M], of the group's codes: by these the weights' offset is taken back
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
// Throws FLEXQ_UNAVAILABLE where it names none that run here.
void require_wanted_isa();

// One per instruction set; null where this build or architecture has none.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* neon_kernels();

}  // namespace flexq::cpu
