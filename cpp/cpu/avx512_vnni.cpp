// AVX-512 VNNI: as AVX-VNNI, all 16 rows of a block at a time.
#include "cpu/kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "cpu/x86_vectors.h"

namespace flexq::cpu {
namespace {

struct Avx512Vnni : ExactProducts {
  static constexpr int kVectors = 1;
  static constexpr int kTokens = 8;
  static constexpr int kPackedTokens = 2;
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

  using Bytes = __m512i;
  using Token = Bytes;
  static Bytes load(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store(uint8_t* p, Bytes x) { _mm512_store_si512(p, x); }
  static void prefetch(const uint8_t* p) { Vectors256::prefetch(p); }
  static Token broadcast(const int8_t* codes) {
    int32_t word;
    std::memcpy(&word, codes, 4);
    return _mm512_set1_epi32(word);
  }

  template <int kBits>
  static Bytes low(Bytes x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1)));
  }
  template <int kFrom, int kTo, int kCount>
  static Bytes insert(Bytes quad, Bytes x) {
    constexpr int kMask = ((1 << kCount) - 1) << kTo;
    static_assert(kFrom >= kTo);
    const Bytes shifted = _mm512_srli_epi16(x, kFrom - kTo);
    const Bytes mask = _mm512_set1_epi8(static_cast<char>(kMask));
    constexpr int kOrAnd = 0xf8;  // quad | (shifted & mask)
    return kTo == 0 ? _mm512_and_si512(shifted, mask) : _mm512_ternarylogic_epi32(quad, shifted, mask, kOrAnd);
  }

  template <int kBits, int kActBits>
  static Int multiply(Int sum, const Bytes* w, const Token* a) {
    return _mm512_dpbusd_epi32(sum, *w, *a);
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
