// AVX-VNNI: four products of bytes added into 32 bits by one instruction, 8 rows at a time.
#include "cpu/kernels.h"

#if defined(__AVXVNNI__)
#include "cpu/x86_vectors.h"

namespace flexq::cpu {
namespace {

struct AvxVnni : Vectors256 {
  template <int kActBits, int T>
  static void dot(const uint8_t* weights, const int8_t* codes, Int (&dots)[T][kVectors]) {
    for (int q = 0; q < kGroup / 4; ++q) {
      const auto* w = reinterpret_cast<const __m256i*>(weights + q * 4 * kBlockRows);
      for (int t = 0; t < T; ++t) {
        const Int a = broadcast(codes + t * kGroup + 4 * q);
        for (int v = 0; v < kVectors; ++v) dots[t][v] = _mm256_dpbusd_avx_epi32(dots[t][v], w[v], a);
      }
    }
  }
};

}  // namespace

const Kernels* avx_vnni_kernels() {
  static constexpr Kernels kernels{"avx-vnni", GemmKernel<AvxVnni>::run, QuantizeKernel<X86Quantizer>::run};
  return &kernels;
}

}  // namespace flexq::cpu

#else

namespace flexq::cpu {
const Kernels* avx_vnni_kernels() { return nullptr; }
}  // namespace flexq::cpu

#endif
