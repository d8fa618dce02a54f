// Plain C++, for machines without a vector path of their own, and the one the others are tested against.
#include "cpu/gemm_kernel.h"
#include "cpu/kernels.h"
#include "cpu/quantize_kernel.h"

namespace flexq::cpu {
namespace {

struct Portable {
  static constexpr int kVectors = 1;
  static constexpr int kTokens = 4;
  struct Int {
    int32_t lane[kBlockRows];
  };
  struct Float {
    float lane[kBlockRows];
  };

  template <typename Out, typename F>
  static Out map(const F& f) {
    Out out;
    for (int r = 0; r < kBlockRows; ++r) out.lane[r] = f(r);
    return out;
  }
  static Int set(int32_t x) {
    return map<Int>([&](int) { return x; });
  }
  static Float set(float x) {
    return map<Float>([&](int) { return x; });
  }
  static Int load(const int32_t* p) {
    return map<Int>([&](int r) { return p[r]; });
  }
  static Float load(const float* p) {
    return map<Float>([&](int r) { return p[r]; });
  }
  static void store(int32_t* p, const Int& x) { std::memcpy(p, x.lane, sizeof x.lane); }
  static void store(float* p, const Float& x) { std::memcpy(p, x.lane, sizeof x.lane); }
  static Int add(const Int& a, const Int& b) {
    return map<Int>([&](int r) { return a.lane[r] + b.lane[r]; });
  }
  static Float to_float(const Int& x) {
    return map<Float>([&](int r) { return static_cast<float>(x.lane[r]); });
  }
  static Float mul(const Float& a, const Float& b) {
    return map<Float>([&](int r) { return a.lane[r] * b.lane[r]; });
  }
  static Float fma(const Float& a, const Float& b, const Float& c) {
    return map<Float>([&](int r) { return a.lane[r] * b.lane[r] + c.lane[r]; });
  }
  static void load_scales(const uint16_t* scales, Float* out) {
    *out = map<Float>([&](int r) { return flexq::to_float(Half{scales[r]}); });
  }

  static void unpack(const uint8_t* packed, uint8_t* out) {
    constexpr int kQuadBytes = 4 * kBlockRows;
    for (int c = 0; c < kChunks; ++c, packed += kChunkBytes, out += 4 * kQuadBytes) {
      for (int i = 0; i < kQuadBytes; ++i) {
        const unsigned b0 = packed[i];
        const unsigned b1 = packed[i + kQuadBytes];
        const unsigned b2 = packed[i + 2 * kQuadBytes];
        out[i] = static_cast<uint8_t>(b0 & 0x3f);
        out[i + kQuadBytes] = static_cast<uint8_t>(b1 & 0x3f);
        out[i + 2 * kQuadBytes] = static_cast<uint8_t>(b2 & 0x3f);
        out[i + 3 * kQuadBytes] = static_cast<uint8_t>((b0 & 0xc0) >> 2 | (b1 & 0xc0) >> 4 | (b2 & 0xc0) >> 6);
      }
    }
  }

  template <int kActBits, int T>
  static void dot(const uint8_t* weights, const int8_t* codes, Int (&dots)[T][kVectors]) {
    for (int k = 0; k < kGroup; k += 4, weights += 4 * kBlockRows) {
      for (int t = 0; t < T; ++t) {
        const int8_t* a = codes + t * kGroup + k;
        for (int r = 0; r < kBlockRows; ++r) {
          const uint8_t* w = weights + 4 * r;
          dots[t][0].lane[r] += w[0] * a[0] + w[1] * a[1] + w[2] * a[2] + w[3] * a[3];
        }
      }
    }
  }
};

}  // namespace

const Kernels* portable_kernels() {
  static constexpr Kernels kernels{"portable", GemmKernel<Portable>::run, QuantizeKernel<PortableQuantizer>::run};
  return &kernels;
}

}  // namespace flexq::cpu
