// Bad arguments: refused with a message that says what was given, and nothing written.
#include <algorithm>
#include <cstring>
#include <functional>
#include <tuple>

#include "check.h"

namespace {

struct Setup {
  Setup() : weight(desc), w(static_cast<size_t>(desc.n * desc.k), 0.5f), x(2 * 200, 1.0f), y(2 * 5, 7.0f) {
    weight = flexq::Weight::quantize(stream, desc, w.data());
    flexq::check(flexq_prepack_size(&stream, &desc, &packed_bytes));
    packed.reserve(packed_bytes);
    flexq::check(
        flexq_prepack(&stream, &desc, weight.planes().data(), weight.scales().data(), packed.data(), packed_bytes));
    flexq::check(flexq_linear_workspace_size(&stream, &desc, 8, 2, &workspace_bytes));
    workspace.reserve(workspace_bytes + 1);
    std::memset(workspace.data(), 0x5a, workspace.size());
  }

  flexq_status linear() {
    return flexq_linear(&stream, &desc, packed_pointer(), packed_bytes, act_bits, m, x_pointer, x_dtype, ldx, bias,
                        bias_dtype, y_pointer, y_dtype, ldy, workspace_pointer(), workspace_bytes);
  }
  void* packed_pointer() const { return packed_null ? nullptr : packed.data() + packed_offset; }
  void* workspace_pointer() const { return workspace_null ? nullptr : workspace.data() + workspace_offset; }

  flexq::WeightDesc desc{5, 200};
  flexq::Stream stream = flexq::Stream::cpu();
  flexq::Weight weight;
  std::vector<float> w, x, y;
  flexq::Buffer packed, workspace;
  size_t packed_bytes = 0, workspace_bytes = 0, packed_offset = 0, workspace_offset = 0;
  bool packed_null = false, workspace_null = false;
  int32_t act_bits = 8;
  int64_t m = 2, ldx = 200, ldy = 5;
  const void* x_pointer = x.data();
  const void* bias = nullptr;
  void* y_pointer = y.data();
  flexq_dtype x_dtype = FLEXQ_F32, y_dtype = FLEXQ_F32, bias_dtype = FLEXQ_F32;
};

void refuses(flexq_status expected, const char* message, const std::function<void(Setup&)>& spoil) {
  Setup s;
  spoil(s);
  const flexq_status status = s.linear();
  if (status != expected || std::strstr(flexq_last_error(), message) == nullptr) {
    std::fprintf(stderr, "expected status %d with '%s', got %d with '%s'\n", expected, message, status,
                 flexq_last_error());
    std::exit(1);
  }
  for (const float v : s.y) CHECK(v == 7.0f);
  for (size_t i = 0; i < s.workspace.size(); ++i) CHECK(s.workspace.data()[i] == 0x5a);
}

void test_linear() {
  Setup fine;
  CHECK(fine.linear() == FLEXQ_OK);
  constexpr auto kInvalid = FLEXQ_INVALID_ARGUMENT;
  refuses(kInvalid, "x must not be null", [](Setup& s) { s.x_pointer = nullptr; });
  refuses(kInvalid, "y must not be null", [](Setup& s) { s.y_pointer = nullptr; });
  refuses(kInvalid, "prepacked must not be null", [](Setup& s) { s.packed_null = true; });
  refuses(kInvalid, "workspace must not be null", [](Setup& s) { s.workspace_null = true; });
  refuses(kInvalid, "prepacked must be aligned to 64 bytes", [](Setup& s) { s.packed_offset = 16; });
  refuses(kInvalid, "workspace must be aligned to 64 bytes", [](Setup& s) { s.workspace_offset = 1; });
  refuses(kInvalid, "workspace must have at least", [](Setup& s) { s.workspace_bytes -= 1; });
  refuses(kInvalid, "prepacked must have at least", [](Setup& s) { s.packed_bytes -= 1; });
  refuses(kInvalid, "x must be aligned to 4 bytes",
          [](Setup& s) { s.x_pointer = static_cast<const char*>(s.x_pointer) + 2; });
  refuses(kInvalid, "ldx must be at least the row length 200, got 199", [](Setup& s) { s.ldx = 199; });
  refuses(kInvalid, "ldy must be at least the row length 5, got 4", [](Setup& s) { s.ldy = 4; });
  refuses(kInvalid, "ldx is too large", [](Setup& s) { s.ldx = INT64_MAX; });
  refuses(kInvalid, "m must be 0 or more, got -1", [](Setup& s) { s.m = -1; });
  refuses(kInvalid, "m * k is too large", [](Setup& s) { s.m = INT64_MAX; });
  refuses(kInvalid, "n must be 0 or more, got -3", [](Setup& s) { s.desc.n = -3; });
  refuses(kInvalid, "k must be 1 or more, got 0", [](Setup& s) { s.desc.k = 0; });
  refuses(kInvalid, "n * k is too large", [](Setup& s) { s.desc.n = INT64_MAX / 2; });
  refuses(kInvalid, "k must be at most 2^46", [](Setup& s) { s.desc.k = INT64_MAX; });
  refuses(kInvalid, "scheme must be 0 (group) or 1 (channel), got 9", [](Setup& s) { s.desc.scheme = 9; });
  refuses(kInvalid, "rotation must be 0 (none) or 1 (hadamard128), got 5", [](Setup& s) { s.desc.rotation = 5; });
  refuses(FLEXQ_UNSUPPORTED, "act_bits must be 6 or 8, got 7", [](Setup& s) { s.act_bits = 7; });
  refuses(FLEXQ_UNSUPPORTED, "weight_bits must be 4, 5, 6 or 8, got 7", [](Setup& s) { s.desc.weight_bits = 7; });
  refuses(kInvalid, "x_dtype must be 0 (f32), 1 (f16) or 2 (bf16), got 3", [](Setup& s) { s.x_dtype = 3; });
  refuses(kInvalid, "y_dtype must be", [](Setup& s) { s.y_dtype = 77; });
  refuses(FLEXQ_UNSUPPORTED, "scheme channel sums all of K in int32", [](Setup& s) {
    s.desc.scheme = FLEXQ_SCHEME_CHANNEL;
    s.desc.k = s.ldx = 600000;
  });
  refuses(FLEXQ_UNSUPPORTED, "with weights of 8 bits, k must be at most 132096, got 140000", [](Setup& s) {
    s.desc.scheme = FLEXQ_SCHEME_CHANNEL;
    s.desc.weight_bits = 8;
    s.desc.k = s.ldx = 140000;
  });
  refuses(kInvalid, "device must be 0 (cpu) or 1 (cuda), got 4", [](Setup& s) { s.stream.device = 4; });
  refuses(FLEXQ_UNAVAILABLE, "device_index must be 0", [](Setup& s) { s.stream.device_index = 1; });
  refuses(kInvalid, "stream.handle must be null", [](Setup& s) { s.stream.handle = &s; });
  refuses(kInvalid, "executor.num_threads must be 1 or more, got 0", [](Setup& s) {
    static const flexq_executor none{sizeof(flexq_executor), nullptr, 0, 0, nullptr};
    s.stream.executor = &none;
  });
}

void test_cuda_request() {
  const flexq::Stream cuda = flexq::Stream::cuda(12345, nullptr);
  const flexq::WeightDesc desc(5, 200);
  size_t bytes = 77;
  CHECK(flexq_prepack_size(&cuda, &desc, &bytes) == FLEXQ_UNAVAILABLE);
  CHECK(bytes == 77 && std::strlen(flexq_last_error()) > 10);
  CHECK(flexq_device_available(FLEXQ_CUDA, 12345) == FLEXQ_UNAVAILABLE);
  CHECK(flexq_device_available(FLEXQ_CPU, 3) == FLEXQ_UNAVAILABLE);
  CHECK(flexq_device_available(9, 0) == FLEXQ_INVALID_ARGUMENT);
  CHECK(std::strcmp(flexq_last_error(), "device must be 0 (cpu) or 1 (cuda), got 9") == 0);
}

void test_quantize_refuses() {
  const flexq::Stream stream = flexq::Stream::cpu();
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    const flexq::WeightDesc desc(4, 256, scheme);
    const struct {
      float value;
      const char* message;
    } cases[] = {
        {std::nanf(""), "weight[2][130] is nan"},
        {INFINITY, "weight[2][130] is inf"},
        {1e9f, scheme == FLEXQ_SCHEME_GROUP ? "row 2, group 1: weights up to 1e+09 (8.83883e+07 after the rotation) "
                                              "need a scale of 2.85124e+06, which leaves fp16's range"
                                            : "row 2: weights up to 1e+09 (8.83883e+07 after the rotation) need"},
        {3e38f, "which leaves fp16's range; accepted is up to 2.03062e+06 after the rotation; rescale"}};
    for (const auto& c : cases) {
      std::vector<float> w(4 * 256, 0.0f);
      w[2 * 256 + 130] = c.value;
      flexq::Weight weight(desc);
      std::fill(weight.planes().begin(), weight.planes().end(), uint8_t{0x5a});
      int64_t vanished = 77;
      CHECK(flexq_quantize_weight(&stream, &desc, w.data(), FLEXQ_F32, 256, weight.planes().data(),
                                  weight.scales().data(), &vanished) == FLEXQ_BAD_VALUE);
      CHECK(std::strstr(flexq_last_error(), c.message) != nullptr && vanished == 77);
      for (const uint8_t b : weight.planes()) CHECK(b == 0x5a);
      for (const uint16_t s : weight.scales()) CHECK(s == 0);
    }
  }
  // Sums of the rotation overflow: the message has finite numbers all the same.
  const flexq::WeightDesc desc(1, 128);
  for (const float sign : {1.0f, -1.0f}) {
    std::vector<float> w(128, 3e38f);
    for (size_t i = 64; i < 128; ++i) w[i] *= sign;
    flexq::Weight weight(desc);
    CHECK(flexq_quantize_weight(&stream, &desc, w.data(), FLEXQ_F32, 128, weight.planes().data(),
                                weight.scales().data(), nullptr) == FLEXQ_BAD_VALUE);
    CHECK(std::strstr(flexq_last_error(), "weights up to 3e+38 (3.39411e+39 after the rotation)") != nullptr);
  }
  std::vector<int8_t> codes(128, 32);
  std::vector<uint8_t> planes(96);
  CHECK(flexq_pack_codes(&stream, &desc, codes.data(), 128, planes.data()) == FLEXQ_BAD_VALUE);
}

void test_prepack_refuses() {
  const flexq::Stream stream = flexq::Stream::cpu();
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    const flexq::WeightDesc desc(20, 256, scheme);
    const std::vector<float> w(20 * 256, 0.5f);
    flexq::Weight weight = flexq::Weight::quantize(stream, desc, w.data());
    size_t bytes = 0;
    flexq::check(flexq_prepack_size(&stream, &desc, &bytes));
    const flexq::Buffer packed(bytes);
    const auto prepack = [&] {
      return flexq_prepack(&stream, &desc, weight.planes().data(), weight.scales().data(), packed.data(), bytes);
    };
    const bool grouped = scheme == FLEXQ_SCHEME_GROUP;
    uint16_t& scale = weight.scales()[grouped ? 17 * 2 + 1 : 17];
    const uint16_t good = scale;
    const struct {
      uint16_t bits;
      const char* value;
    } cases[] = {{0x7e00, "nan"}, {0x7c00, "inf"}, {0xfc00, "-inf"}, {0x8001, "-5.96046e-08"}, {0xbc00, "-1"}};
    for (const auto& c : cases) {
      scale = c.bits;
      std::memset(packed.data(), 0x5a, bytes);
      CHECK(prepack() == FLEXQ_BAD_VALUE);
      const std::string message =
          std::string(grouped ? "the scale of row 17, group 1 is " : "the scale of row 17 is ") + c.value +
          "; scales must be finite and 0 or more";
      CHECK(message == flexq_last_error());
      CHECK(std::all_of(packed.data(), packed.data() + bytes, [](uint8_t b) { return b == 0x5a; }));
    }
    for (const uint16_t fine : {uint16_t{0x8000}, uint16_t{0}, uint16_t{0x7bff}, good}) {
      scale = fine;
      CHECK(prepack() == FLEXQ_OK);
    }
  }
}

// Structs of another size: a later version's if they are larger.
template <typename Struct>
void check_sizes(const Struct& fine, const char* name, const std::function<flexq_status(const Struct*)>& call) {
  struct Later {
    Struct known;
    int64_t added[4];
  } later{fine, {}};
  CHECK(call(&fine) == FLEXQ_OK);
  later.known.struct_size = sizeof later;
  CHECK(call(&later.known) == FLEXQ_OK);
  later.added[3] = 1;
  CHECK(call(&later.known) == FLEXQ_UNSUPPORTED);
  CHECK(std::strstr(flexq_last_error(), "was made for a later version") != nullptr);
  later.known.struct_size = sizeof later - sizeof(int64_t);
  CHECK(call(&later.known) == FLEXQ_OK);
  for (const size_t size : {size_t{0}, sizeof(Struct) - 1, size_t{4097}, SIZE_MAX}) {
    later.known.struct_size = size;
    CHECK(call(&later.known) == FLEXQ_INVALID_ARGUMENT);
    const std::string message =
        std::string(name) + ".struct_size must be sizeof the struct, " + std::to_string(sizeof(Struct)) + " bytes";
    CHECK(std::strstr(flexq_last_error(), message.c_str()) != nullptr);
    CHECK(std::strstr(flexq_last_error(), ("got " + std::to_string(size)).c_str()) != nullptr);
  }
}

void test_struct_sizes() {
  const flexq::Stream cpu = flexq::Stream::cpu();
  const flexq::WeightDesc weight(5, 200);
  size_t bytes = 0;
  check_sizes<flexq_weight_desc>(weight, "desc", [&](const auto* d) { return flexq_prepack_size(&cpu, d, &bytes); });
  check_sizes<flexq_stream>(cpu, "stream", [&](const auto* s) { return flexq_prepack_size(s, &weight, &bytes); });
  check_sizes<flexq_activation_desc>(flexq::ActivationDesc(3, 200), "activation desc",
                                     [&](const auto* d) { return flexq_activation_size(&cpu, d, &bytes); });
  const flexq::ThreadPool pool(2);
  check_sizes<flexq_executor>(*pool.executor(), "executor", [&](const auto* executor) {
    const flexq::Stream stream = flexq::Stream::cpu(executor);
    return flexq_prepack_size(&stream, &weight, &bytes);
  });

  flexq_weight_desc reserved = weight;
  reserved.reserved = 3;
  CHECK(flexq_prepack_size(&cpu, &reserved, &bytes) == FLEXQ_UNSUPPORTED);
  CHECK(std::strstr(flexq_last_error(), "desc.reserved must be 0 in this version, got 3") != nullptr);
  const flexq_weight_desc initial = FLEXQ_WEIGHT_DESC_INIT;
  CHECK(initial.weight_bits == 6 && initial.scheme == FLEXQ_SCHEME_GROUP);

  // An array of larger ones is filled at its own stride.
  struct LaterInfo {
    flexq_kernel_info known;
    int64_t added;
  } infos[2];
  for (LaterInfo& info : infos) info = {FLEXQ_KERNEL_INFO_INIT, 7};
  infos[0].known.struct_size = sizeof(LaterInfo);
  int32_t count = 0;
  CHECK(flexq_gemm_kernels(&cpu, &weight, 8, 1, &infos[0].known, 2, &count) == FLEXQ_OK && count == 1);
  CHECK(std::strlen(infos[0].known.name) > 0 && infos[0].known.struct_size == sizeof(LaterInfo) && infos[0].added == 0);
  CHECK(infos[1].added == 7);
  infos[0].known.struct_size = 8;
  CHECK(flexq_gemm_kernels(&cpu, &weight, 8, 1, &infos[0].known, 2, &count) == FLEXQ_INVALID_ARGUMENT);
}

void test_absurd_shapes() {
  const flexq::Stream cpu = flexq::Stream::cpu();
  size_t bytes = 77, more = 77;
  for (const auto& [n, k, message] : {std::tuple{int64_t{1} << 40, int64_t{1}, "n * k is too large: 1099511627776 * 1"},
                                      std::tuple{int64_t{1} << 40, int64_t{1} << 40, "n * k is too large"},
                                      std::tuple{int64_t{1}, int64_t{1} << 47, "k must be at most 2^46"}}) {
    const flexq::WeightDesc desc(n, k);
    CHECK(flexq_weight_size(&desc, &bytes, &more) == FLEXQ_INVALID_ARGUMENT);
    CHECK(std::strstr(flexq_last_error(), message) != nullptr);
    CHECK(flexq_prepack_size(&cpu, &desc, &bytes) == FLEXQ_INVALID_ARGUMENT);
    CHECK(flexq_linear_workspace_size(&cpu, &desc, 8, 1, &bytes) == FLEXQ_INVALID_ARGUMENT);
  }
  const flexq::ActivationDesc act(int64_t{1} << 40, 1);
  CHECK(flexq_activation_size(&cpu, &act, &bytes) == FLEXQ_INVALID_ARGUMENT);
  CHECK(std::strstr(flexq_last_error(), "m * k is too large: 1099511627776 * 1 (at most 2^46 elements)") != nullptr);
  // Each fits, but not what they make together.
  const flexq::WeightDesc tall(int64_t{1} << 30, 128);
  CHECK(flexq_gemm_workspace_size(&cpu, &tall, 8, int64_t{1} << 30, &bytes) == FLEXQ_INVALID_ARGUMENT);
  CHECK(std::strstr(flexq_last_error(), "m * n is too large: 1073741824 * 1073741824 (at most 2^46") != nullptr);
  int32_t count = 77;
  CHECK(flexq_gemm_kernels(&cpu, &tall, 8, int64_t{1} << 30, nullptr, 0, &count) == FLEXQ_INVALID_ARGUMENT);
  CHECK(bytes == 77 && more == 77 && count == 77);
}

void test_mismatch() {
  Setup s;
  flexq::ActivationDesc act(2, 128);
  const auto gemm = [&] {
    return flexq_gemm(&s.stream, &s.desc, s.packed.data(), s.packed_bytes, &act, s.workspace.data(), s.workspace.size(),
                      nullptr, FLEXQ_F32, s.y.data(), FLEXQ_F32, 5, nullptr, 0);
  };
  CHECK(gemm() == FLEXQ_INVALID_ARGUMENT && std::strstr(flexq_last_error(), "same k, got 128 and 200"));
  act.k = 200;
  act.rotation = FLEXQ_ROTATION_NONE;
  CHECK(gemm() == FLEXQ_INVALID_ARGUMENT && std::strstr(flexq_last_error(), "same rotation"));
  act.rotation = FLEXQ_ROTATION_HADAMARD128;
  act.scheme = FLEXQ_SCHEME_CHANNEL;
  CHECK(gemm() == FLEXQ_INVALID_ARGUMENT && std::strstr(flexq_last_error(), "same scheme"));
}

}  // namespace

int main() {
  test_linear();
  test_cuda_request();
  test_quantize_refuses();
  test_prepack_refuses();
  test_struct_sizes();
  test_absurd_shapes();
  test_mismatch();
  return 0;
}
