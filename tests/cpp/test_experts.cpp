// Mixture-of-experts layers: bit for bit what single linear layers give, whatever the routing, and bad arguments
// refused.
#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>

#include "check.h"

namespace {

using test::random_values;

constexpr float kUntouched = 12345.0f;

size_t sz(int64_t n) { return static_cast<size_t>(n); }

template <typename T>
T to(float x);
template <>
float to<float>(float x) {
  return x;
}
template <>
flexq::bfloat16_t to<flexq::bfloat16_t>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
float from(float x) { return x; }
float from(flexq::bfloat16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <typename T>
std::vector<T> converted(const std::vector<float>& values) {
  std::vector<T> out;
  for (const float v : values) out.push_back(to<T>(v));
  return out;
}

struct Experts {
  Experts(const flexq::Stream& stream, const flexq_experts_desc& d, std::mt19937& rng) : desc(d) {
    for (const flexq_projection p : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      const bool up = p == FLEXQ_GATE_UP;
      const flexq_projection_format& format = up ? d.gate_up : d.down;
      const flexq::WeightDesc single(up ? 2 * d.intermediate : d.hidden, up ? d.hidden : d.intermediate, format.scheme,
                                     format.rotation, format.weight_bits);
      size_t bytes = 0;
      flexq::check(flexq_experts_prepack_size(&stream, &desc, p, &bytes));
      packed[p].reserve(bytes);
      std::memset(packed[p].data(), 0, bytes);  // its padding too, as tests compare all of it
      for (int64_t e = 0; e < d.experts; ++e) {
        const std::vector<float> w = random_values(sz(single.n * single.k), rng);
        weights[p].push_back(flexq::Weight::quantize(stream, single, w.data()));
        const flexq::Weight& weight = weights[p].back();
        planes[p].insert(planes[p].end(), weight.planes().begin(), weight.planes().end());
        scales[p].insert(scales[p].end(), weight.scales().begin(), weight.scales().end());
        single_packed[p].emplace_back();
        size_t of_one = 0;
        flexq::check(flexq_prepack_size(&stream, &single, &of_one));
        single_packed[p].back().reserve(of_one);
        flexq::check(flexq_prepack(&stream, &single, weight.planes().data(), weight.scales().data(),
                                   single_packed[p].back().data(), of_one));
      }
      flexq::check(flexq_experts_prepack(&stream, &desc, p, 0, d.experts, planes[p].data(), scales[p].data(),
                                         packed[p].data(), bytes));
      bias[p] = random_values(sz(d.experts * single.n), rng);
    }
  }

  flexq_experts_desc desc;
  std::vector<flexq::Weight> weights[2];
  std::vector<flexq::Buffer> single_packed[2];
  std::vector<uint8_t> planes[2];
  std::vector<uint16_t> scales[2];
  flexq::Buffer packed[2];
  std::vector<float> bias[2];
};

struct Routing : flexq_routing {
  Routing(int64_t tokens, int64_t k)
      : flexq_routing(FLEXQ_ROUTING_INIT), chosen(sz(tokens * k)), scores(sz(tokens * k)) {
    m = tokens;
    top_k = k;
    ids = chosen.data();
    weights = scores.data();
  }
  Routing(const Routing&) = delete;
  Routing& operator=(const Routing&) = delete;
  std::vector<int32_t> chosen;
  std::vector<float> scores;
};

void randomize(Routing& r, int64_t experts, std::mt19937& rng) {
  for (int32_t& id : r.chosen) id = static_cast<int32_t>(rng() % static_cast<uint32_t>(experts));
  for (float& s : r.scores) s = static_cast<float>(rng() % 1000) / 500.0f - 0.5f;
}

float gate_value(const flexq_experts_desc& d, float g) {
  if (d.function == FLEXQ_GATE_GELU) return 0.5f * g * (1.0f + std::erf(g * 0.70710678118654752f));
  if (d.function == FLEXQ_GATE_GELU_TANH) {
    return 0.5f * g * (1.0f + std::tanh(0.79788456080286536f * (g + 0.044715f * g * g * g)));
  }
  return g / (1.0f + std::exp(-d.alpha * g));
}

// One token by public single-layer calls; `experts` of -1 are skipped.
template <typename T>
std::vector<float> by_linears(const flexq::Stream& stream, const Experts& layer, const T* x, const int32_t* experts,
                              const float* scores, int64_t top_k, bool bias) {
  const flexq_experts_desc& d = layer.desc;
  const int64_t h = d.hidden, i = d.intermediate;
  std::vector<float> sums(sz(h), 0.0f), product(sz(h));
  std::vector<T> u(sz(2 * i)), gate(sz(i)), up(sz(i)), hidden(sz(i));
  for (int64_t j = 0; j < top_k; ++j) {
    if (experts[j] < 0) continue;
    const auto e = static_cast<size_t>(experts[j]);
    const auto& first = layer.weights[FLEXQ_GATE_UP][e].desc();
    const auto& second = layer.weights[FLEXQ_DOWN][e].desc();
    size_t bytes = 0;
    flexq::check(flexq_linear_workspace_size(&stream, &first, d.gate_up.act_bits, 1, &bytes));
    flexq::Buffer workspace(bytes);
    const float* b = bias ? layer.bias[FLEXQ_GATE_UP].data() + e * sz(2 * i) : nullptr;
    const flexq::Buffer& w1 = layer.single_packed[FLEXQ_GATE_UP][e];
    flexq::check(flexq_linear(&stream, &first, w1.data(), w1.size(), d.gate_up.act_bits, 1, x, flexq::dtype_of<T>(), h,
                              b, FLEXQ_F32, u.data(), flexq::dtype_of<T>(), 2 * i, workspace.data(), workspace.size()));
    const bool interleaved = d.layout == FLEXQ_GATE_UP_INTERLEAVED;
    for (int64_t at = 0; at < i; ++at) {
      gate[sz(at)] = u[sz(interleaved ? 2 * at : at)];
      up[sz(at)] = u[sz(interleaved ? 2 * at + 1 : i + at)];
    }
    const flexq::ActivationDesc act(1, i, d.down.act_bits, d.down.scheme, d.down.rotation);
    flexq::check(flexq_activation_size(&stream, &act, &bytes));
    flexq::Buffer quantized(bytes);
    if (d.function == FLEXQ_GATE_SILU && d.alpha == 1.0f && d.limit == 0.0f && d.up_offset == 0.0f) {
      flexq::check(flexq_silu_mul_quantize(&stream, &act, gate.data(), i, up.data(), i, flexq::dtype_of<T>(),
                                           quantized.data(), bytes));
    } else {
      for (size_t at = 0; at < sz(i); ++at) {
        float g = from(gate[at]), v = from(up[at]);
        if (d.limit > 0.0f) g = std::min(g, d.limit), v = std::clamp(v, -d.limit, d.limit);
        hidden[at] = to<T>(from(to<T>(gate_value(d, g))) * from(to<T>(v + d.up_offset)));
      }
      flexq::check(
          flexq_quantize_activation(&stream, &act, hidden.data(), flexq::dtype_of<T>(), i, quantized.data(), bytes));
    }
    const flexq::Buffer& w2 = layer.single_packed[FLEXQ_DOWN][e];
    b = bias ? layer.bias[FLEXQ_DOWN].data() + e * sz(h) : nullptr;
    flexq::check(flexq_gemm(&stream, &second, w2.data(), w2.size(), &act, quantized.data(), bytes, b, FLEXQ_F32,
                            product.data(), FLEXQ_F32, h, nullptr, 0));
    for (size_t at = 0; at < sz(h); ++at) sums[at] += scores[j] * product[at];
  }
  return sums;
}

template <typename T>
std::vector<T> forward(const flexq::Stream& stream, const Experts& layer, const flexq_routing& routing,
                       const std::vector<T>& x, int64_t ldx, bool bias, int64_t ldy) {
  const flexq_dtype dtype = flexq::dtype_of<T>();
  size_t bytes = 0;
  flexq::check(flexq_experts_workspace_size(&stream, &layer.desc, routing.m, routing.top_k, dtype, &bytes));
  flexq::Buffer workspace(bytes);
  if (bytes > 0) std::memset(workspace.data(), 0xff, bytes);  // it may hold anything
  std::vector<T> y(sz(routing.m * ldy), to<T>(kUntouched));
  flexq::check(flexq_experts_forward(
      &stream, &layer.desc, layer.packed[FLEXQ_GATE_UP].data(), layer.packed[FLEXQ_GATE_UP].size(),
      layer.packed[FLEXQ_DOWN].data(), layer.packed[FLEXQ_DOWN].size(), &routing, x.data(), dtype, ldx,
      bias ? layer.bias[FLEXQ_GATE_UP].data() : nullptr, bias ? layer.bias[FLEXQ_DOWN].data() : nullptr, FLEXQ_F32,
      y.data(), dtype, ldy, workspace.data(), bytes));
  return y;
}

template <typename T>
void check_layer(const flexq::Stream& stream, const Experts& layer, const Routing& routing,
                 const std::vector<int32_t>& local, bool bias, std::mt19937& rng) {
  const int64_t h = layer.desc.hidden, ldx = h + 3, ldy = h + 5;
  const std::vector<T> x = converted<T>(random_values(sz(std::max<int64_t>(routing.m, 1) * ldx), rng));
  const std::vector<T> y = forward(stream, layer, routing, x, ldx, bias, ldy);
  for (int64_t t = 0; t < routing.m; ++t) {
    const std::vector<float> expected = by_linears(stream, layer, x.data() + t * ldx, local.data() + t * routing.top_k,
                                                   routing.scores.data() + t * routing.top_k, routing.top_k, bias);
    for (int64_t i = 0; i < ldy; ++i) {
      const float wanted = i < h ? from(to<T>(expected[sz(i)])) : from(to<T>(kUntouched));
      CHECK(from(y[sz(t * ldy + i)]) == wanted);
    }
  }
}

flexq_experts_desc desc_of(int64_t experts, int64_t hidden, int64_t intermediate) {
  flexq_experts_desc desc = FLEXQ_EXPERTS_DESC_INIT;
  desc.experts = experts;
  desc.hidden = hidden;
  desc.intermediate = intermediate;
  return desc;
}

void test_equals_linears(const flexq::Stream& stream) {
  std::mt19937 rng(1);
  for (const auto& [experts, hidden, intermediate] : {std::tuple{1, 100, 96}, {3, 576, 200}, {128, 100, 24}}) {
    flexq_experts_desc desc = desc_of(experts, hidden, intermediate);
    for (const int round : {0, 1, 2, 3}) {
      if (experts == 128 && round % 3 != 0) continue;
      desc.gate_up = {6, round % 2 ? FLEXQ_SCHEME_CHANNEL : FLEXQ_SCHEME_GROUP,
                      round / 2 ? FLEXQ_ROTATION_NONE : FLEXQ_ROTATION_HADAMARD128, round % 2 ? 6 : 8};
      desc.down = {6, round / 2 ? FLEXQ_SCHEME_CHANNEL : FLEXQ_SCHEME_GROUP,
                   round % 2 ? FLEXQ_ROTATION_NONE : FLEXQ_ROTATION_HADAMARD128, round / 2 ? 6 : 8};
      desc.layout = round % 2 ? FLEXQ_GATE_UP_INTERLEAVED : FLEXQ_GATE_UP_CONCATENATED;
      desc.function = round == 3 ? FLEXQ_GATE_SILU : static_cast<flexq_gate_function>(round);
      desc.alpha = round == 3 ? 1.702f : 1.0f;
      desc.limit = round == 3 ? 7.0f : 0.0f;
      desc.up_offset = round == 3 ? 1.0f : 0.0f;
      const Experts layer(stream, desc, rng);
      for (const int64_t top_k : {1, 2, 8}) {
        for (const int64_t m : {0, 1, 7, 24}) {
          Routing routing(m, top_k);
          randomize(routing, experts, rng);
          if (m == 7) std::fill(routing.chosen.begin(), routing.chosen.end(), experts / 2);  // all to one expert
          if (rng() % 2) {
            check_layer<float>(stream, layer, routing, routing.chosen, round > 1, rng);
          } else {
            check_layer<flexq::bfloat16_t>(stream, layer, routing, routing.chosen, round > 1, rng);
          }
        }
      }
    }
  }
}

// Of 6 experts everywhere, 3 are here.
void test_expert_map(const flexq::Stream& stream) {
  std::mt19937 rng(2);
  const Experts layer(stream, desc_of(3, 100, 96), rng);
  const std::vector<int32_t> map{-1, 2, -1, 0, 1, -1};
  for (const int64_t m : {1, 20}) {
    Routing routing(m, 2);
    randomize(routing, 6, rng);
    std::fill(routing.chosen.end() - 2, routing.chosen.end(), 5);  // a token with none here
    routing.expert_map = map.data();
    routing.map_size = 6;
    std::vector<int32_t> local;
    for (const int32_t id : routing.chosen) local.push_back(map[sz(id)]);
    check_layer<float>(stream, layer, routing, local, true, rng);

    // int64 ids and 16-bit weights say the same.
    const std::vector<float> x = random_values(sz(m * 100), rng);
    const std::vector<float> y = forward(stream, layer, routing, x, 100, false, 100);
    const std::vector<int64_t> wide(routing.chosen.begin(), routing.chosen.end());
    const std::vector<flexq::bfloat16_t> narrow = converted<flexq::bfloat16_t>(routing.scores);
    for (size_t i = 0; i < narrow.size(); ++i) routing.scores[i] = from(narrow[i]);
    const std::vector<float> expected = forward(stream, layer, routing, x, 100, false, 100);
    routing.ids = wide.data();
    routing.ids_type = FLEXQ_I64;
    routing.weights = narrow.data();
    routing.weights_dtype = FLEXQ_BF16;
    CHECK(forward(stream, layer, routing, x, 100, false, 100) == expected);
  }
}

// More pairs than are worked on at once, in one call as one by one; y in the place of x.
void test_many_tokens(const flexq::Stream& stream) {
  std::mt19937 rng(3);
  const Experts layer(stream, desc_of(4, 64, 40), rng);
  Routing routing(2200, 8);
  randomize(routing, 4, rng);
  std::vector<float> x = random_values(2200 * 64, rng);
  const std::vector<float> y = forward(stream, layer, routing, x, 64, true, 64);
  for (const int64_t t : {0, 2047, 2048, 2199}) {
    const std::vector<float> expected = by_linears(stream, layer, x.data() + t * 64, routing.chosen.data() + t * 8,
                                                   routing.scores.data() + t * 8, 8, true);
    CHECK(std::equal(expected.begin(), expected.end(), y.begin() + t * 64));
  }
  size_t bytes = 0;
  flexq::check(flexq_experts_workspace_size(&stream, &layer.desc, 2200, 8, FLEXQ_F32, &bytes));
  flexq::Buffer workspace(bytes);
  flexq::check(flexq_experts_forward(&stream, &layer.desc, layer.packed[0].data(), layer.packed[0].size(),
                                     layer.packed[1].data(), layer.packed[1].size(), &routing, x.data(), FLEXQ_F32, 64,
                                     layer.bias[0].data(), layer.bias[1].data(), FLEXQ_F32, x.data(), FLEXQ_F32, 64,
                                     workspace.data(), bytes));
  CHECK(x == y);
}

void test_not_finite(const flexq::Stream& stream) {
  std::mt19937 rng(4);
  flexq_experts_desc desc = desc_of(3, 100, 96);
  desc.limit = 7.0f;
  const Experts layer(stream, desc, rng);
  Routing routing(5, 2);
  randomize(routing, 3, rng);
  std::vector<float> x = random_values(5 * 100, rng);
  x[1 * 100 + 99] = std::numeric_limits<float>::quiet_NaN();
  x[3 * 100] = -INFINITY;
  const std::vector<float> y = forward(stream, layer, routing, x, 100, true, 100);
  for (size_t i = 0; i < y.size(); ++i) CHECK(std::isnan(y[i]) == (i / 100 == 1 || i / 100 == 3));
}

// Router weights on the input: as scaling what gate_up gives before its bias.
void test_weights_on_input(const flexq::Stream& stream) {
  std::mt19937 rng(5);
  const Experts layer(stream, desc_of(3, 100, 96), rng);
  Routing routing(6, 1);
  randomize(routing, 3, rng);
  for (float& s : routing.scores) s = 0.5f;  // a power of two scales everything exactly
  routing.weights_on_input = 1;
  const std::vector<float> x = random_values(6 * 100, rng);
  std::vector<float> half = x;
  for (float& v : half) v *= 0.5f;
  const std::vector<float> y = forward(stream, layer, routing, x, 100, true, 100);
  routing.weights_on_input = 0;
  for (float& s : routing.scores) s = 1.0f;
  CHECK(forward(stream, layer, routing, half, 100, true, 100) == y);
}

// Experts filled one by one, in any order; the rest stays as it was. And back without loss.
void test_prepack_ranges(const flexq::Stream& stream) {
  std::mt19937 rng(6);
  const Experts layer(stream, desc_of(5, 200, 24), rng);
  for (const flexq_projection p : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
    const size_t bytes = layer.packed[p].size();
    const size_t planes = layer.planes[p].size() / 5, scales = layer.scales[p].size() / 5;
    flexq::Buffer packed(bytes);
    std::memset(packed.data(), 0, bytes);
    for (const auto& [first, count] : {std::pair{3, 2}, {0, 0}, {1, 2}, {0, 1}}) {
      flexq::check(flexq_experts_prepack(&stream, &layer.desc, p, first, count,
                                         layer.planes[p].data() + sz(first) * planes,
                                         layer.scales[p].data() + sz(first) * scales, packed.data(), bytes));
    }
    CHECK(std::memcmp(packed.data(), layer.packed[p].data(), bytes) == 0);
    std::vector<uint8_t> back_planes(2 * planes);
    std::vector<uint16_t> back_scales(2 * scales);
    flexq::check(flexq_experts_unprepack(&stream, &layer.desc, p, 2, 2, packed.data(), bytes, back_planes.data(),
                                         back_scales.data()));
    CHECK(
        std::equal(back_planes.begin(), back_planes.end(), layer.planes[p].begin() + static_cast<int64_t>(2 * planes)));
    CHECK(
        std::equal(back_scales.begin(), back_scales.end(), layer.scales[p].begin() + static_cast<int64_t>(2 * scales)));
  }
}

// The same through flexq.hpp.
void test_cpp_face(const flexq::Stream& stream) {
  std::mt19937 rng(8);
  const flexq::ExpertsDesc desc(3, 100, 96);
  const Experts layer(stream, desc, rng);
  flexq::Experts experts(stream, desc);
  for (const int64_t e : {2, 0, 1}) experts.set(stream, e, layer.weights[0][sz(e)], layer.weights[1][sz(e)]);
  Routing routing(7, 2);
  randomize(routing, 3, rng);
  const std::vector<float> x = random_values(700, rng);
  std::vector<float> y(700);
  experts(stream, flexq::Routing(7, 2, routing.chosen.data(), routing.scores.data()), x.data(), y.data(),
          layer.bias[0].data(), layer.bias[1].data());
  CHECK(y == forward(stream, layer, routing, x, 100, true, 100));
  try {
    experts.set(stream, 0, layer.weights[1][0], layer.weights[0][0]);
    CHECK(false);
  } catch (const flexq::Exception& e) {
    CHECK(e.status() == FLEXQ_INVALID_ARGUMENT);
  }
}

struct Call {
  explicit Call(const flexq::Stream& s) : stream(s), rng(7), layer(s, desc_of(3, 100, 96), rng), desc(layer.desc) {
    randomize(routing, 3, rng);
    flexq::check(flexq_experts_workspace_size(&stream, &desc, 2, 2, FLEXQ_F32, &workspace_bytes));
    workspace.reserve(workspace_bytes);
  }
  flexq_status operator()() {
    return flexq_experts_forward(&stream, &desc, layer.packed[0].data(), gate_up_bytes, layer.packed[1].data(),
                                 layer.packed[1].size(), &routing, x.data(), FLEXQ_F32, ldx, nullptr, bias, bias_dtype,
                                 y.data(), FLEXQ_F32, 100, workspace.data(), workspace_bytes);
  }
  flexq::Stream stream;
  std::mt19937 rng;
  Experts layer;
  flexq_experts_desc desc;
  Routing routing{2, 2};
  std::vector<float> x = std::vector<float>(200, 1.0f), y = std::vector<float>(200, 7.0f);
  flexq::Buffer workspace;
  size_t workspace_bytes = 0, gate_up_bytes = layer.packed[0].size();
  int64_t ldx = 100;
  const void* bias = nullptr;
  flexq_dtype bias_dtype = FLEXQ_F32;
  std::vector<int32_t> map{0, -1, 2, 1};
};

void refuses(flexq_status expected, const std::string& message, const std::function<void(Call&)>& spoil) {
  Call call(flexq::Stream::cpu());
  CHECK(call() == FLEXQ_OK);
  std::fill(call.y.begin(), call.y.end(), 7.0f);
  spoil(call);
  const flexq_status status = call();
  if (status != expected || std::strstr(flexq_last_error(), message.c_str()) == nullptr) {
    std::fprintf(stderr, "expected status %d with '%s', got %d with '%s'\n", expected, message.c_str(), status,
                 flexq_last_error());
    std::exit(1);
  }
  for (const float v : call.y) CHECK(v == 7.0f);
}

void test_refuses() {
  constexpr auto kInvalid = FLEXQ_INVALID_ARGUMENT;
  const auto use_map = [](Call& c) {
    c.routing.expert_map = c.map.data();
    c.routing.map_size = 4;
  };
  refuses(kInvalid, "ids[1][0] is 3; accepted are 0 to 2", [](Call& c) { c.routing.chosen[2] = 3; });
  refuses(kInvalid, "ids[0][1] is -1; accepted are 0 to 2", [](Call& c) { c.routing.chosen[1] = -1; });
  refuses(kInvalid, "ids[0][1] is 4; accepted are 0 to 3, the entries of expert_map", [&](Call& c) {
    use_map(c);
    c.routing.chosen[1] = 4;
  });
  refuses(kInvalid, "expert_map[2] is 3; accepted are 0 to 2, the experts that are here, and -1", [&](Call& c) {
    use_map(c);
    c.map[2] = 3;
  });
  refuses(kInvalid, "expert_map and map_size go together", [](Call& c) { c.routing.map_size = 4; });
  refuses(kInvalid, "top_k must be 1 to 65536, got 0", [](Call& c) { c.routing.top_k = 0; });
  refuses(kInvalid, "m must be 0 or more, got -1", [](Call& c) { c.routing.m = -1; });
  refuses(kInvalid, "m * top_k * the larger of", [](Call& c) { c.routing.m = INT64_MAX / 2; });
  refuses(kInvalid, "ids must not be null", [](Call& c) { c.routing.ids = nullptr; });
  refuses(kInvalid, "weights must not be null", [](Call& c) { c.routing.weights = nullptr; });
  refuses(kInvalid, "ids_type must be 0 (int32) or 1 (int64), got 2", [](Call& c) { c.routing.ids_type = 2; });
  refuses(kInvalid, "weights_dtype must be", [](Call& c) { c.routing.weights_dtype = 9; });
  refuses(kInvalid, "weights_on_input must be 0 or 1, got 2", [](Call& c) { c.routing.weights_on_input = 2; });
  refuses(FLEXQ_UNSUPPORTED, "routing.reserved must be 0", [](Call& c) { c.routing.reserved = 2; });
  refuses(kInvalid, "routing.struct_size must be", [](Call& c) { c.routing.struct_size = 0; });
  refuses(kInvalid, "workspace must have at least", [](Call& c) { c.workspace_bytes -= 1; });
  refuses(kInvalid, "gate_up must have at least", [](Call& c) { c.gate_up_bytes -= 1; });
  refuses(kInvalid, "ldx must be at least the row length 100, got 99", [](Call& c) { c.ldx = 99; });
  refuses(kInvalid, "bias_dtype must be", [](Call& c) {
    c.bias = c.x.data();
    c.bias_dtype = 5;
  });
  refuses(kInvalid, "experts must be 1 or more, got 0", [](Call& c) { c.desc.experts = 0; });
  refuses(kInvalid, "hidden must be 1 or more, got -5", [](Call& c) { c.desc.hidden = -5; });
  refuses(kInvalid, "intermediate must be at most 2^39", [](Call& c) { c.desc.intermediate = INT64_MAX; });
  refuses(kInvalid, "experts * 2 * intermediate * hidden is too large",
          [](Call& c) { c.desc.experts = c.desc.hidden = int64_t{1} << 38; });
  refuses(kInvalid, "down.scheme must be 0 (group) or 1 (channel), got 3", [](Call& c) { c.desc.down.scheme = 3; });
  refuses(kInvalid, "rotation must be", [](Call& c) { c.desc.gate_up.rotation = 3; });
  refuses(FLEXQ_UNSUPPORTED, "down.act_bits must be 6 or 8, got 4", [](Call& c) { c.desc.down.act_bits = 4; });
  refuses(FLEXQ_UNSUPPORTED, "gate_up.weight_bits must be 4, 5, 6 or 8, got 3",
          [](Call& c) { c.desc.gate_up.weight_bits = 3; });
  refuses(kInvalid, "layout must be 0 (concatenated) or 1 (interleaved), got 2", [](Call& c) { c.desc.layout = 2; });
  refuses(kInvalid, "function must be 0 (silu), 1 (gelu) or 2 (gelu_tanh), got 3",
          [](Call& c) { c.desc.function = 3; });
  refuses(kInvalid, "limit must be 0 (none) or more, got -1", [](Call& c) { c.desc.limit = -1.0f; });
  refuses(kInvalid, "alpha must be finite", [](Call& c) { c.desc.alpha = INFINITY; });
  refuses(kInvalid, "desc.struct_size must be", [](Call& c) { c.desc.struct_size += 8192; });

  Call call(flexq::Stream::cpu());
  Experts& layer = call.layer;
  const auto prepack = [&](flexq_projection p, int64_t first, int64_t count) {
    return flexq_experts_prepack(&call.stream, &call.desc, p, first, count, layer.planes[0].data(),
                                 layer.scales[0].data(), layer.packed[0].data(), layer.packed[0].size());
  };
  CHECK(prepack(FLEXQ_GATE_UP, 2, 2) == FLEXQ_INVALID_ARGUMENT);
  CHECK(std::strstr(flexq_last_error(), "among the 3 there are, got first 2, count 2") != nullptr);
  CHECK(prepack(2, 0, 1) == FLEXQ_INVALID_ARGUMENT);
  CHECK(std::strstr(flexq_last_error(), "projection must be 0 (gate_up) or 1 (down), got 2") != nullptr);
  layer.scales[0][1 * 192 + 17] = 0x7e00;
  std::memset(layer.packed[0].data(), 0x5a, layer.packed[0].size());
  CHECK(prepack(FLEXQ_GATE_UP, 0, 3) == FLEXQ_BAD_VALUE);
  CHECK(std::strstr(flexq_last_error(), "the scale of expert 1, row 17, group 0 is nan") != nullptr);
  for (size_t i = 0; i < layer.packed[0].size(); ++i) CHECK(layer.packed[0].data()[i] == 0x5a);
}

}  // namespace

int main() {
  if (test::isa_is_missing()) return test::kSkipped;
  const flexq::ThreadPool pool(3);
  for (const flexq::Stream& stream : {flexq::Stream::cpu(), flexq::Stream::cpu(pool)}) {
    test_equals_linears(stream);
    test_expert_map(stream);
    test_many_tokens(stream);
    test_not_finite(stream);
    test_weights_on_input(stream);
    test_prepack_ranges(stream);
    test_cpp_face(stream);
  }
  test_refuses();
  return 0;
}
