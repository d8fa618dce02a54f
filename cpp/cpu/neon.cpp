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
  static constexpr int kPackedTokens = 1;
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

  using Bytes = uint8x16_t;
  using Token = Bytes;
  static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  static void store(uint8_t* p, Bytes x) { vst1q_u8(p, x); }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
  static Token broadcast(const int8_t* codes) {
    uint32_t word;
    std::memcpy(&word, codes, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
  }

  template <int kBits>
  static Bytes low(Bytes x) {
    return vandq_u8(x, vdupq_n_u8((1 << kBits) - 1));
  }
  // Shift left and insert: what a field leaves above it, the next one takes the place of, and the last one's top is the
  // vector's.
  template <int kFrom, int kTo, int kCount>
  static Bytes insert(Bytes quad, Bytes x) {
    const Bytes field = vshrq_n_u8(x, kFrom);
    if constexpr (kTo == 0) {
      return field;
    } else {
      return vsliq_n_u8(quad, field, kTo);
    }
  }

  // Both factors are signed: weights of less than 8 bits are that with their offset, those of 8 bits without it.
  static constexpr int kQuads = 1;
  template <int kBits, int kActBits>
  static constexpr bool kSigned = kBits == 8;
  template <int kBits>
  static constexpr bool kActBitsMatter = false;

  template <int kBits, int kActBits>
  static Int multiply(Int sum, const Bytes* w, const Token* a) {
    const Bytes code = kBits == 8 ? veorq_u8(*w, vdupq_n_u8(0x80)) : *w;
    return vdotq_s32(sum, vreinterpretq_s8_u8(code), vreinterpretq_s8_u8(*a));
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
