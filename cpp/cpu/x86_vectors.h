// What the x86 instruction sets share: 256-bit vectors of 8 rows, and activation quantization with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "cpu/gemm_kernel.h"
#include "cpu/kernels.h"
#include "cpu/quantize_kernel.h"

namespace flexq::cpu {
namespace {  // each instruction set compiles its own copy with its own flags

struct Vectors256 {
  static constexpr int kVectors = 2;
  static constexpr int kTokens = 4;
  static constexpr int kPackedTokens = 1;
  using Int = __m256i;
  using Float = __m256;

  static Int set(int32_t x) { return _mm256_set1_epi32(x); }
  static Float set(float x) { return _mm256_set1_ps(x); }
  static Int load(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static Float load(const float* p) { return _mm256_load_ps(p); }
  static void store(int32_t* p, Int x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
  static void store(float* p, Float x) { _mm256_store_ps(p, x); }
  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static void load_scales(const uint16_t* scales, Float* out) {
    const auto* halves = reinterpret_cast<const __m128i*>(scales);
    out[0] = _mm256_cvtph_ps(_mm_load_si128(halves));
    out[1] = _mm256_cvtph_ps(_mm_load_si128(halves + 1));
  }

  using Bytes = __m256i;
  using Token = Bytes;
  static Bytes load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint8_t* p, Bytes x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  template <int kBits>
  static Bytes low(Bytes x) {
    return _mm256_and_si256(x, _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1)));
  }
  template <int kFrom, int kTo, int kCount>
  static Bytes insert(Bytes quad, Bytes x) {
    constexpr int kMask = ((1 << kCount) - 1) << kTo;
    static_assert(kFrom >= kTo);
    const Bytes shifted = _mm256_srli_epi16(x, kFrom - kTo);
    const Bytes field = _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(kMask)));
    return kTo == 0 ? field : _mm256_or_si256(quad, field);
  }

  // Four codes of one token, for all 8 rows.
  static Token broadcast(const int8_t* codes) {
    int32_t word;
    std::memcpy(&word, codes, 4);
    return _mm256_set1_epi32(word);
  }
};

struct X86Quantizer {
  static __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
  static __m256 load8(const Half* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
  static __m256 load8(const BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  // a + b in the lanes where `flip` is +0, b - a (a being the lane's own value) where it is -0.
  static __m256 butterfly(__m256 own, __m256 other, __m256 flip) {
    return _mm256_add_ps(other, _mm256_xor_ps(own, flip));
  }

  static void hadamard(__m256* v) {
    for (int stride = 8; stride > 0; stride /= 2) {  // 64, 32, 16, 8 in units of a vector
      for (int base = 0; base < 16; base += 2 * stride) {
        for (int i = base; i < base + stride; ++i) {
          const __m256 a = v[i];
          const __m256 b = v[i + stride];
          v[i] = _mm256_add_ps(a, b);
          v[i + stride] = _mm256_sub_ps(a, b);
        }
      }
    }
    const __m256 flip4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    const __m256 flip2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 flip1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    for (int i = 0; i < 16; ++i) {
      v[i] = butterfly(v[i], _mm256_permute2f128_ps(v[i], v[i], 1), flip4);
      v[i] = butterfly(v[i], _mm256_permute_ps(v[i], _MM_SHUFFLE(1, 0, 3, 2)), flip2);
      v[i] = butterfly(v[i], _mm256_permute_ps(v[i], _MM_SHUFFLE(2, 3, 0, 1)), flip1);
    }
  }

  template <typename T>
  static int32_t load(const T* x, int count, bool rotate, float* values) {
    T padded[kGroup];
    if (count < kGroup) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(T));
      x = padded;
    }
    __m256 v[16];
    for (int i = 0; i < 16; ++i) v[i] = load8(x + 8 * i);
    if (rotate) hadamard(v);
    // Floats without their sign order like integers, NaN above all.
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < 16; ++i) {
      _mm256_store_ps(values + 8 * i, v[i]);
      largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(m);
  }

  static int32_t encode(const float* values, float inverse, int qmax, int8_t* codes) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256i high = _mm256_set1_epi32(qmax);
    const __m256i low = _mm256_set1_epi32(-qmax);
    // packs works within 128-bit halves; this puts its groups of four bytes back in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < kGroup; i += 32) {
      __m256i q[4];
      for (int j = 0; j < 4; ++j) {
        q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + i + 8 * j), factor));
        q[j] = _mm256_max_epi32(_mm256_min_epi32(q[j], high), low);
        sum = _mm256_add_epi32(sum, q[j]);
      }
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(s);
  }
};

}  // namespace
}  // namespace flexq::cpu
