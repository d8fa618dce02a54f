// AVX2: products of unsigned weights (0..63) and signed codes by maddubs, which adds pairs in 16 bits.
#include "cpu/kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/x86_vectors.h"

namespace flexq::cpu {
namespace {

struct Avx2 : Vectors256 {
  static Int quad(const uint8_t* weights, int q, int v) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + q * 4 * kBlockRows) + v);
  }

  // Two maddubs results, 4 * 63 * 127 at most, fit in 16 bits; they share one widening to 32. A6 could add eight, but
  // the accumulators that this takes spill, and cost more than it saves.
  template <int kActBits, int T>
  static void dot(const uint8_t* weights, const int8_t* codes, Int (&dots)[T][kVectors]) {
    static_assert(4 * 63 * 127 <= 32767);
    const Int ones = _mm256_set1_epi16(1);
    for (int q = 0; q < kGroup / 4; q += 2) {
      const Int w[2][kVectors] = {{quad(weights, q, 0), quad(weights, q, 1)},
                                  {quad(weights, q + 1, 0), quad(weights, q + 1, 1)}};
      for (int t = 0; t < T; ++t) {
        const Int a0 = broadcast(codes + t * kGroup + 4 * q);
        const Int a1 = broadcast(codes + t * kGroup + 4 * q + 4);
        for (int v = 0; v < kVectors; ++v) {
          const Int sum = _mm256_add_epi16(_mm256_maddubs_epi16(w[0][v], a0), _mm256_maddubs_epi16(w[1][v], a1));
          dots[t][v] = add(dots[t][v], _mm256_madd_epi16(sum, ones));
        }
      }
    }
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels{"avx2", GemmKernel<Avx2>::run, QuantizeKernel<X86Quantizer>::run};
  return &kernels;
}

}  // namespace flexq::cpu

#else

namespace flexq::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace flexq::cpu

#endif
