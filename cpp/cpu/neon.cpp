// Arm NEON with the dot-product extension: four products of bytes added into 32 bits, 4 rows at a time.
#include "cpu/kernels.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include "cpu/gemm_kernel.h"
#include "cpu/quantize_kernel.h"

namespace flexq::cpu {
namespace {

struct Neon {
  static constexpr int kVectors = 4;
  static constexpr int kTokens = 4;
  using Int = int32x4_t;
  using Float = float32x4_t;

  static Int set(int32_t x) { return vdupq_n_s32(x); }
  static Float set(float x) { return vdupq_n_f32(x); }
  static Int load(const int32_t* p) { return vld1q_s32(p); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static void store(int32_t* p, Int x) { vst1q_s32(p, x); }
  static void store(float* p, Float x) { vst1q_f32(p, x); }
  static Int add(Int a, Int b) { return vaddq_s32(a, b); }
  static Float to_float(Int x) { return vcvtq_f32_s32(x); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static void load_scales(const uint16_t* scales, Float* out) {
    for (int v = 0; v < kVectors; ++v) out[v] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales + 4 * v)));
  }

  static void unpack(const uint8_t* packed, uint8_t* out) {
    const uint8x16_t low = vdupq_n_u8(0x3f);
    for (int c = 0; c < kChunks; ++c, packed += kChunkBytes, out += 4 * 64) {
      for (int v = 0; v < 64; v += 16) {
        const uint8x16_t b0 = vld1q_u8(packed + v);
        const uint8x16_t b1 = vld1q_u8(packed + 64 + v);
        const uint8x16_t b2 = vld1q_u8(packed + 128 + v);
        vst1q_u8(out + v, vandq_u8(b0, low));
        vst1q_u8(out + 64 + v, vandq_u8(b1, low));
        vst1q_u8(out + 128 + v, vandq_u8(b2, low));
        // Shift right and insert: bits 5-4 from b0, 3-2 from b1, 1-0 from b2.
        const uint8x16_t top = vsriq_n_u8(vsriq_n_u8(b0, b1, 2), b2, 4);
        vst1q_u8(out + 192 + v, vshrq_n_u8(top, 2));
      }
    }
  }

  template <int kActBits, int T>
  static void dot(const uint8_t* weights, const int8_t* codes, Int (&dots)[T][kVectors]) {
    for (int q = 0; q < kGroup / 4; ++q) {
      const auto* w = reinterpret_cast<const int8_t*>(weights + q * 4 * kBlockRows);  // 0..63: signed or not
      for (int t = 0; t < T; ++t) {
        int32_t word;
        std::memcpy(&word, codes + t * kGroup + 4 * q, 4);
        const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(word));
        for (int v = 0; v < kVectors; ++v) dots[t][v] = vdotq_s32(dots[t][v], vld1q_s8(w + 16 * v), a);
      }
    }
  }
};

}  // namespace

const Kernels* neon_kernels() {
  static constexpr Kernels kernels{"neon-dotprod", GemmKernel<Neon>::run, QuantizeKernel<PortableQuantizer>::run};
  return &kernels;
}

}  // namespace flexq::cpu

#else

namespace flexq::cpu {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace flexq::cpu

#endif
