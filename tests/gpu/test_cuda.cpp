// The CUDA backend against the CPU's codes and a float64 reference. Exits with 77 (skipped) where there is no GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "device.h"
#include "occupy.h"

namespace {

using test::as_bytes;
using test::cuda_check;
using test::DeviceArray;
using test::Gpu;
using test::half_to_float;
using test::value_at;

constexpr int kGroup = FLEXQ_GROUP_SIZE;

struct Case {
  int64_t m, n, k;
  int32_t weight_bits, act_bits;
  flexq_scheme scheme;
  flexq_rotation rotation;
  bool bias;
  flexq_dtype dtype;  // of x and y
  int64_t pad;        // of rows of x and y
};

// What outputs should be, from codes and scales in float64, for some of the tokens.
class Reference {
 public:
  Reference(const Case& c, const std::vector<int8_t>& codes, const std::vector<float>& act_scales,
            const std::vector<int8_t>& w, const std::vector<uint16_t>& w_scales, const std::vector<float>& bias)
      : case_(c) {
    const int64_t groups = (c.k + kGroup - 1) / kGroup, kp = groups * kGroup;
    const bool grouped = c.scheme == FLEXQ_SCHEME_GROUP;
    const int64_t stride = std::max<int64_t>(1, c.m / 40);
    for (int64_t i = 0; i<c.m; i += c.m - i> stride && i + 2 * stride > c.m ? c.m - 1 - i : stride) {
      tokens_.push_back(i);
      for (int64_t j = 0; j < c.n; ++j) {
        double sum = c.bias ? bias[static_cast<size_t>(j)] : 0.0, size = std::abs(sum);
        for (int64_t g = 0; g < groups; ++g) {
          int dot = 0;
          const int8_t* a = codes.data() + i * kp + g * kGroup;
          const int8_t* b = w.data() + j * kp + g * kGroup;
          for (int k = 0; k < kGroup; ++k) dot += a[k] * b[k];
          const double term = dot * static_cast<double>(act_scales[static_cast<size_t>(grouped ? i * groups + g : i)]) *
                              half_to_float(w_scales[static_cast<size_t>(grouped ? j * groups + g : j)]);
          sum += term;
          size += std::abs(term);
        }
        sums_.push_back(sum);
        sizes_.push_back(size);
      }
    }
  }

  bool holds(const std::vector<uint8_t>& y, int64_t ldy) const {
    const Case& c = case_;
    for (size_t t = 0; t < tokens_.size(); ++t) {
      for (int64_t j = 0; j < c.n; ++j) {
        const size_t at = t * static_cast<size_t>(c.n) + static_cast<size_t>(j);
        const double sum = sums_[at];
        const float value = value_at(y, static_cast<size_t>(tokens_[t] * ldy + j), c.dtype);
        const double ulp = c.dtype == FLEXQ_F32 ? 0 : c.dtype == FLEXQ_F16 ? std::abs(sum) / 1024 : std::abs(sum) / 128;
        if (!(std::abs(value - sum) <= 1e-5 * sizes_[at] + ulp)) {
          std::fprintf(stderr, "token %lld, feature %lld: got %.9g, not %.9g\n", static_cast<long long>(tokens_[t]),
                       static_cast<long long>(j), value, sum);
          return false;
        }
      }
    }
    // Nothing is written between rows.
    const size_t element = c.dtype == FLEXQ_F32 ? 4 : 2;
    for (int64_t i = 0; i < c.m; ++i) {
      for (size_t byte = static_cast<size_t>(i * ldy + c.n) * element;
           byte < static_cast<size_t>((i + 1) * ldy) * element; ++byte) {
        if (y[byte] != 0x5a) return false;
      }
    }
    return true;
  }

 private:
  Case case_;
  std::vector<int64_t> tokens_;
  std::vector<double> sums_, sizes_;
};

std::vector<flexq_kernel_info> kernels_for(const flexq_stream& stream, const flexq_weight_desc& desc, int32_t act_bits,
                                           int64_t m) {
  int32_t count = 0;
  flexq::check(flexq_gemm_kernels(&stream, &desc, act_bits, m, nullptr, 0, &count));
  std::vector<flexq_kernel_info> kernels(static_cast<size_t>(count), FLEXQ_KERNEL_INFO_INIT);
  flexq::check(flexq_gemm_kernels(&stream, &desc, act_bits, m, kernels.data(), count, &count));
  return kernels;
}

// `others`: how many kernels beside the chosen one to try, spread over all that could run it.
void check_case(const Gpu& gpu, const Case& c, std::mt19937& rng, size_t others) {
  const flexq::WeightDesc desc(c.n, c.k, c.scheme, c.rotation, c.weight_bits);
  const flexq::Weight weight =
      flexq::Weight::quantize(gpu.cpu, desc, test::random_values(static_cast<size_t>(c.n * c.k), rng).data());
  const DeviceArray<uint8_t> planes(weight.planes());
  const DeviceArray<uint16_t> scales(weight.scales());
  size_t bytes = 0;
  flexq::check(flexq_prepack_size(&gpu.cuda, &desc, &bytes));
  const DeviceArray<uint8_t> packed(bytes);
  flexq::check(flexq_prepack(&gpu.cuda, &desc, planes.data(), scales.data(), packed.data(), bytes));
  const DeviceArray<uint8_t> planes_back(planes.size());
  const DeviceArray<uint16_t> scales_back(scales.size());
  flexq::check(flexq_unprepack(&gpu.cuda, &desc, packed.data(), bytes, planes_back.data(), scales_back.data()));
  CHECK(planes_back.host() == weight.planes() && scales_back.host() == weight.scales());

  // Codes and scales of the activations: the CPU's bits.
  const flexq::ActivationDesc act(c.m, c.k, c.act_bits, c.scheme, c.rotation);
  const int64_t ldx = c.k + c.pad, ldy = c.n + c.pad;
  const std::vector<uint8_t> x =
      as_bytes(test::random_values(static_cast<size_t>(std::max<int64_t>(c.m, 1) * ldx), rng), c.dtype);
  const int64_t groups = (c.k + kGroup - 1) / kGroup, kp = groups * kGroup;
  const bool grouped = c.scheme == FLEXQ_SCHEME_GROUP;
  std::vector<int8_t> codes(static_cast<size_t>(c.m * kp));
  std::vector<float> act_scales(static_cast<size_t>(c.m * (grouped ? groups : 1)));
  flexq::check(flexq_activation_size(&gpu.cpu, &act, &bytes));
  const flexq::Buffer host_act(bytes);
  flexq::check(flexq_quantize_activation(&gpu.cpu, &act, x.data(), c.dtype, ldx, host_act.data(), bytes));
  flexq::check(flexq_activation_export(&gpu.cpu, &act, host_act.data(), bytes, codes.data(), act_scales.data()));
  const DeviceArray<uint8_t> device_x(x);
  flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
  const DeviceArray<uint8_t> device_act(bytes);
  flexq::check(flexq_quantize_activation(&gpu.cuda, &act, device_x.data(), c.dtype, ldx, device_act.data(), bytes));
  const DeviceArray<int8_t> device_codes(codes.size());
  const DeviceArray<float> device_scales(act_scales.size());
  flexq::check(
      flexq_activation_export(&gpu.cuda, &act, device_act.data(), bytes, device_codes.data(), device_scales.data()));
  CHECK(device_codes.host() == codes);
  CHECK(device_scales.host() == act_scales);
  if (c.m == 0) return;

  std::vector<int8_t> w(static_cast<size_t>(c.n * kp));
  flexq::check(flexq_unpack_codes(&gpu.cpu, &desc, weight.planes().data(), w.data(), kp));
  const std::vector<float> bias = test::random_values(static_cast<size_t>(c.n), rng);
  const Reference reference(c, codes, act_scales, w, weight.scales(), bias);

  const DeviceArray<float> device_bias(bias);
  const float* b = c.bias ? device_bias.data() : nullptr;
  const size_t y_bytes = static_cast<size_t>(c.m * ldy) * (c.dtype == FLEXQ_F32 ? 4 : 2);
  const std::vector<flexq_kernel_info> kernels = kernels_for(gpu.cuda, desc, c.act_bits, c.m);
  CHECK(!kernels.empty());
  const size_t step = std::max<size_t>(1, kernels.size() / std::max<size_t>(others, 1));
  for (size_t kernel = 0; kernel < (others == 0 ? 1 : kernels.size()); kernel += kernel == 0 ? 1 : step) {
    // The product, in one call and in two, twice: the same bits each time.
    flexq_stream stream = gpu.cuda;
    stream.kernel = kernel == 0 ? nullptr : kernels[kernel].name;
    flexq::check(flexq_linear_workspace_size(&stream, &desc, c.act_bits, c.m, &bytes));
    const DeviceArray<uint8_t> workspace(bytes);
    const DeviceArray<uint8_t> y(y_bytes), again(y_bytes), separate(y_bytes);
    for (const auto* out : {&y, &again}) {
      flexq::check(flexq_linear(&stream, &desc, packed.data(), packed.size(), c.act_bits, c.m, device_x.data(), c.dtype,
                                ldx, b, FLEXQ_F32, out->data(), c.dtype, ldy, workspace.data(), bytes));
    }
    flexq::check(flexq_gemm_workspace_size(&stream, &desc, c.act_bits, c.m, &bytes));
    flexq::check(flexq_gemm(&stream, &desc, packed.data(), packed.size(), &act, device_act.data(), device_act.size(), b,
                            FLEXQ_F32, separate.data(), c.dtype, ldy, workspace.data(), bytes));
    const std::vector<uint8_t> got = y.host();
    if (!reference.holds(got, ldy) || again.host() != got || separate.host() != got) {
      std::fprintf(stderr, "kernel %s, m %lld, n %lld, k %lld, W%dA%d, scheme %d, dtype %d\n", kernels[kernel].name,
                   static_cast<long long>(c.m), static_cast<long long>(c.n), static_cast<long long>(c.k), c.weight_bits,
                   c.act_bits, c.scheme, c.dtype);
      CHECK(reference.holds(got, ldy));
      CHECK(again.host() == got && separate.host() == got);
    }
  }
}

Case random_case(std::mt19937& rng, int64_t m, int64_t n, int64_t k, flexq_scheme scheme) {
  const auto dtype = static_cast<flexq_dtype>(rng() % 3);
  const auto rotation = static_cast<flexq_rotation>(rng() % 2);
  constexpr int32_t kWeightBits[] = {4, 5, 6, 8};
  const int32_t weight_bits = kWeightBits[rng() % 4];
  return {m, n, k, weight_bits, rng() % 2 ? 8 : 6, scheme, rotation, rng() % 2 == 0, dtype, rng() % 2 ? 0 : 3};
}

// `quick`: a few of each kind, for runs under compute-sanitizer.
void test_shapes(const Gpu& gpu, bool quick) {
  std::mt19937 rng(11);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    for (const int64_t k : {1, 64, 100, 576, 4097}) {
      for (const int64_t n : {1, 17, 200}) {
        for (const int64_t m : {0, 1, 7, 8, 9, 16, 17, 32, 33, 65, 129, 300}) {
          if (quick && (k == 1 || k == 64 || n == 1 || m == 7 || m == 8 || m > 150)) continue;
          check_case(gpu, random_case(rng, m, n, k, scheme), rng, quick ? 8 : 100);
        }
      }
    }
    if (quick) continue;
    for (const int64_t m : {1, 8, 16, 33, 200}) {
      check_case(gpu, random_case(rng, m, 17, 28672, scheme), rng, 100);
      check_case(gpu, random_case(rng, m, 9000, 512, scheme), rng, 20);
      check_case(gpu, random_case(rng, m, 5000, 1536, scheme), rng, 20);
      check_case(gpu, random_case(rng, m, 40, 100000, scheme), rng, 20);
    }
    for (const int64_t m : {1000, 4099, 8192}) check_case(gpu, random_case(rng, m, 700, 700, scheme), rng, 100);
    // One to five waves of tiles, the last ones of which may be streamed.
    for (const int64_t m : {300, 1000}) check_case(gpu, random_case(rng, m, 9000, 700, scheme), rng, 100);
  }
}

void test_random_draws(const Gpu& gpu, int count) {
  std::mt19937 rng(13);
  const auto draw = [&](int64_t largest) {  // small ones more often
    return 1 + static_cast<int64_t>(std::exp(std::uniform_real_distribution<>(0, 1)(rng) * std::log(largest)));
  };
  for (int i = 0; i < count; ++i) {
    const auto scheme = rng() % 2 ? FLEXQ_SCHEME_GROUP : FLEXQ_SCHEME_CHANNEL;
    check_case(gpu, random_case(rng, draw(400), draw(600), draw(3000), scheme), rng, 2);
  }
}

// Weights are rounded to the CPU's bits, and refused with its words.
void test_quantize_weight(const Gpu& gpu) {
  std::mt19937 rng(23);
  int round = 0;
  for (const int64_t k : {1, 100, 128, 576, 4097}) {
    for (const int64_t n : {1, 17, 200}) {
      for (const int32_t bits : {4, 5, 6, 8}) {
        for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
          const auto dtype = static_cast<flexq_dtype>(round % 3);
          const flexq::WeightDesc desc(n, k, scheme, static_cast<flexq_rotation>(round / 3 % 2), bits);
          const int64_t ldw = k + (round++ % 5 == 0 ? 3 : 0);
          std::vector<float> values = test::random_values(static_cast<size_t>(n * ldw), rng);
          for (int64_t row = 0; row < n; ++row) {  // rows of every size, some of whose scales vanish
            const float factor = std::exp2(static_cast<float>(static_cast<int>(rng() % 24) - 20));
            for (int64_t j = 0; j < k; ++j) values[static_cast<size_t>(row * ldw + j)] *= row % 7 == 3 ? 0.0f : factor;
          }
          const std::vector<uint8_t> w = as_bytes(values, dtype);
          flexq::Weight expected(desc);
          int64_t vanished = -1, found = -2;
          flexq::check(flexq_quantize_weight(&gpu.cpu, &desc, w.data(), dtype, ldw, expected.planes().data(),
                                             expected.scales().data(), &vanished));
          const DeviceArray<uint8_t> device_w(w), planes(expected.planes().size()), packed(planes.size());
          const DeviceArray<uint16_t> scales(expected.scales().size());
          flexq::check(flexq_quantize_weight(&gpu.cuda, &desc, device_w.data(), dtype, ldw, planes.data(),
                                             scales.data(), &found));
          cuda_check(cudaStreamSynchronize(static_cast<cudaStream_t>(gpu.cuda.handle)));
          CHECK(scales.host() == expected.scales());
          CHECK(planes.host() == expected.planes());
          CHECK(found == vanished);
          const int64_t kp = (k + kGroup - 1) / kGroup * kGroup;
          std::vector<int8_t> codes(static_cast<size_t>(n * kp));
          flexq::check(flexq_unpack_codes(&gpu.cpu, &desc, expected.planes().data(), codes.data(), kp));
          const DeviceArray<int8_t> device_codes(codes);
          flexq::check(flexq_pack_codes(&gpu.cuda, &desc, device_codes.data(), kp, packed.data()));
          CHECK(packed.host() == expected.planes());
        }
      }
    }
  }
  const auto refused = [&](const flexq_weight_desc& desc, const std::vector<float>& values) {
    flexq::Weight weight(static_cast<const flexq::WeightDesc&>(desc));
    CHECK(flexq_quantize_weight(&gpu.cpu, &desc, values.data(), FLEXQ_F32, desc.k, weight.planes().data(),
                                weight.scales().data(), nullptr) == FLEXQ_BAD_VALUE);
    const std::string message = flexq_last_error();
    const DeviceArray<float> w(values);
    const DeviceArray<uint8_t> planes(weight.planes().size());
    const DeviceArray<uint16_t> scales(weight.scales().size());
    CHECK(flexq_quantize_weight(&gpu.cuda, &desc, w.data(), FLEXQ_F32, desc.k, planes.data(), scales.data(), nullptr) ==
          FLEXQ_BAD_VALUE);
    CHECK(message == flexq_last_error());
    for (const uint8_t byte : planes.host()) CHECK(byte == 0x5a);
    for (const uint16_t scale : scales.host()) CHECK(scale == 0x5a5a);
  };
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    const flexq::WeightDesc desc(40, 300, scheme);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -INFINITY, 1e30f, 3e38f}) {
      std::vector<float> values = test::random_values(40 * 300, rng);
      values[7 * 300 + 299] = values[30 * 300 + 5] = bad;
      refused(desc, values);
    }
  }
  const flexq::WeightDesc desc(3, 256, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_NONE, 5);
  std::vector<int8_t> codes(3 * 256);
  codes[256 + 77] = 16, codes[600] = -17;
  const DeviceArray<int8_t> device_codes(codes);
  const DeviceArray<uint8_t> planes(3 * 2 * 5 * 16);
  CHECK(flexq_pack_codes(&gpu.cuda, &desc, device_codes.data(), 256, planes.data()) == FLEXQ_BAD_VALUE);
  CHECK(std::strstr(flexq_last_error(), "codes[1][77] is 16; 5-bit codes are -16 to 15") != nullptr);
}

enum class SumAt { kApart, kX, kResidual };
struct FusedCase {
  flexq::ActivationDesc act;
  flexq_dtype dtype;
  int64_t ld;
  bool with_residual;
  SumAt sum_at;
};

// The fused quantizers against the CPU's: the same sums, and codes and scales but for roundings of the norm.
void check_fused(const Gpu& gpu, const FusedCase& c, std::mt19937& rng) {
  const auto& [act, dtype, ld, with_residual, sum_at] = c;
  const int64_t m = act.m, k = act.k;
  const auto count = static_cast<size_t>(m * ld);
  const std::vector<uint8_t> x = as_bytes(test::random_values(count, rng), dtype);
  const std::vector<uint8_t> other = as_bytes(test::random_values(count, rng), dtype);
  const std::vector<uint8_t> weight = as_bytes(test::random_values(static_cast<size_t>(k), rng), dtype);
  for (const bool norm : {true, false}) {
    const int64_t groups = (k + kGroup - 1) / kGroup;
    const size_t num_scales = static_cast<size_t>(m * (act.scheme == FLEXQ_SCHEME_GROUP ? groups : 1));
    const auto run = [&](const flexq_stream& stream, const void* a, const void* b, const void* w, void* sum, void* q,
                         size_t bytes) {
      flexq::check(norm ? flexq_rms_norm_quantize(&stream, &act, a, ld, with_residual ? b : nullptr, ld, w, 1e-5f,
                                                  dtype, sum, ld, q, bytes)
                        : flexq_silu_mul_quantize(&stream, &act, a, ld, b, ld, dtype, q, bytes));
    };
    size_t bytes = 0;
    flexq::check(flexq_activation_size(&gpu.cpu, &act, &bytes));
    const flexq::Buffer host(bytes);
    std::vector<uint8_t> sum(x.size(), 0x5a);
    run(gpu.cpu, x.data(), other.data(), weight.data(), sum.data(), host.data(), bytes);
    std::vector<int8_t> codes(static_cast<size_t>(m * groups * kGroup));
    std::vector<float> scales(num_scales);
    flexq::check(flexq_activation_export(&gpu.cpu, &act, host.data(), bytes, codes.data(), scales.data()));

    const DeviceArray<uint8_t> device_x(x), device_other(other), device_weight(weight), device_sum(x.size());
    flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
    const DeviceArray<uint8_t> quantized(bytes);
    const DeviceArray<uint8_t>& out = sum_at == SumAt::kX          ? device_x
                                      : sum_at == SumAt::kResidual ? device_other
                                                                   : device_sum;
    run(gpu.cuda, device_x.data(), device_other.data(), device_weight.data(), out.data(), quantized.data(), bytes);
    const DeviceArray<int8_t> device_codes(codes.size());
    const DeviceArray<float> device_scales(num_scales);
    flexq::check(
        flexq_activation_export(&gpu.cuda, &act, quantized.data(), bytes, device_codes.data(), device_scales.data()));
    if (norm) {
      const std::vector<uint8_t> got = out.host();
      const size_t element = dtype == FLEXQ_F32 ? 4 : 2;
      for (int64_t t = 0; t < m; ++t) {
        CHECK(std::memcmp(got.data() + static_cast<size_t>(t * ld) * element,
                          sum.data() + static_cast<size_t>(t * ld) * element, static_cast<size_t>(k) * element) == 0);
      }
    }
    const std::vector<int8_t> got_codes = device_codes.host();
    const std::vector<float> got_scales = device_scales.host();
    size_t different = 0;
    for (size_t j = 0; j < codes.size(); ++j) {
      CHECK(std::abs(got_codes[j] - codes[j]) <= 2);
      different += got_codes[j] != codes[j];
    }
    // In bf16 a normed value and its product with the weight may each be rounded the other way, by 2^-7.
    const float near = dtype == FLEXQ_BF16 ? 0x1p-6f : 1e-2f;
    for (size_t j = 0; j < scales.size(); ++j) CHECK(std::abs(got_scales[j] - scales[j]) <= near * scales[j]);
    CHECK(different <= codes.size() / 20 + 2);
  }
}

void test_fused(const Gpu& gpu) {
  std::mt19937 rng(14);
  for (int i = 0; i < 100; ++i) {
    const int64_t m = std::vector<int64_t>{1, 9, 70, 700}[static_cast<size_t>(i) % 4];
    const int64_t k = std::vector<int64_t>{100, 576, 4097, 8192, 20000}[static_cast<size_t>(i) / 4 % 5];
    const auto dtype = static_cast<flexq_dtype>(rng() % 3);
    const flexq::ActivationDesc act(m, k, rng() % 2 ? 8 : 6, static_cast<flexq_scheme>(rng() % 2),
                                    static_cast<flexq_rotation>(rng() % 2));
    const int64_t ld = k + (rng() % 2 ? 0 : 5);
    const bool with_residual = rng() % 2;
    check_fused(gpu, {act, dtype, ld, with_residual, static_cast<SumAt>(rng() % (with_residual ? 3 : 2))}, rng);
  }
  // Norms by tiles, of floats and of long rows: by single CTAs and by clusters, of one tile and of several, with and
  // without an end of the row, of more groups than registers have room for. Others by pairs.
  int round = 0;
  for (const auto& [m, k] :
       std::vector<std::pair<int64_t, int64_t>>{{4500, 576}, {2100, 1280}, {1100, 4104}, {70, 40008}}) {
    for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
      for (const flexq_dtype dtype : {FLEXQ_F32, FLEXQ_F16, FLEXQ_BF16}) {
        const auto rotation = static_cast<flexq_rotation>(round % 4 != 0);
        check_fused(gpu, {{m, k, 8, scheme, rotation}, dtype, k, round % 3 != 0, static_cast<SumAt>(round % 2)}, rng);
        ++round;
      }
    }
  }
}

// Quantizers of two tokens a CTA, which a GPU of 132 SMs takes for these: one token left over, the fewest groups (of
// norms: other rows so short are not theirs) and the most, warps and groups that end early, rows apart. Then rows just
// too long for them.
void test_pairs(const Gpu& gpu, bool quick) {
  std::mt19937 rng(19);
  int round = 0;
  for (const auto& [m, k] : std::vector<std::pair<int64_t, int64_t>>{
           {1601, 1096}, {13601, 120}, {2501, 896}, {397, 8200}, {115, 14344}, {101, 16384}, {141, 16392}}) {
    if (quick && k != 1096 && k != 14344) continue;
    for (const flexq_dtype dtype : {FLEXQ_F16, FLEXQ_BF16}) {
      Case c = random_case(rng, m, 5, k, FLEXQ_SCHEME_CHANNEL);
      c.dtype = dtype;
      c.pad = round % 2 ? 8 : 0;
      check_case(gpu, c, rng, quick ? 0 : 2);
      for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
        const flexq::ActivationDesc act(m, k, c.act_bits, scheme, c.rotation);
        check_fused(gpu, {act, dtype, k + c.pad, round % 4 != 0, static_cast<SumAt>(round % 4 != 0 ? round % 3 : 0)},
                    rng);
        ++round;
      }
    }
  }
}

// What is not finite stays with its token, also where tiles follow each other in the same memory.
void check_norms_not_finite(const Gpu& gpu, int64_t m, int64_t k, flexq_dtype dtype) {
  std::mt19937 rng(16);
  const int64_t groups = (k + kGroup - 1) / kGroup;
  std::vector<float> x = test::random_values(static_cast<size_t>(m * k), rng);
  x[static_cast<size_t>(3 * k)] = std::nanf("");
  x[static_cast<size_t>(12 * k - 1)] = INFINITY;
  const DeviceArray<uint8_t> device_x(as_bytes(x, dtype)), sum(device_x.size());
  const DeviceArray<uint8_t> weight(as_bytes(test::random_values(static_cast<size_t>(k), rng), dtype));
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    const flexq::ActivationDesc act(m, k, 8, scheme);
    size_t bytes = 0;
    flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
    const DeviceArray<uint8_t> quantized(bytes);
    flexq::check(flexq_rms_norm_quantize(&gpu.cuda, &act, device_x.data(), k, nullptr, k, weight.data(), 1e-5f, dtype,
                                         sum.data(), k, quantized.data(), bytes));
    const size_t of_token = scheme == FLEXQ_SCHEME_GROUP ? static_cast<size_t>(groups) : 1;
    const DeviceArray<int8_t> codes(static_cast<size_t>(m * groups * kGroup));
    const DeviceArray<float> scales(static_cast<size_t>(m) * of_token);
    flexq::check(flexq_activation_export(&gpu.cuda, &act, quantized.data(), bytes, codes.data(), scales.data()));
    const std::vector<float> got = scales.host();
    for (size_t i = 0; i < got.size(); ++i) {
      const size_t token = i / of_token;
      if (token != 3 && token != 11) CHECK(std::isfinite(got[i]));
    }
    for (const size_t token : {3, 11}) CHECK(std::isnan(got[token * of_token + of_token - 1]));
  }
}

void test_norms_not_finite(const Gpu& gpu) {
  check_norms_not_finite(gpu, 4500, 576, FLEXQ_F32);
  check_norms_not_finite(gpu, 70, 40008, FLEXQ_BF16);
  check_norms_not_finite(gpu, 1801, 904, FLEXQ_BF16);
  check_norms_not_finite(gpu, 115, 14344, FLEXQ_F16);
}

// CTAs that wait for each other's sums must come to an end where only one of them is resident, with the same bits.
void test_one_sm(const Gpu& gpu) {
  std::mt19937 rng(15);
  const int64_t m = 300, n = 9000, k = 700;
  const flexq::WeightDesc desc(n, k, FLEXQ_SCHEME_GROUP);
  std::string streamed;
  for (const flexq_kernel_info& info : kernels_for(gpu.cuda, desc, 8, m)) {
    if (std::strstr(info.name, "stream") != nullptr) streamed = info.name;
  }
  if (streamed.empty()) return;
  flexq_stream stream = gpu.cuda;
  stream.kernel = streamed.c_str();
  const flexq::Weight weight =
      flexq::Weight::quantize(gpu.cpu, desc, test::random_values(static_cast<size_t>(n * k), rng).data());
  const DeviceArray<uint8_t> planes(weight.planes());
  const DeviceArray<uint16_t> scales(weight.scales());
  size_t bytes = 0;
  flexq::check(flexq_prepack_size(&stream, &desc, &bytes));
  const DeviceArray<uint8_t> packed(bytes);
  flexq::check(flexq_prepack(&stream, &desc, planes.data(), scales.data(), packed.data(), bytes));
  const DeviceArray<float> x(test::random_values(static_cast<size_t>(m * k), rng));
  flexq::check(flexq_linear_workspace_size(&stream, &desc, 8, m, &bytes));
  const DeviceArray<uint8_t> workspace(bytes);
  const DeviceArray<float> y(static_cast<size_t>(m * n)), again(static_cast<size_t>(m * n));
  const auto run = [&](const DeviceArray<float>& out) {
    flexq::check(flexq_linear(&stream, &desc, packed.data(), packed.size(), 8, m, x.data(), FLEXQ_F32, k, nullptr,
                              FLEXQ_F32, out.data(), FLEXQ_F32, n, workspace.data(), bytes));
    cuda_check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream.handle)));
  };
  run(y);
  {
    const test::Occupied all_but_one(1);
    run(again);
  }
  CHECK(again.host() == y.host());
}

// An error that other code left behind is not reported as ours.
void test_errors_of_others(const Gpu& gpu) {
  const flexq::ActivationDesc act(1, 128, 8, FLEXQ_SCHEME_GROUP, FLEXQ_ROTATION_NONE);
  const DeviceArray<float> x(128);
  size_t bytes = 0;
  flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
  const DeviceArray<uint8_t> quantized(bytes);
  const DeviceArray<int8_t> codes(128);
  const DeviceArray<float> scales(1);
  CHECK(cudaSetDevice(1 << 20) == cudaErrorInvalidDevice);
  flexq::check(flexq_quantize_activation(&gpu.cuda, &act, x.data(), FLEXQ_F32, 128, quantized.data(), bytes));
  flexq::check(flexq_activation_export(&gpu.cuda, &act, quantized.data(), bytes, codes.data(), scales.data()));
  cudaGetLastError();
}

// Grids that no GPU takes are refused when the workspace is asked for, before anything is queued.
void test_too_large(const Gpu& gpu) {
  const flexq::WeightDesc desc(16, 128, FLEXQ_SCHEME_GROUP);
  const int64_t m = int64_t{1} << 22;
  size_t refused = 0, bytes = 0;
  for (const flexq_kernel_info& info : kernels_for(gpu.cuda, desc, 8, m)) {
    flexq_stream stream = gpu.cuda;
    stream.kernel = info.name;
    const flexq_status status = flexq_gemm_workspace_size(&stream, &desc, 8, m, &bytes);
    if (status == FLEXQ_OK) continue;
    CHECK(status == FLEXQ_UNSUPPORTED && std::strstr(flexq_last_error(), "65535") != nullptr);
    ++refused;
  }
  CHECK(refused > 0);
}

// A NaN or Inf poisons its token's outputs, and no other's.
void test_not_finite(const Gpu& gpu) {
  std::mt19937 rng(12);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    const flexq::WeightDesc desc(40, 300, scheme);
    const flexq::Weight weight = flexq::Weight::quantize(gpu.cpu, desc, test::random_values(40 * 300, rng).data());
    const DeviceArray<uint8_t> planes(weight.planes());
    const DeviceArray<uint16_t> scales(weight.scales());
    size_t bytes = 0;
    flexq::check(flexq_prepack_size(&gpu.cuda, &desc, &bytes));
    const DeviceArray<uint8_t> packed(bytes);
    flexq::check(flexq_prepack(&gpu.cuda, &desc, planes.data(), scales.data(), packed.data(), bytes));
    std::vector<float> x = test::random_values(10 * 300, rng);
    x[2 * 300 + 299] = INFINITY;
    x[9 * 300] = std::nanf("");
    const DeviceArray<float> device_x(x), y(10 * 40);
    flexq::check(flexq_linear_workspace_size(&gpu.cuda, &desc, 8, 10, &bytes));
    const DeviceArray<uint8_t> workspace(bytes);
    flexq::check(flexq_linear(&gpu.cuda, &desc, packed.data(), packed.size(), 8, 10, device_x.data(), FLEXQ_F32, 300,
                              nullptr, FLEXQ_F32, y.data(), FLEXQ_F32, 40, workspace.data(), bytes));
    const std::vector<float> got = y.host();
    for (size_t i = 0; i < got.size(); ++i) CHECK(std::isnan(got[i]) == (i / 40 == 2 || i / 40 == 9));
  }
}

// More than kernels and grids take is refused before anything is queued.
void test_absurd_shapes(const Gpu& gpu) {
  size_t bytes = 77;
  const auto refused = [&](flexq_status status, const char* message) {
    CHECK(status == FLEXQ_UNSUPPORTED && bytes == 77);
    CHECK(std::strstr(flexq_last_error(), message) != nullptr);
  };
  const flexq::WeightDesc tall(int64_t{1} << 31, 128), large(int64_t{1} << 30, 512), usual(4096, 4096);
  refused(flexq_prepack_size(&gpu.cuda, &tall, &bytes), "n must be at most 2147483647 on CUDA, got 2147483648");
  refused(flexq_prepack_size(&gpu.cuda, &large, &bytes), "n * k must be at most 2^38 on CUDA, got 1073741824 * 512");
  const flexq::ActivationDesc many(int64_t{1} << 32, 128);
  refused(flexq_activation_size(&gpu.cuda, &many, &bytes), "m must be at most 2147483647 on CUDA");
  refused(flexq_gemm_workspace_size(&gpu.cuda, &usual, 8, int64_t{1} << 27, &bytes), "m * n must be at most 2^38");
  refused(flexq_linear_workspace_size(&gpu.cuda, &usual, 8, int64_t{1} << 33, &bytes), "m must be at most 2147483647");
}

// Ours is not left behind for others.
void test_own_errors(const Gpu& gpu) {
  const flexq::WeightDesc desc(40, 300);
  const std::vector<float> w(40 * 300, 0.5f);
  const flexq::Weight weight = flexq::Weight::quantize(gpu.cpu, desc, w.data());
  const DeviceArray<uint8_t> planes(weight.planes());
  const DeviceArray<uint16_t> scales(weight.scales());
  size_t bytes = 0;
  flexq::check(flexq_prepack_size(&gpu.cuda, &desc, &bytes));
  const DeviceArray<uint8_t> packed(bytes);
  const DeviceArray<float> x(std::vector<float>(300, 1.0f)), y(40);
  size_t workspace_bytes = 0;
  flexq::check(flexq_linear_workspace_size(&gpu.cuda, &desc, 8, 1, &workspace_bytes));
  const DeviceArray<uint8_t> workspace(workspace_bytes);
  const auto leave_error = [] { CHECK(cudaSetDevice(12345) != cudaSuccess); };
  leave_error();
  CHECK(flexq_prepack(&gpu.cuda, &desc, planes.data(), scales.data(), packed.data(), bytes) == FLEXQ_OK);
  leave_error();
  CHECK(flexq_linear(&gpu.cuda, &desc, packed.data(), packed.size(), 8, 1, x.data(), FLEXQ_F32, 300, nullptr, FLEXQ_F32,
                     y.data(), FLEXQ_F32, 40, workspace.data(), workspace_bytes) == FLEXQ_OK);
  cudaGetLastError();
  const flexq::Stream none = flexq::Stream::cuda(12345, nullptr);
  CHECK(flexq_prepack_size(&none, &desc, &bytes) == FLEXQ_UNAVAILABLE);
  CHECK(cudaPeekAtLastError() == cudaSuccess);
  cuda_check(cudaDeviceSynchronize());
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  if (flexq_device_available(FLEXQ_CUDA, 0) != FLEXQ_OK) {
    std::printf("skipped: %s\n", flexq_last_error());
    return test::kSkipped;
  }
  cudaStream_t stream;
  cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const Gpu gpu(stream);
  test_absurd_shapes(gpu);
  test_errors_of_others(gpu);
  test_not_finite(gpu);
  test_own_errors(gpu);
  test_too_large(gpu);
  if (!quick) test_one_sm(gpu);  // its SMs wait for the host, which sanitizers do not let them do
  test_quantize_weight(gpu);
  test_fused(gpu);
  test_norms_not_finite(gpu);
  test_pairs(gpu, quick);
  test_shapes(gpu, quick);
  test_random_draws(gpu, quick ? 20 : 1000);
  cuda_check(cudaStreamDestroy(stream));
  std::printf("ok\n");
  return 0;
}
