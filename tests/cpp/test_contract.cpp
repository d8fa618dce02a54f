// The contract (docs/how-it-works/numerics.md): every path against a float64 reference from the same codes and scales.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "check.h"

namespace {

using test::half_to_float;
using test::random_values;

constexpr int kGroup = FLEXQ_GROUP_SIZE;
constexpr int32_t kWeightBits[] = {4, 5, 6, 8};

uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

struct Case {
  int64_t m, n, k;
  int32_t weight_bits;
  int32_t act_bits;
  flexq_scheme scheme;
  flexq_rotation rotation;
  bool bias;
};

struct Layer {
  Layer(const flexq::Stream& stream, const Case& c, std::mt19937& rng)
      : desc(c.n, c.k, c.scheme, c.rotation, c.weight_bits), weight(desc) {
    const std::vector<float> w = random_values(static_cast<size_t>(c.n * c.k), rng);
    weight = flexq::Weight::quantize(stream, desc, w.data());
    size_t bytes = 0;
    flexq::check(flexq_prepack_size(&stream, &desc, &bytes));
    packed.reserve(bytes);
    flexq::check(flexq_prepack(&stream, &desc, weight.planes().data(), weight.scales().data(), packed.data(), bytes));
  }
  std::vector<int8_t> codes(const flexq::Stream& stream) const {
    const int64_t kp = (desc.k + kGroup - 1) / kGroup * kGroup;
    std::vector<int8_t> out(static_cast<size_t>(desc.n * kp));
    flexq::check(flexq_unpack_codes(&stream, &desc, weight.planes().data(), out.data(), kp));
    return out;
  }
  flexq::WeightDesc desc;
  flexq::Weight weight;
  flexq::Buffer packed;
};

// Codes and scales of a quantized activation.
struct Activation {
  Activation(const flexq::Stream& stream, const Case& c, const float* x, int64_t ldx)
      : desc(c.m, c.k, c.act_bits, c.scheme, c.rotation) {
    size_t bytes = 0;
    flexq::check(flexq_activation_size(&stream, &desc, &bytes));
    quantized.reserve(bytes);
    flexq::check(flexq_quantize_activation(&stream, &desc, x, FLEXQ_F32, ldx, quantized.data(), bytes));
    const int64_t groups = (c.k + kGroup - 1) / kGroup;
    codes.resize(static_cast<size_t>(c.m * groups * kGroup));
    scales.resize(static_cast<size_t>(c.m * (c.scheme == FLEXQ_SCHEME_GROUP ? groups : 1)));
    flexq::check(
        flexq_activation_export(&stream, &desc, quantized.data(), quantized.size(), codes.data(), scales.data()));
  }
  flexq::ActivationDesc desc;
  flexq::Buffer quantized;
  std::vector<int8_t> codes;
  std::vector<float> scales;
};

// y in float64, and the size of what was added up to it, which rounding errors are relative to.
void reference(const Case& c, const std::vector<int8_t>& w, const std::vector<uint16_t>& w_scales, const Activation& a,
               const std::vector<float>& bias, std::vector<double>& y, std::vector<double>& magnitude) {
  const int64_t groups = (c.k + kGroup - 1) / kGroup;
  const bool grouped = c.scheme == FLEXQ_SCHEME_GROUP;
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0, size = 0;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t dot = 0;
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; ++k) {
          dot += int{a.codes[static_cast<size_t>(i * groups * kGroup + k)]} *
                 int{w[static_cast<size_t>(j * groups * kGroup + k)]};
        }
        const double a_scale = a.scales[static_cast<size_t>(grouped ? i * groups + g : i)];
        const double w_scale = half_to_float(w_scales[static_cast<size_t>(grouped ? j * groups + g : j)]);
        sum += static_cast<double>(dot) * a_scale * w_scale;
        size += std::abs(static_cast<double>(dot) * a_scale * w_scale);
      }
      const double b = c.bias ? bias[static_cast<size_t>(j)] : 0.0;
      y[static_cast<size_t>(i * c.n + j)] = sum + b;
      magnitude[static_cast<size_t>(i * c.n + j)] = size + std::abs(b);
    }
  }
}

void check_case(const flexq::Stream& stream, const Case& c, std::mt19937& rng) {
  const Layer layer(stream, c, rng);
  const int64_t ldx = c.k + 3, ldy = c.n + 5;
  const std::vector<float> x = random_values(static_cast<size_t>(std::max<int64_t>(c.m, 1) * ldx), rng);
  const std::vector<float> bias = random_values(static_cast<size_t>(c.n), rng);
  const Activation a(stream, c, x.data(), ldx);

  std::vector<double> expected(static_cast<size_t>(c.m * c.n)), magnitude(expected.size());
  reference(c, layer.codes(stream), layer.weight.scales(), a, bias, expected, magnitude);

  size_t bytes = 0;
  flexq::check(flexq_linear_workspace_size(&stream, &layer.desc, c.act_bits, c.m, &bytes));
  const flexq::Buffer workspace(bytes);
  const float untouched = 12345.0f;
  std::vector<float> y(static_cast<size_t>(c.m * ldy + 1), untouched);
  const float* b = c.bias ? bias.data() : nullptr;
  flexq::check(flexq_linear(&stream, &layer.desc, layer.packed.data(), layer.packed.size(), c.act_bits, c.m, x.data(),
                            FLEXQ_F32, ldx, b, FLEXQ_F32, y.data(), FLEXQ_F32, ldy, workspace.data(),
                            workspace.size()));
  std::vector<uint16_t> y16(y.size(), 0);
  flexq::check(flexq_gemm(&stream, &layer.desc, layer.packed.data(), layer.packed.size(), &a.desc, a.quantized.data(),
                          a.quantized.size(), b, FLEXQ_F32, y16.data(), FLEXQ_BF16, ldy, workspace.data(),
                          workspace.size()));
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < ldy; ++j) {
      const float got = y[static_cast<size_t>(i * ldy + j)];
      if (j >= c.n) {
        CHECK(got == untouched);
        continue;
      }
      const auto at = static_cast<size_t>(i * c.n + j);
      CHECK(std::abs(got - expected[at]) <= 1e-5 * magnitude[at]);
      // The rounded value or a neighbour: bf16 keeps 8 bits.
      const float rounded = from_bf16(y16[static_cast<size_t>(i * ldy + j)]);
      CHECK(std::abs(rounded - expected[at]) <= std::abs(expected[at]) / 128 + 1e-5 * magnitude[at]);
      CHECK(rounded == from_bf16(to_bf16(got)));
    }
  }

  // Prepacking loses nothing.
  flexq::Weight back(layer.desc);
  flexq::check(flexq_unprepack(&stream, &layer.desc, layer.packed.data(), layer.packed.size(), back.planes().data(),
                               back.scales().data()));
  CHECK(back.planes() == layer.weight.planes() && back.scales() == layer.weight.scales());
}

void test_shapes(const flexq::Stream& stream) {
  std::mt19937 rng(1);
  for (const int64_t k : {64, 100, 128, 576, 4097}) {
    for (const int64_t n : {1, 17, 48}) {
      for (const int64_t m : {0, 1, 2, 3, 7, 8, 9, 129}) {
        for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
          for (const int32_t bits : kWeightBits) {
            const int32_t act_bits = rng() % 2 ? 8 : 6;
            const auto rotation = rng() % 2 ? FLEXQ_ROTATION_HADAMARD128 : FLEXQ_ROTATION_NONE;
            check_case(stream, {m, n, k, bits, act_bits, scheme, rotation, rng() % 2 == 0}, rng);
          }
        }
      }
    }
  }
}

// Largest codes everywhere, and of either sign beside each other: sums in 16 or 32 bits must not saturate.
void test_extreme_codes(const flexq::Stream& stream) {
  constexpr int64_t kRows = 16, kK = 4096;
  std::mt19937 rng(5);
  for (const int32_t weight_bits : kWeightBits) {
    const int top = (1 << (weight_bits - 1)) - 1;
    for (const int32_t act_bits : {6, 8}) {
      const int qmax = act_bits == 6 ? 31 : 127;
      for (const int kind : {0, 1, 2}) {  // all the largest, all the smallest, any of the two
        for (const int64_t m : {1, 2, 9}) {
          const auto some = [&](int low, int high) { return kind == 2 ? (rng() % 2 ? high : low) : kind ? low : high; };
          const flexq::WeightDesc desc(kRows, kK, FLEXQ_SCHEME_CHANNEL, FLEXQ_ROTATION_NONE, weight_bits);
          flexq::Weight weight(desc);
          std::vector<int8_t> codes(kRows * kK);
          for (int8_t& code : codes) code = static_cast<int8_t>(some(-top - 1, top));
          flexq::check(flexq_pack_codes(&stream, &desc, codes.data(), kK, weight.planes().data()));
          std::fill(weight.scales().begin(), weight.scales().end(), uint16_t{0x3c00});  // 1.0
          flexq::Linear linear(stream, weight, act_bits);
          std::vector<float> x(static_cast<size_t>(m * kK)), y(static_cast<size_t>(m * kRows));  // codes, with scale 1
          for (float& value : x) value = static_cast<float>(kind == 2 && rng() % 2 ? -qmax : qmax);
          linear(stream, x.data(), m, y.data());
          for (int64_t t = 0; t < m; ++t) {
            for (int64_t row = 0; row < kRows; ++row) {
              double expected = 0;
              for (int64_t k = 0; k < kK; ++k) {
                expected += double{x[static_cast<size_t>(t * kK + k)]} * int{codes[static_cast<size_t>(row * kK + k)]};
              }
              CHECK(y[static_cast<size_t>(t * kRows + row)] == static_cast<float>(expected));
            }
          }
        }
      }
    }
  }
}

void test_not_finite(const flexq::Stream& stream) {
  std::mt19937 rng(2);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    for (const flexq_rotation rotation : {FLEXQ_ROTATION_NONE, FLEXQ_ROTATION_HADAMARD128}) {
      const flexq::WeightDesc desc(17, 300, scheme, rotation);
      const std::vector<float> w = random_values(17 * 300, rng);
      flexq::Linear linear(stream, flexq::Weight::quantize(stream, desc, w.data()));
      std::vector<float> x = random_values(5 * 300, rng);
      x[1 * 300 + 299] = std::numeric_limits<float>::quiet_NaN();
      x[3 * 300] = INFINITY;
      x[4 * 300 + 150] = 1e-42f;
      std::vector<float> y(5 * 17);
      linear(stream, x.data(), 5, y.data());
      for (size_t i = 0; i < y.size(); ++i) CHECK(std::isnan(y[i]) == (i / 17 == 1 || i / 17 == 3));
    }
  }
}

void test_zero_and_tiny(const flexq::Stream& stream) {
  const flexq::WeightDesc desc(3, 256);
  const std::vector<float> zeros(3 * 256, 0.0f);
  const flexq::Weight weight = flexq::Weight::quantize(stream, desc, zeros.data());
  CHECK(std::all_of(weight.planes().begin(), weight.planes().end(), [](uint8_t b) { return b == 0; }));
  CHECK(std::all_of(weight.scales().begin(), weight.scales().end(), [](uint16_t s) { return s == 0; }));
  flexq::Linear linear(stream, weight);
  std::vector<float> x(2 * 256, 1e-44f), y(2 * 3, 7.0f);
  linear(stream, x.data(), 2, y.data());
  for (const float v : y) CHECK(v == 0.0f);
}

// A scale that vanishes in fp16 is stored as zero with its codes, and counted; the rest of the weight is as it was.
void test_vanishing_scales(const flexq::Stream& stream) {
  std::mt19937 rng(6);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    for (const flexq_rotation rotation : {FLEXQ_ROTATION_NONE, FLEXQ_ROTATION_HADAMARD128}) {
      const int64_t n = 6, k = 300;
      const flexq::WeightDesc desc(n, k, scheme, rotation);
      std::vector<float> w = random_values(static_cast<size_t>(n * k), rng);
      int64_t vanished = -1;
      const flexq::Weight usual = flexq::Weight::quantize(stream, desc, w.data(), 0, &vanished);
      CHECK(vanished == 0);
      for (int64_t i = 0; i < k; ++i) w[static_cast<size_t>(2 * k + i)] = 1e-9f;                        // a row
      for (int64_t i = 128; i < 256; ++i) w[static_cast<size_t>(4 * k + i)] = i % 2 ? 1e-9f : -1e-42f;  // a group
      for (int64_t i = 0; i < k; ++i) w[static_cast<size_t>(5 * k + i)] = 0.0f;  // zeros are not counted
      const flexq::Weight weight = flexq::Weight::quantize(stream, desc, w.data(), 0, &vanished);
      CHECK(vanished == (scheme == FLEXQ_SCHEME_GROUP ? 3 + 1 : 1));
      std::vector<float> back(w.size());
      weight.dequantize(stream, back.data());
      for (size_t i = 0; i < static_cast<size_t>(k); ++i) CHECK(back[static_cast<size_t>(2 * k) + i] == 0.0f);
      for (size_t i = 128; i < 256; ++i) CHECK(std::abs(back[static_cast<size_t>(4 * k) + i]) < 1e-6f);
      CHECK(std::equal(usual.planes().begin(), usual.planes().begin() + 2 * 3 * 96, weight.planes().begin()));
    }
  }
  // The border: half of fp16's smallest value rounds to zero, anything above it does not.
  const flexq::WeightDesc desc(2, 128, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_NONE);
  std::vector<float> w(2 * 128, 0.0f);
  w[0] = 31 * 0x1p-25f;
  w[128] = 31 * 0x1.01p-25f;
  int64_t vanished = 0;
  const flexq::Weight weight = flexq::Weight::quantize(stream, desc, w.data(), 0, &vanished);
  CHECK(vanished == 1 && weight.scales()[0] == 0 && weight.scales()[1] == 1);
}

// Rounding to nearest against the stored scale, whichever share of absmax / the largest code it is, and the rotation
// undone.
void test_quantize_weight(const flexq::Stream& stream) {
  std::mt19937 rng(3);
  for (const int32_t bits : kWeightBits) {
    const int top = (1 << (bits - 1)) - 1;
    const double least_share = bits == 4 ? 0.55 : bits == 5 ? 0.7 : 0.85;
    for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
      for (const flexq_rotation rotation : {FLEXQ_ROTATION_NONE, FLEXQ_ROTATION_HADAMARD128}) {
        const int64_t n = 9, k = 333, groups = 3;
        const flexq::WeightDesc desc(n, k, scheme, rotation, bits);
        const std::vector<float> w = random_values(static_cast<size_t>(n * k), rng);
        const flexq::Weight weight = flexq::Weight::quantize(stream, desc, w.data());
        std::vector<float> back(w.size());
        weight.dequantize(stream, back.data());
        for (int64_t row = 0; row < n; ++row) {
          for (int64_t g = 0; g < groups; ++g) {
            const size_t at = static_cast<size_t>(scheme == FLEXQ_SCHEME_GROUP ? row * groups + g : row);
            const double step = half_to_float(weight.scales()[at]);
            double error = 0;
            for (int64_t i = g * kGroup; i < std::min(k, (g + 1) * kGroup); ++i) {
              const auto e = static_cast<size_t>(row * k + i);
              const double d = std::abs(static_cast<double>(w[e]) - back[e]);
              // The largest codes may be exceeded, by no more than the least share leaves.
              const double beyond = std::abs(w[e]) - (w[e] < 0 ? top + 1 : top) * step;
              if (rotation == FLEXQ_ROTATION_NONE) {
                CHECK(d <= std::max(0.5001 * step, beyond * 1.0001));
                CHECK(std::abs(w[e]) <= (top + 0.05) * step / least_share);
              }
              error += d * d;
            }
            const double largest_step = step / least_share;
            CHECK(error <= kGroup * 0.2501 * largest_step * largest_step);  // a rotation keeps the norm of the error
          }
        }
      }
    }
  }
}

// Every further bit halves the error, or nearly, since every width has its own best scale.
void test_error_by_width(const flexq::Stream& stream) {
  std::mt19937 rng(8);
  const int64_t n = 16, k = 1024;
  const std::vector<float> w = random_values(static_cast<size_t>(n * k), rng);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    double errors[9] = {};
    for (const int32_t bits : kWeightBits) {
      std::vector<float> back(w.size());
      flexq::Weight::quantize(stream, {n, k, scheme, FLEXQ_ROTATION_HADAMARD128, bits}, w.data())
          .dequantize(stream, back.data());
      for (size_t i = 0; i < w.size(); ++i) errors[bits] += std::pow(static_cast<double>(w[i]) - back[i], 2);
    }
    CHECK(errors[4] > 3 * errors[5] && errors[5] > 3 * errors[6] && errors[6] > 9 * errors[8]);
  }
}

// Planes as docs/reference/formats.md has them.
void test_planes(const flexq::Stream& stream) {
  for (const int32_t weight_bits : kWeightBits) {
    const auto bits = static_cast<size_t>(weight_bits);
    const flexq::WeightDesc desc(2, 256, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_NONE, weight_bits);
    std::vector<int8_t> codes(2 * 256), back(2 * 256);
    std::mt19937 rng(4);
    const int count = 1 << bits;
    for (int8_t& c : codes) c = static_cast<int8_t>(static_cast<int>(rng() % static_cast<unsigned>(count)) - count / 2);
    flexq::Weight weight(desc);
    CHECK(weight.planes().size() == 2 * 2 * bits * 16);
    flexq::check(flexq_pack_codes(&stream, &desc, codes.data(), 256, weight.planes().data()));
    for (size_t row = 0; row < 2; ++row) {
      for (size_t k = 0; k < 256; ++k) {
        for (size_t p = 0; p < bits; ++p) {
          const uint8_t byte = weight.planes()[((row * 2 + k / 128) * bits + p) * 16 + k % 128 / 8];
          CHECK((byte >> k % 8 & 1) == (codes[row * 256 + k] >> p & 1));
        }
      }
    }
    flexq::check(flexq_unpack_codes(&stream, &desc, weight.planes().data(), back.data(), 256));
    CHECK(back == codes);
    if (bits == 8) continue;  // every int8 is a code
    codes[300] = static_cast<int8_t>(count / 2);
    CHECK(flexq_pack_codes(&stream, &desc, codes.data(), 256, weight.planes().data()) == FLEXQ_BAD_VALUE);
    CHECK(std::strstr(flexq_last_error(), "codes[1][44] is ") != nullptr);
  }
}

#if defined(__SSE__) || defined(__aarch64__)
// The mode of -ffast-math's start-up code and torch.set_flush_denormal, in which subnormal floats are zeros.
class WithoutSubnormals {
 public:
  WithoutSubnormals() { set(before_ | kFlush); }
  ~WithoutSubnormals() { set(before_); }

 private:
#if defined(__SSE__)
  using Mode = unsigned;
  static constexpr Mode kFlush = 0x8040;
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#else
  using Mode = uint64_t;
  static constexpr Mode kFlush = 1 << 24;
  static Mode get() {
    Mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#endif
  Mode before_ = get();
};

void test_callers_without_subnormals(const flexq::Stream& stream) {
  std::mt19937 rng(6);
  for (const int32_t bits : kWeightBits) {
    const flexq::WeightDesc desc(17, 300, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_NONE, bits);
    std::vector<float> w(17 * 300), x = random_values(3 * 300, rng);
    for (float& v : w) v = static_cast<float>(rng() % 2001) * 2e-7f - 2e-4f;  // scales are subnormal in fp16
    const auto all = [&] {
      const flexq::Weight weight = flexq::Weight::quantize(stream, desc, w.data());
      std::vector<float> back(17 * 300), y(3 * 17);
      flexq::check(flexq_dequantize_weight(&stream, &desc, weight.planes().data(), weight.scales().data(), back.data(),
                                           FLEXQ_F32, 300));
      flexq::Linear(stream, weight)(stream, x.data(), 3, y.data());
      back.insert(back.end(), y.begin(), y.end());
      for (const uint16_t scale : weight.scales()) CHECK(scale > 0 && scale < 0x400);
      return back;
    };
    const std::vector<float> expected = all();
    const WithoutSubnormals mode;
    CHECK(all() == expected);
  }
}
#endif

}  // namespace

int main() {
  if (test::isa_is_missing()) return test::kSkipped;
  const flexq::ThreadPool pool(3);
  for (const flexq::Stream& stream : {flexq::Stream::cpu(), flexq::Stream::cpu(pool)}) {
    test_planes(stream);
    test_quantize_weight(stream);
    test_error_by_width(stream);
    test_zero_and_tiny(stream);
    test_vanishing_scales(stream);
#if defined(__SSE__) || defined(__aarch64__)
    test_callers_without_subnormals(stream);
#endif
    test_extreme_codes(stream);
    test_not_finite(stream);
    test_shapes(stream);
  }
  return 0;
}
