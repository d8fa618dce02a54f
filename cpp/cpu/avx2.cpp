// AVX2: products of unsigned and signed bytes by maddubs, which adds pairs in 16 bits.
#include "cpu/kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "cpu/x86_vectors.h"

namespace flexq::cpu {
namespace {

struct Avx2 : Vectors256 {
  static constexpr int kQuads = 2;
  // Pairs of products of 8-bit codes overflow 16 bits where the weights are unsigned, but not where activations are.
  template <int kBits, int kActBits>
  static constexpr bool kSigned = kBits == 8 && kActBits == 8;
  template <int kBits>
  static constexpr bool kActBitsMatter = kBits == 8;

  template <int kBits, int kActBits>
  static Int multiply(Int sum, const Bytes* w, const Token* a) {
    const Int ones = _mm256_set1_epi16(1);
    if constexpr (kSigned<kBits, kActBits>) {
      // |w| <= 128 is unsigned and takes its sign to the activation: a pair is 2 * 128 * 127 at most.
      static_assert(2 * 128 * 127 <= 32767);
      for (int j = 0; j < kQuads; ++j) {
        const Bytes code = _mm256_xor_si256(w[j], _mm256_set1_epi8(static_cast<char>(0x80)));
        const Int pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(a[j], code));
        sum = add(sum, _mm256_madd_epi16(pairs, ones));
      }
      return sum;
    } else {
      // Two results of maddubs fit in 16 bits and share one widening to 32. A6 could add eight, but the accumulators
      // that this takes spill, and cost more than it saves.
      static_assert(4 * ((1 << kBits) - 1) * (kActBits == 6 ? 31 : 127) <= 32767);
      const Int pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], a[0]), _mm256_maddubs_epi16(w[1], a[1]));
      return add(sum, _mm256_madd_epi16(pairs, ones));
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
