// AVX-VNNI: four products of bytes added into 32 bits by one instruction, 8 rows at a time.
#include "cpu/kernels.h"

#if defined(__AVXVNNI__)
#include "cpu/x86_vectors.h"

namespace flexq::cpu {
namespace {

struct AvxVnni : Vectors256, ExactProducts {
  template <int kBits, int kActBits>
  static Int multiply(Int sum, const Bytes* w, const Token* a) {
    return _mm256_dpbusd_avx_epi32(sum, *w, *a);
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
