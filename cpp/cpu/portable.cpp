// Plain C++, for machines without a vector path of their own, and the one the others are tested against.
#include "cpu/gemm_kernel.h"
#include "cpu/kernels.h"
#include "cpu/quantize_kernel.h"

namespace flexq::cpu {
namespace {

struct Portable : ExactProducts {
  static constexpr int kVectors = 1;
  static constexpr int kTokens = 4;
  static constexpr int kPackedTokens = 0;
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

  struct Bytes {
    uint8_t lane[kQuadBytes];
  };
  template <typename F>
  static Bytes map_bytes(const F& f) {
    Bytes out;
    for (int i = 0; i < kQuadBytes; ++i) out.lane[i] = static_cast<uint8_t>(f(i));
    return out;
  }
  static Bytes load(const uint8_t* p) {
    return map_bytes([&](int i) { return p[i]; });
  }
  static void store(uint8_t* p, const Bytes& x) { std::memcpy(p, x.lane, sizeof x.lane); }
  static void prefetch(const uint8_t*) {}
  struct Token {
    int8_t code[kQuadK];
  };
  static Token broadcast(const int8_t* codes) { return {{codes[0], codes[1], codes[2], codes[3]}}; }

  template <int kBits>
  static Bytes low(const Bytes& x) {
    return map_bytes([&](int i) { return x.lane[i] & ((1 << kBits) - 1); });
  }
  template <int kFrom, int kTo, int kCount>
  static Bytes insert(const Bytes& quad, const Bytes& x) {
    return map_bytes([&](int i) {
      const int field = (x.lane[i] >> kFrom & ((1 << kCount) - 1)) << kTo;
      return kTo == 0 ? field : quad.lane[i] | field;
    });
  }

  template <int kBits, int kActBits>
  static Int multiply(const Int& sum, const Bytes* weights, const Token* token) {
    const int8_t* a = token->code;
    return map<Int>([&](int r) {
      const uint8_t* w = weights->lane + kQuadK * r;
      return sum.lane[r] + w[0] * a[0] + w[1] * a[1] + w[2] * a[2] + w[3] * a[3];
    });
  }
};

}  // namespace

const Kernels* portable_kernels() {
  static constexpr Kernels kernels{"portable", GemmKernel<Portable>::run, QuantizeKernel<PortableQuantizer>::run};
  return &kernels;
}

}  // namespace flexq::cpu
