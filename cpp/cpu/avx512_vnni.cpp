// AVX-512 VNNI: as AVX-VNNI, all 16 rows of a block at a time.
#include "cpu/kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "cpu/x86_vectors.h"

namespace flexq::cpu {
namespace {

struct Avx512Vnni {
  static constexpr int kVectors = 1;
  static constexpr int kTokens = 8;
  using Int = __m512i;
  using Float = __m512;

  static Int set(int32_t x) { return _mm512_set1_epi32(x); }
  static Float set(float x) { return _mm512_set1_ps(x); }
  static Int load(const int32_t* p) { return _mm512_load_si512(p); }
  static Float load(const float* p) { return _mm512_load_ps(p); }
  static void store(int32_t* p, Int x) { _mm512_store_si512(p, x); }
  static void store(float* p, Float x) { _mm512_store_ps(p, x); }
  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static void load_scales(const uint16_t* scales, Float* out) {
    *out = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales)));
  }
  static void unpack(const uint8_t* packed, uint8_t* out) { Vectors256::unpack(packed, out); }

  template <int kActBits, int T>
  static void dot(const uint8_t* weights, const int8_t* codes, Int (&dots)[T][kVectors]) {
    for (int q = 0; q < kGroup / 4; ++q) {
      const Int w = _mm512_load_si512(weights + q * 4 * kBlockRows);
      for (int t = 0; t < T; ++t) {
        int32_t word;
        std::memcpy(&word, codes + t * kGroup + 4 * q, 4);
        dots[t][0] = _mm512_dpbusd_epi32(dots[t][0], w, _mm512_set1_epi32(word));
      }
    }
  }
};

}  // namespace

const Kernels* avx512_vnni_kernels() {
  static constexpr Kernels kernels{"avx512-vnni", GemmKernel<Avx512Vnni>::run, QuantizeKernel<X86Quantizer>::run};
  return &kernels;
}

}  // namespace flexq::cpu

#else

namespace flexq::cpu {
const Kernels* avx512_vnni_kernels() { return nullptr; }
}  // namespace flexq::cpu

#endif
