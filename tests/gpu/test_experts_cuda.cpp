// Mixture-of-experts layers on CUDA: each kernel by itself, with exact results where there are such, then whole layers
// against the CPU backend. Exits with 77 (skipped) where there is no GPU.
#include <cstdarg>
#include <functional>
#include <set>

#include "cuda/dispatch.h"
#include "cuda/experts/forward.h"
#include "cuda/layout.h"
#include "device.h"

namespace {

using flexq::cuda::Device;
using flexq::cuda::GemmPlan;
using flexq::cuda::experts::ExpertTile;
using flexq::cuda::experts::Place;
using test::as_bytes;
using test::cuda_check;
using test::DeviceArray;
using test::Gpu;
using test::half_to_float;
using test::random_values;
using test::value_at;
namespace kernels = flexq::cuda::experts;

size_t sz(int64_t n) { return static_cast<size_t>(n); }
size_t element_of(flexq_dtype dtype) { return dtype == FLEXQ_F32 ? 4 : 2; }
const char* name_of(flexq_scheme scheme) { return scheme == FLEXQ_SCHEME_GROUP ? "group" : "channel"; }

// What is being tested, for messages.
std::string where;

[[gnu::format(printf, 2, 3)]] void expect(bool holds, const char* format, ...) {
  if (holds) return;
  std::fprintf(stderr, "%s: ", where.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::exit(1);
}

template <typename... Args>
void now(const char* format, Args... args) {
  char text[256];
  std::snprintf(text, sizeof text, format, args...);
  where = text;
}

std::vector<flexq_kernel_info> kernels_for(const flexq_stream& stream, flexq_scheme scheme, int64_t m) {
  const flexq::WeightDesc desc(4096, 4096, scheme);
  int32_t count = 0;
  flexq::check(flexq_gemm_kernels(&stream, &desc, 8, m, nullptr, 0, &count));
  std::vector<flexq_kernel_info> infos(sz(count), FLEXQ_KERNEL_INFO_INIT);
  flexq::check(flexq_gemm_kernels(&stream, &desc, 8, m, infos.data(), count, &count));
  return infos;
}

// As much of a device as launches ask for.
Device device_for(const Gpu& gpu) {
  Device device{};
  cuda_check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, 0));
  int major = 0;
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  device.has_sm90 = major >= 9;
  int shared = 0;
  cuda_check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  device.shared_per_cta = shared;
  for (const flexq_kernel_info& info : kernels_for(gpu.cuda, FLEXQ_SCHEME_GROUP, 128)) {
    device.has_wgmma = device.has_wgmma || std::strncmp(info.name, "wgmma", 5) == 0;
  }
  device.dram_bytes_per_us = 3e6;
  device.clocks_per_us = 1700;
  return device;
}

cudaStream_t handle_of(const Gpu& gpu) { return static_cast<cudaStream_t>(gpu.cuda.handle); }

// ---- Routing ----

struct Routed {
  int num_tiles = 0;
  std::vector<ExpertTile> tiles;
  std::vector<Place> places;
  std::vector<int32_t> pairs;  // of rows
};

int64_t most_tiles(int64_t experts, int64_t pairs, int tile) {
  const int64_t used = std::min(experts, pairs);
  return used + (pairs - used) / tile;
}

Routed host_route(const std::vector<int64_t>& ids, const std::vector<int32_t>& map, int64_t experts, int tile) {
  Routed out;
  out.places.assign(ids.size(), {-1, -1});
  int row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int first = row, first_tile = out.num_tiles;
    for (size_t p = 0; p < ids.size(); ++p) {
      const int64_t known = map.empty() ? experts : static_cast<int64_t>(map.size());
      if (ids[p] < 0 || ids[p] >= known) continue;
      if ((map.empty() ? ids[p] : map[sz(ids[p])]) != e) continue;
      out.places[p] = {first_tile * tile + row - first, row};
      out.pairs.push_back(static_cast<int32_t>(p));
      ++row;
    }
    for (int at = first; at < row; at += tile) {
      out.tiles.push_back({static_cast<int32_t>(e), std::min(tile, row - at), at, 0});
      ++out.num_tiles;
    }
  }
  return out;
}

struct DeviceRouted {
  DeviceRouted(const Gpu& gpu, const Device& device, const std::vector<int64_t>& ids, const std::vector<int32_t>& map,
               int64_t experts, int tile, bool wide = true)
      : tiles(sz(most_tiles(experts, static_cast<int64_t>(ids.size()), tile))), places(ids.size()), pairs(ids.size()) {
    const DeviceArray<int64_t> wide_ids(ids);
    const DeviceArray<int32_t> narrow_ids(std::vector<int32_t>(ids.begin(), ids.end())), device_map(map);
    const auto run = [&] {
      kernels::route(handle_of(gpu), device,
                     {.ids = {.ids = wide ? static_cast<const void*>(wide_ids.data()) : narrow_ids.data(),
                              .wide = wide,
                              .map = map.empty() ? nullptr : device_map.data(),
                              .known = map.empty() ? experts : static_cast<int64_t>(map.size()),
                              .experts = static_cast<int>(experts)},
                      .pairs = static_cast<int64_t>(ids.size()),
                      .tile_tokens = tile,
                      .max_tiles = static_cast<int64_t>(tiles.size()),
                      .to = routed()});
      cuda_check(cudaStreamSynchronize(handle_of(gpu)));
    };
    run();
  }
  kernels::Routed routed() const { return {num_tiles.data(), tiles.data(), places.data(), pairs.data()}; }
  kernels::ExpertTable table(int tile_tokens) const { return {num_tiles.data(), tiles.data(), tile_tokens, 0, 0}; }
  DeviceArray<int32_t> num_tiles{1};
  DeviceArray<ExpertTile> tiles;
  DeviceArray<Place> places;
  DeviceArray<int32_t> pairs;
};

void check_route(const Gpu& gpu, const Device& device, const std::vector<int64_t>& ids, const std::vector<int32_t>& map,
                 int64_t experts, int tile, bool wide) {
  const Routed expected = host_route(ids, map, experts, tile);
  const DeviceRouted got(gpu, device, ids, map, experts, tile, wide);
  const int num_tiles = got.num_tiles.host()[0];
  expect(num_tiles == expected.num_tiles, "%d tiles, not %d", num_tiles, expected.num_tiles);
  const std::vector<ExpertTile> tiles = got.tiles.host();
  for (size_t i = 0; i < expected.tiles.size(); ++i) {
    const ExpertTile &g = tiles[i], &e = expected.tiles[i];
    expect(g.expert == e.expert && g.tokens == e.tokens && g.row == e.row,
           "tile %zu is expert %d, %d tokens, row %d; not %d, %d, %d", i, g.expert, g.tokens, g.row, e.expert, e.tokens,
           e.row);
  }
  for (size_t i = expected.tiles.size(); i < tiles.size(); ++i) {
    expect(tiles[i].tokens == 0, "tile %zu, past the last, has %d tokens", i, tiles[i].tokens);
  }
  const std::vector<Place> places = got.places.host();
  for (size_t i = 0; i < places.size(); ++i) {
    expect(places[i].act == expected.places[i].act && places[i].row == expected.places[i].row,
           "pair %zu (id %lld) has place %d, row %d; not %d, %d", i, static_cast<long long>(ids[i]), places[i].act,
           places[i].row, expected.places[i].act, expected.places[i].row);
  }
  const std::vector<int32_t> pairs = got.pairs.host();
  for (size_t i = 0; i < expected.pairs.size(); ++i) {
    expect(pairs[i] == expected.pairs[i], "row %zu is of pair %d, not %d", i, pairs[i], expected.pairs[i]);
  }
}

void test_route(const Gpu& gpu, const Device& device) {
  std::mt19937 rng(1);
  for (const int64_t experts : {1, 3, 128, 300, 2000, 8192}) {
    for (const int64_t pairs : {1, 8, 14, 31, 33, 600, 5000, 65536}) {
      if (experts * pairs > 40'000'000) continue;  // the host's sort is a slow one
      for (const int tile : {8, 16, 128}) {
        for (const char* kind : {"any", "one", "bad"}) {
          now("route, %lld experts, %lld pairs, tiles of %d, ids %s", static_cast<long long>(experts),
              static_cast<long long>(pairs), tile, kind);
          std::vector<int64_t> ids(sz(pairs));
          for (int64_t& id : ids) id = static_cast<int64_t>(rng() % static_cast<uint64_t>(experts));
          if (kind[0] == 'o') std::fill(ids.begin(), ids.end(), experts / 2);
          if (kind[0] == 'b') {
            for (int64_t& id : ids) {
              if (rng() % 4 == 0) id = rng() % 2 ? experts : -1;
            }
          }
          check_route(gpu, device, ids, {}, experts, tile, rng() % 2);
        }
      }
    }
  }
  now("route with a map");
  const std::vector<int32_t> map{-1, 2, 7, 0, 1, -1, -5};  // 7 and -5 are bad
  for (const int64_t pairs : {1, 7, 100}) {
    std::vector<int64_t> ids(sz(pairs));
    for (int64_t& id : ids) id = static_cast<int64_t>(rng() % 10) - 1;
    check_route(gpu, device, ids, map, 3, 8, true);
  }
  now("route, ids of more than 32 bits");
  check_route(gpu, device, {int64_t{1} << 32, 1, INT64_MIN, INT64_MAX}, {}, 3, 8, true);
  now("route, none here");
  check_route(gpu, device, {-1, -1, 5}, {}, 3, 8, true);
}

// ---- Quantizers ----

struct Plain {
  std::vector<int8_t> codes;
  std::vector<float> scales;
};

Plain exported(const flexq_stream& stream, const flexq_activation_desc& act, const void* quantized, size_t bytes,
               bool on_device) {
  const int64_t groups = flexq::num_groups(act.k);
  Plain out{std::vector<int8_t>(sz(act.m * groups * flexq::kGroup)),
            std::vector<float>(sz(act.m * flexq::scales_per_token(act)))};
  if (!on_device) {
    flexq::check(flexq_activation_export(&stream, &act, quantized, bytes, out.codes.data(), out.scales.data()));
    return out;
  }
  const DeviceArray<int8_t> codes(out.codes.size());
  const DeviceArray<float> scales(out.scales.size());
  flexq::check(flexq_activation_export(&stream, &act, quantized, bytes, codes.data(), scales.data()));
  return {codes.host(), scales.host()};
}

Plain quantized_on_cpu(const Gpu& gpu, const flexq_activation_desc& act, const void* x, flexq_dtype dtype,
                       int64_t ldx) {
  size_t bytes = 0;
  flexq::check(flexq_activation_size(&gpu.cpu, &act, &bytes));
  const flexq::Buffer quantized(bytes);
  flexq::check(flexq_quantize_activation(&gpu.cpu, &act, x, dtype, ldx, quantized.data(), bytes));
  return exported(gpu.cpu, act, quantized.data(), bytes, false);
}

std::vector<int64_t> random_ids(size_t count, int64_t experts, std::mt19937& rng) {
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = rng() % 9 == 0 ? -1 : static_cast<int64_t>(rng() % static_cast<uint64_t>(experts));
  return ids;
}

void test_inputs(const Gpu& gpu, const Device& device) {
  std::mt19937 rng(2);
  for (const int64_t k : {100, 576, 3000, 20000}) {
    for (const int64_t tokens : {1, 37}) {
      for (int i = 0; i < 24; ++i) {
        const int64_t experts = 5, top_k = i % 3 + 1, pairs = tokens * top_k, ldx = k + (i % 2 ? 5 : 0);
        const int tile = i % 2 ? 8 : 16;
        const auto dtype = static_cast<flexq_dtype>(i % 3);
        flexq::ActivationDesc act(tokens, k, i % 4 < 2 ? 8 : 6, static_cast<flexq_scheme>(i / 3 % 2),
                                  static_cast<flexq_rotation>(rng() % 2));
        const bool on_input = i % 5 == 0;
        now("inputs, k %lld, %lld tokens, top %lld, %s, dtype %d, bits %d, rotation %d", static_cast<long long>(k),
            static_cast<long long>(tokens), static_cast<long long>(top_k), name_of(act.scheme), dtype, act.act_bits,
            act.rotation);
        const std::vector<uint8_t> x = as_bytes(random_values(sz(tokens * ldx), rng), dtype);
        const Plain expected = quantized_on_cpu(gpu, act, x.data(), dtype, ldx);
        const std::vector<int64_t> ids = random_ids(sz(pairs), experts, rng);
        const std::vector<float> weights = random_values(sz(pairs), rng);
        const DeviceRouted routed(gpu, device, ids, {}, experts, tile);
        const DeviceArray<uint8_t> device_x(x);
        const DeviceArray<float> device_weights(weights);
        const flexq_activation_desc act_of_tokens = act;
        act.m = most_tiles(experts, pairs, tile) * tile;
        size_t bytes = 0;
        flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
        const DeviceArray<uint8_t> quantized(bytes);
        const void* factors = on_input ? device_weights.data() : nullptr;
        if (i < 12) {
          kernels::quantize_inputs(handle_of(gpu), device,
                                   {.act = act,
                                    .quantized = quantized.data(),
                                    .x = device_x.data(),
                                    .dtype = dtype,
                                    .ldx = ldx,
                                    .tokens = tokens,
                                    .top_k = top_k,
                                    .places = routed.places.data(),
                                    .weights = factors,
                                    .weights_dtype = FLEXQ_F32});
        } else {
          size_t bytes_of_tokens = 0;
          flexq::check(flexq_activation_size(&gpu.cuda, &act_of_tokens, &bytes_of_tokens));
          const DeviceArray<uint8_t> of_tokens(bytes_of_tokens);
          flexq::check(flexq_quantize_activation(&gpu.cuda, &act_of_tokens, device_x.data(), dtype, ldx,
                                                 of_tokens.data(), bytes_of_tokens));
          kernels::gather(handle_of(gpu), device,
                          {.tokens = act_of_tokens,
                           .places = act,
                           .from = of_tokens.data(),
                           .to = quantized.data(),
                           .table = routed.table(tile),
                           .pairs = routed.pairs.data(),
                           .top_k = top_k,
                           .weights = factors,
                           .weights_dtype = FLEXQ_F32});
          cuda_check(cudaStreamSynchronize(handle_of(gpu)));
        }
        cuda_check(cudaStreamSynchronize(handle_of(gpu)));
        const Plain got = exported(gpu.cuda, act, quantized.data(), bytes, true);
        const std::vector<Place> places = routed.places.host();
        const int64_t kp = flexq::padded_k(k), scales = flexq::scales_per_token(act);
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const int64_t place = places[sz(pair)].act, token = pair / top_k;
          if (place < 0) continue;
          for (int64_t j = 0; j < kp; ++j) {
            const int g = got.codes[sz(place * kp + j)], e = expected.codes[sz(token * kp + j)];
            expect(g == e, "pair %lld at place %lld: code %lld is %d, not %d", static_cast<long long>(pair),
                   static_cast<long long>(place), static_cast<long long>(j), g, e);
          }
          for (int64_t j = 0; j < scales; ++j) {
            const float g = got.scales[sz(place * scales + j)];
            const float e = expected.scales[sz(token * scales + j)] * (on_input ? weights[sz(pair)] : 1.0f);
            expect(g == e, "pair %lld at place %lld: scale %lld is %.9g, not %.9g", static_cast<long long>(pair),
                   static_cast<long long>(place), static_cast<long long>(j), g, e);
          }
        }
      }
    }
  }
}

float gate_value(const flexq_experts_desc& d, float g) {
  if (d.function == FLEXQ_GATE_GELU) return 0.5f * g * (1.0f + std::erf(g * 0.70710678118654752f));
  if (d.function == FLEXQ_GATE_GELU_TANH) {
    return 0.5f * g * (1.0f + std::tanh(0.79788456080286536f * (g + 0.044715f * g * g * g)));
  }
  return g / (1.0f + std::exp(-d.alpha * g));
}

void set_activation(flexq_experts_desc& desc, int which) {
  desc.function = which < 3 ? which : FLEXQ_GATE_SILU;
  desc.alpha = which == 3 ? 1.702f : 1.0f;
  desc.limit = which == 3 ? 7.0f : 0.0f;
  desc.up_offset = which == 3 ? 1.0f : 0.0f;
}

void test_hidden(const Gpu& gpu, const Device& device) {
  std::mt19937 rng(3);
  for (const int64_t intermediate : {96, 100, 203, 2000, 17000}) {
    for (int i = 0; i < 48; ++i) {
      const int64_t pairs = i % 2 ? 5 : 50;
      const bool many = i >= 24;
      const int tile = many ? 16 : 8;
      flexq_experts_desc desc = FLEXQ_EXPERTS_DESC_INIT;
      desc.experts = 4;
      desc.hidden = 64;
      desc.intermediate = intermediate;
      desc.layout = i / 2 % 2 ? FLEXQ_GATE_UP_INTERLEAVED : FLEXQ_GATE_UP_CONCATENATED;
      set_activation(desc, i % 4);
      const auto dtype = static_cast<flexq_dtype>(i % 3);
      flexq::ActivationDesc act(pairs, intermediate, i / 4 % 2 ? 6 : 8, static_cast<flexq_scheme>(i / 3 % 2),
                                static_cast<flexq_rotation>(rng() % 2));
      now("hidden, I %lld, layout %d, activation %d, %s, dtype %d, bits %d, rotation %d, many %d",
          static_cast<long long>(intermediate), desc.layout, i % 4, name_of(act.scheme), dtype, act.act_bits,
          act.rotation, many);
      const std::vector<int64_t> ids = random_ids(sz(pairs), desc.experts, rng);
      const DeviceRouted routed(gpu, device, ids, {}, desc.experts, tile);
      const std::vector<uint8_t> u = as_bytes(random_values(sz(pairs * 2 * intermediate), rng), dtype);
      std::vector<float> h(sz(pairs * intermediate));
      const bool interleaved = desc.layout == FLEXQ_GATE_UP_INTERLEAVED;
      const auto rounded = [&](float v) { return value_at(as_bytes({v}, dtype), 0, dtype); };
      for (int64_t row = 0; row < pairs; ++row) {
        for (int64_t j = 0; j < intermediate; ++j) {
          const int64_t at = row * 2 * intermediate;
          float g = value_at(u, sz(at + (interleaved ? 2 * j : j)), dtype);
          float up = value_at(u, sz(at + (interleaved ? 2 * j + 1 : intermediate + j)), dtype);
          if (desc.limit > 0.0f) g = std::min(g, desc.limit), up = std::clamp(up, -desc.limit, desc.limit);
          h[sz(row * intermediate + j)] = rounded(gate_value(desc, g)) * rounded(up + desc.up_offset);
        }
      }
      const std::vector<uint8_t> h_bytes = as_bytes(h, dtype);
      const Plain expected = quantized_on_cpu(gpu, act, h_bytes.data(), dtype, intermediate);
      const DeviceArray<uint8_t> device_u(u);
      act.m = most_tiles(desc.experts, pairs, tile) * tile;
      size_t bytes = 0;
      flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
      const DeviceArray<uint8_t> quantized(bytes);
      (many ? kernels::quantize_hidden_tiles : kernels::quantize_hidden)(handle_of(gpu), device,
                                                                         {.desc = desc,
                                                                          .act = act,
                                                                          .quantized = quantized.data(),
                                                                          .u = device_u.data(),
                                                                          .dtype = dtype,
                                                                          .pairs = pairs,
                                                                          .places = routed.places.data(),
                                                                          .table = routed.table(tile)});
      cuda_check(cudaStreamSynchronize(handle_of(gpu)));
      const Plain got = exported(gpu.cuda, act, quantized.data(), bytes, true);
      const std::vector<Place> places = routed.places.host();
      const int64_t kp = flexq::padded_k(intermediate), scales = flexq::scales_per_token(act);
      int64_t different = 0, all = 0;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Place place = places[sz(pair)];
        if (place.act < 0) continue;
        for (int64_t j = 0; j < kp; ++j, ++all) {
          const int g = got.codes[sz(place.act * kp + j)], e = expected.codes[sz(place.row * kp + j)];
          expect(std::abs(g - e) <= (dtype == FLEXQ_F32 ? 1 : 2),
                 "pair %lld, row %d, place %d: code %lld is %d, not %d", static_cast<long long>(pair), place.row,
                 place.act, static_cast<long long>(j), g, e);
          different += g != e;
        }
        for (int64_t j = 0; j < scales; ++j) {
          const float g = got.scales[sz(place.act * scales + j)], e = expected.scales[sz(place.row * scales + j)];
          expect(std::abs(g - e) <= (dtype == FLEXQ_F32 ? 1e-5f : 1e-2f) * e,
                 "pair %lld, row %d, place %d: scale %lld is %.9g, not %.9g", static_cast<long long>(pair), place.row,
                 place.act, static_cast<long long>(j), g, e);
        }
      }
      expect(different <= all / (dtype == FLEXQ_F32 ? 500 : 20) + 2, "%lld of %lld codes differ",
             static_cast<long long>(different), static_cast<long long>(all));
    }
  }
}

// ---- GEMMs ----

// Every GEMM that experts have in a scheme.
std::vector<GemmPlan> plans_for(const Device& device, flexq_scheme scheme, int32_t weight_bits = 6) {
  std::vector<GemmPlan> plans;
  for (int i = 0; i < flexq::cuda::num_mma_configs(); ++i) {
    if (!kernels::has_experts_mma(device, i, weight_bits, scheme == FLEXQ_SCHEME_GROUP)) continue;
    const flexq::cuda::MmaShape shape = flexq::cuda::mma_shape(i);
    for (int blocks = shape.min_blocks; blocks <= shape.max_blocks; ++blocks) {
      plans.push_back({GemmPlan::kMma, i, 1, 1, blocks});
    }
  }
  for (int i = 0; device.has_wgmma && i < flexq::cuda::num_wgmma_configs(); ++i) {
    const flexq::cuda::WgmmaShape shape = flexq::cuda::wgmma_shape(i);
    if (!kernels::has_experts_wgmma(i) || !(scheme == FLEXQ_SCHEME_GROUP ? shape.group : shape.channel)) continue;
    for (const int multicast : {1, 2}) plans.push_back({GemmPlan::kWgmma, i, 1, multicast});
  }
  return plans;
}

int tile_tokens_of(const GemmPlan& plan) {
  return plan.family == GemmPlan::kMma ? flexq::cuda::mma_shape(plan.config).tokens
                                       : flexq::cuda::wgmma_shape(plan.config).tokens;
}

// Weights of E experts of both projections, prepacked for the CPU and for the GPU.
struct Experts {
  Experts(const Gpu& gpu, const flexq_experts_desc& d, std::mt19937& rng) : desc(d) {
    for (const flexq_projection p : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      const flexq_weight_desc w = flexq::weight_of_expert(d, p);
      const flexq::WeightDesc single(w.n, w.k, w.scheme, w.rotation, w.weight_bits);
      std::vector<uint8_t> planes;
      for (int64_t e = 0; e < d.experts; ++e) {
        std::vector<float> values = random_values(sz(w.n * w.k), rng);
        for (float& v : values) v /= std::sqrt(static_cast<float>(w.k));
        const flexq::Weight weight = flexq::Weight::quantize(gpu.cpu, single, values.data());
        planes.insert(planes.end(), weight.planes().begin(), weight.planes().end());
        scales[p].insert(scales[p].end(), weight.scales().begin(), weight.scales().end());
        std::vector<int8_t> of_one(sz(w.n * flexq::padded_k(w.k)));
        flexq::check(
            flexq_unpack_codes(&gpu.cpu, &single, weight.planes().data(), of_one.data(), flexq::padded_k(w.k)));
        codes[p].insert(codes[p].end(), of_one.begin(), of_one.end());
      }
      bias[p] = random_values(sz(d.experts * w.n), rng);
      size_t bytes = 0;
      flexq::check(flexq_experts_prepack_size(&gpu.cpu, &desc, p, &bytes));
      host[p].reserve(bytes);
      flexq::check(flexq_experts_prepack(&gpu.cpu, &desc, p, 0, d.experts, planes.data(), scales[p].data(),
                                         host[p].data(), bytes));
      flexq::check(flexq_experts_prepack_size(&gpu.cuda, &desc, p, &bytes));
      device[p] = std::make_unique<DeviceArray<uint8_t>>(bytes);
      device_bias[p] = std::make_unique<DeviceArray<float>>(bias[p]);
      const DeviceArray<uint8_t> device_planes(planes), planes_back(planes.size());
      const DeviceArray<uint16_t> device_scales(scales[p]), scales_back(scales[p].size());
      // In two parts, the last experts first.
      const int64_t middle = d.experts / 2;
      for (const auto& [first, count] : {std::pair{middle, d.experts - middle}, {int64_t{0}, middle}}) {
        flexq::check(flexq_experts_prepack(
            &gpu.cuda, &desc, p, first, count, device_planes.data() + planes.size() / sz(d.experts) * sz(first),
            device_scales.data() + scales[p].size() / sz(d.experts) * sz(first), device[p]->data(), bytes));
      }
      flexq::check(flexq_experts_unprepack(&gpu.cuda, &desc, p, 0, d.experts, device[p]->data(), bytes,
                                           planes_back.data(), scales_back.data()));
      cuda_check(cudaStreamSynchronize(handle_of(gpu)));
      CHECK(planes_back.host() == planes && scales_back.host() == scales[p]);
    }
  }

  flexq_experts_desc desc;
  std::vector<int8_t> codes[2];
  std::vector<uint16_t> scales[2];
  std::vector<float> bias[2];
  flexq::Buffer host[2];
  std::unique_ptr<DeviceArray<uint8_t>> device[2];
  std::unique_ptr<DeviceArray<float>> device_bias[2];
};

flexq_experts_desc desc_of(int64_t experts, int64_t hidden, int64_t intermediate) {
  flexq_experts_desc desc = FLEXQ_EXPERTS_DESC_INIT;
  desc.experts = experts;
  desc.hidden = hidden;
  desc.intermediate = intermediate;
  return desc;
}

void test_gemms(const Gpu& gpu, const Device& device) {
  std::mt19937 rng(4);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    for (const auto& [n, k, weight_bits] : {std::tuple<int64_t, int64_t, int32_t>{24, 100, 6},
                                            {402, 576, 6},
                                            {1000, 1500, 6},
                                            {402, 576, 4},
                                            {1000, 1500, 5},
                                            {402, 1500, 8},
                                            {130, 4100, 5}}) {
      flexq_experts_desc desc = desc_of(5, k, n / 2);
      desc.gate_up.scheme = scheme;
      desc.gate_up.weight_bits = weight_bits;
      const Experts layer(gpu, desc, rng);
      const int64_t stride = static_cast<int64_t>(layer.device[FLEXQ_GATE_UP]->size()) / desc.experts;
      int round = 0;
      for (const GemmPlan& plan : plans_for(device, scheme, weight_bits)) {
        const int tile = tile_tokens_of(plan);
        const auto dtype = static_cast<flexq_dtype>(round++ % 3);
        const bool bias = rng() % 2;
        now("gemm %s, %s, W%d, %lld x %lld, dtype %d, bias %d", flexq::cuda::name_of(plan).text, name_of(scheme),
            weight_bits, static_cast<long long>(n), static_cast<long long>(k), dtype, bias);
        // Experts of no pair, one, a full tile, a third more, and a little more than two.
        std::vector<int64_t> ids;
        const int counts[] = {tile, 0, 1, 2 * tile + 3, tile + tile * 3 / 8};
        for (int e = 0; e < 5; ++e) ids.insert(ids.end(), sz(counts[e]), e);
        ids.push_back(-1);
        std::shuffle(ids.begin(), ids.end(), rng);
        const auto pairs = static_cast<int64_t>(ids.size());
        const DeviceRouted routed(gpu, device, ids, {}, desc.experts, tile);
        const std::vector<Place> places = routed.places.host();
        const int64_t max_tiles = most_tiles(desc.experts, pairs, tile);

        const std::vector<float> x = random_values(sz(pairs * k), rng);
        flexq::ActivationDesc act(max_tiles * tile, k, 8, scheme, desc.gate_up.rotation);
        size_t bytes = 0;
        flexq::check(flexq_activation_size(&gpu.cuda, &act, &bytes));
        const DeviceArray<uint8_t> quantized(bytes);
        // Padding may hold anything, NaN among it.
        cuda_check(cudaMemset(quantized.data(), 0xff, bytes));
        cuda_check(cudaDeviceSynchronize());
        const DeviceArray<float> device_x(x);
        kernels::quantize_inputs(handle_of(gpu), device,
                                 {.act = act,
                                  .quantized = quantized.data(),
                                  .x = device_x.data(),
                                  .dtype = FLEXQ_F32,
                                  .ldx = k,
                                  .tokens = pairs,
                                  .top_k = 1,
                                  .places = routed.places.data(),
                                  .weights = nullptr,
                                  .weights_dtype = FLEXQ_F32});
        const Plain in = exported(gpu.cuda, act, quantized.data(), bytes, true);
        constexpr size_t kGuard = 4096;
        const size_t y_bytes = sz(pairs * n) * element_of(dtype);
        const DeviceArray<uint8_t> y(kGuard + y_bytes + kGuard);
        const kernels::ExpertsGemmArgs args{
            .gemm = {flexq::weight_of_expert(desc, FLEXQ_GATE_UP), layer.device[FLEXQ_GATE_UP]->data(), act,
                     quantized.data(), bias ? layer.device_bias[FLEXQ_GATE_UP]->data() : nullptr, FLEXQ_F32,
                     y.data() + kGuard, dtype, n, nullptr},
            .table = {routed.num_tiles.data(), routed.tiles.data(), tile, stride,
                      n * static_cast<int64_t>(sizeof(float))},
            .max_tiles = max_tiles,
            .read_once = true};
        (plan.family == GemmPlan::kMma ? kernels::gemm_mma : kernels::gemm_wgmma)(handle_of(gpu), device, args, plan);
        cuda_check(cudaStreamSynchronize(handle_of(gpu)));
        const std::vector<uint8_t> all = y.host();
        const std::vector<uint8_t> got(all.begin() + kGuard, all.end());
        const int64_t groups = flexq::num_groups(k), kp = flexq::padded_k(k);
        const int64_t row_scales = scheme == FLEXQ_SCHEME_GROUP ? groups : 1;
        int64_t rows = 0;
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const Place place = places[sz(pair)];
          if (place.row < 0) continue;
          ++rows;
          const int64_t e = ids[sz(pair)];
          const int64_t stride_of_features = tile >= 64 ? 3 : 1;  // to be done sooner
          for (int64_t j = pair % stride_of_features; j < n; j += stride_of_features) {
            const int64_t row = e * n + j;
            double sum = bias ? layer.bias[FLEXQ_GATE_UP][sz(row)] : 0.0, size = std::abs(sum);
            for (int64_t g = 0; g < groups; ++g) {
              int dot = 0;
              const int8_t* a = in.codes.data() + place.act * kp + g * flexq::kGroup;
              const int8_t* w = layer.codes[FLEXQ_GATE_UP].data() + row * kp + g * flexq::kGroup;
              for (int i = 0; i < flexq::kGroup; ++i) dot += a[i] * w[i];
              const double term = dot * static_cast<double>(in.scales[sz(place.act * row_scales + g % row_scales)]) *
                                  half_to_float(layer.scales[FLEXQ_GATE_UP][sz(row * row_scales + g % row_scales)]);
              sum += term;
              size += std::abs(term);
            }
            const float value = value_at(got, sz(place.row * n + j), dtype);
            const double ulp = dtype == FLEXQ_F32 ? 0 : std::abs(sum) / (dtype == FLEXQ_F16 ? 1024 : 128);
            expect(std::abs(value - sum) <= 1e-5 * size + ulp,
                   "pair %lld, place %d (tile %d), row %d, expert %lld, feature %lld: got %.9g, not %.9g",
                   static_cast<long long>(pair), place.act, place.act / tile, place.row, static_cast<long long>(e),
                   static_cast<long long>(j), value, sum);
          }
        }
        for (size_t i = 0; i < kGuard; ++i) {
          expect(all[i] == 0x5a, "byte %zu before y was written", kGuard - i);
        }
        for (size_t i = kGuard + sz(rows * n) * element_of(dtype); i < all.size(); ++i) {
          expect(all[i] == 0x5a, "byte %zu of y, past its %lld rows, was written", i - kGuard,
                 static_cast<long long>(rows));
        }
      }
    }
  }
}

// ---- The weighted sum ----

void test_combine(const Gpu& gpu, const Device& device) {
  std::mt19937 rng(5);
  for (const int64_t n : {100, 203, 2048}) {
    for (const int64_t top_k : {1, 2, 8}) {
      for (int i = 0; i < 6; ++i) {
        const int64_t tokens = 9, pairs = tokens * top_k, ldy = n + (i % 2 ? 5 : 0);
        const auto y_dtype = static_cast<flexq_dtype>(i % 3), weights_dtype = static_cast<flexq_dtype>((i + 1) % 3);
        const bool ones = i == 5;
        now("combine, n %lld, top %lld, dtype %d, ldy %lld, weights %d", static_cast<long long>(n),
            static_cast<long long>(top_k), y_dtype, static_cast<long long>(ldy), weights_dtype);
        const std::vector<int64_t> ids = random_ids(sz(pairs), 4, rng);
        const DeviceRouted routed(gpu, device, ids, {}, 4, 8);
        const std::vector<Place> places = routed.places.host();
        const auto products_dtype = static_cast<flexq_dtype>((i + 2) % 3);
        const std::vector<uint8_t> products = as_bytes(random_values(sz(pairs * n), rng), products_dtype);
        const std::vector<uint8_t> weights = as_bytes(random_values(sz(pairs), rng), weights_dtype);
        const DeviceArray<uint8_t> device_products(products), device_weights(weights),
            y(sz(tokens * ldy) * element_of(y_dtype));
        kernels::combine(handle_of(gpu), device,
                         {.tokens = tokens,
                          .top_k = top_k,
                          .n = n,
                          .places = routed.places.data(),
                          .products = device_products.data(),
                          .products_dtype = products_dtype,
                          .weights = ones ? nullptr : device_weights.data(),
                          .weights_dtype = weights_dtype,
                          .y = y.data(),
                          .y_dtype = y_dtype,
                          .ldy = ldy});
        cuda_check(cudaStreamSynchronize(handle_of(gpu)));
        const std::vector<uint8_t> got = y.host();
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t j = 0; j < n; ++j) {
            float sum = 0.0f;
            for (int64_t pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
              const int row = places[sz(pair)].row;
              if (row < 0) continue;
              const volatile float product =  // rounded before it is added
                  (ones ? 1.0f : value_at(weights, sz(pair), weights_dtype)) *
                  value_at(products, sz(row * n + j), products_dtype);
              sum += product;
            }
            const float value = value_at(got, sz(t * ldy + j), y_dtype);
            const float wanted = value_at(as_bytes({sum}, y_dtype), 0, y_dtype);
            expect(value == wanted, "token %lld, feature %lld: got %.9g, not %.9g", static_cast<long long>(t),
                   static_cast<long long>(j), value, wanted);
          }
          for (size_t b = sz(t * ldy + n) * element_of(y_dtype); b < sz((t + 1) * ldy) * element_of(y_dtype); ++b) {
            expect(got[b] == 0x5a, "token %lld: something was written between rows", static_cast<long long>(t));
          }
        }
      }
    }
  }
}

// ---- Whole layers ----

struct Call {
  int64_t m, top_k;
  std::vector<int64_t> ids;      // for the GPU
  std::vector<int64_t> cpu_ids;  // the same, with nothing that the CPU refuses; empty: ids
  std::vector<int32_t> map, cpu_map;
  std::vector<float> weights;
  flexq_dtype weights_dtype = FLEXQ_F32, dtype = FLEXQ_F32;
  bool wide = false, bias = false, on_input = false;
  int64_t pad = 0;
  std::vector<uint8_t> x;
  const char* kernel = nullptr;
};

Call random_call(int64_t m, int64_t top_k, int64_t hidden, int64_t experts, flexq_dtype dtype, int64_t pad,
                 std::mt19937& rng) {
  Call c;
  c.m = m;
  c.top_k = top_k;
  c.dtype = dtype;
  c.pad = pad;
  c.ids.resize(sz(m * top_k));
  for (int64_t& id : c.ids) id = static_cast<int64_t>(rng() % static_cast<uint64_t>(experts));
  for (size_t i = 0; i < c.ids.size(); ++i) c.weights.push_back(static_cast<float>(rng() % 64) / 32.0f - 0.5f);
  c.x = as_bytes(random_values(sz(m * (hidden + pad)), rng), dtype);
  return c;
}

flexq_routing routing_of(const Call& c, const void* ids, const void* weights, const int32_t* map, size_t map_size) {
  flexq_routing r = FLEXQ_ROUTING_INIT;
  r.m = c.m;
  r.top_k = c.top_k;
  r.ids = ids;
  r.weights = weights;
  r.weights_dtype = c.weights_dtype;
  r.expert_map = map_size == 0 ? nullptr : map;
  r.map_size = static_cast<int64_t>(map_size);
  r.weights_on_input = c.on_input;
  return r;
}

std::vector<uint8_t> on_cpu(const Gpu& gpu, const Experts& layer, const Call& c) {
  const int64_t ld = layer.desc.hidden + c.pad;
  const std::vector<uint8_t> weights = as_bytes(c.weights, c.weights_dtype);
  const std::vector<int64_t>& ids = c.cpu_ids.empty() ? c.ids : c.cpu_ids;
  const std::vector<int32_t>& map = c.cpu_map.empty() ? c.map : c.cpu_map;
  flexq_routing routing = routing_of(c, ids.data(), weights.data(), map.data(), map.size());
  routing.ids_type = FLEXQ_I64;
  size_t bytes = 0;
  flexq::check(flexq_experts_workspace_size(&gpu.cpu, &layer.desc, c.m, c.top_k, c.dtype, &bytes));
  const flexq::Buffer workspace(bytes);
  std::vector<uint8_t> y(sz(c.m * ld) * element_of(c.dtype), 0x5a);
  flexq::check(flexq_experts_forward(&gpu.cpu, &layer.desc, layer.host[0].data(), layer.host[0].size(),
                                     layer.host[1].data(), layer.host[1].size(), &routing, c.x.data(), c.dtype, ld,
                                     c.bias ? layer.bias[0].data() : nullptr, c.bias ? layer.bias[1].data() : nullptr,
                                     FLEXQ_F32, y.data(), c.dtype, ld, workspace.data(), bytes));
  return y;
}

// A call whose inputs and outputs stay where they are, for graphs.
struct DeviceCall {
  DeviceCall(const Gpu& gpu, const Experts& to, const Call& c, uint8_t fill = 0xff)
      : layer(to),
        call(c),
        stream(gpu.cuda),
        ids(sz(c.m * c.top_k) * (c.wide ? 8 : 4)),
        weights(sz(c.m * c.top_k) * element_of(c.weights_dtype)),
        map(c.map),
        x(c.x.size()),
        y(c.x.size()) {
    stream.kernel = c.kernel;
    flexq::check(flexq_experts_workspace_size(&stream, &to.desc, c.m, c.top_k, c.dtype, &workspace_bytes));
    workspace = std::make_unique<DeviceArray<uint8_t>>(workspace_bytes);
    cuda_check(cudaMemset(workspace->data(), fill, workspace_bytes));  // it may hold anything
    set(c);
  }

  // Another call of the same sizes.
  void set(const Call& c) {
    call = c;
    std::vector<uint8_t> id_bytes(ids.size());
    for (size_t i = 0; i < c.ids.size(); ++i) {
      const auto narrow = static_cast<int32_t>(c.ids[i]);
      if (c.wide) {
        std::memcpy(id_bytes.data() + 8 * i, &c.ids[i], 8);
      } else {
        std::memcpy(id_bytes.data() + 4 * i, &narrow, 4);
      }
    }
    upload(ids, id_bytes);
    upload(weights, as_bytes(c.weights, c.weights_dtype));
    upload(x, c.x);
    cuda_check(cudaMemset(y.data(), 0x5a, y.size()));
    cuda_check(cudaDeviceSynchronize());
  }

  void queue(void* out) const {
    const int64_t ld = layer.desc.hidden + call.pad;
    flexq_routing routing = routing_of(call, ids.data(), weights.data(), map.data(), map.size());
    routing.ids_type = call.wide ? FLEXQ_I64 : FLEXQ_I32;
    flexq::check(flexq_experts_forward(&stream, &layer.desc, layer.device[0]->data(), layer.device[0]->size(),
                                       layer.device[1]->data(), layer.device[1]->size(), &routing, x.data(), call.dtype,
                                       ld, call.bias ? layer.device_bias[0]->data() : nullptr,
                                       call.bias ? layer.device_bias[1]->data() : nullptr, FLEXQ_F32, out, call.dtype,
                                       ld, workspace->data(), workspace_bytes));
  }
  std::vector<uint8_t> run() const {
    queue(y.data());
    cuda_check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream.handle)));
    return y.host();
  }

  const Experts& layer;
  Call call;
  flexq_stream stream;
  DeviceArray<uint8_t> ids, weights;
  DeviceArray<int32_t> map;
  DeviceArray<uint8_t> x, y;
  std::unique_ptr<DeviceArray<uint8_t>> workspace;
  size_t workspace_bytes = 0;

 private:
  static void upload(const DeviceArray<uint8_t>& to, const std::vector<uint8_t>& bytes) {
    CHECK(to.size() == bytes.size());
    cuda_check(cudaMemcpy(to.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
  }
};

// h may get a neighbouring code where its value is between two, which moves a token a little: all tokens are near, and
// in fp32 nearly all as near as sums of fp32 are.
void check_near(const std::vector<uint8_t>& got, const std::vector<uint8_t>& expected, const Call& c, int64_t hidden) {
  const int64_t ld = hidden + c.pad;
  int64_t moved = 0;
  for (int64_t t = 0; t < c.m; ++t) {
    double error = 0, norm = 0, worst = 0;
    int64_t at = 0;
    for (int64_t j = 0; j < hidden; ++j) {
      const double g = value_at(got, sz(t * ld + j), c.dtype), e = value_at(expected, sz(t * ld + j), c.dtype);
      expect(std::isfinite(g), "token %lld, feature %lld is %g, not %g", static_cast<long long>(t),
             static_cast<long long>(j), g, e);
      error += (g - e) * (g - e);
      norm += e * e;
      if (std::abs(g - e) > worst) worst = std::abs(g - e), at = j;
    }
    error = std::sqrt(error), norm = std::sqrt(norm);
    expect(error <= 0.1 * norm + 1e-6, "token %lld: error %.3g, norm %.3g; worst feature %lld: got %.9g, not %.9g",
           static_cast<long long>(t), error, norm, static_cast<long long>(at), value_at(got, sz(t * ld + at), c.dtype),
           value_at(expected, sz(t * ld + at), c.dtype));
    moved += error > 2e-5 * norm + 1e-6;
    for (size_t b = sz(t * ld + hidden) * element_of(c.dtype); b < sz((t + 1) * ld) * element_of(c.dtype); ++b) {
      expect(got[b] == 0x5a, "token %lld: something was written between rows", static_cast<long long>(t));
    }
  }
  if (c.dtype == FLEXQ_F32) {
    expect(moved <= c.m / 2 + 1, "%lld of %lld tokens differ by more than fp32's sums", static_cast<long long>(moved),
           static_cast<long long>(c.m));
  }
}

void check_layer(const Gpu& gpu, const Experts& layer, const Call& c) {
  const DeviceCall call(gpu, layer, c), again(gpu, layer, c, 0x00);
  const std::vector<uint8_t> y = call.run();
  check_near(y, on_cpu(gpu, layer, c), c, layer.desc.hidden);
  const std::vector<uint8_t> second = call.run(), third = again.run();
  for (size_t i = 0; i < y.size(); ++i) {
    expect(y[i] == second[i] && y[i] == third[i], "byte %zu differs between runs (%zu of a row of %lld elements)", i,
           i % (sz(layer.desc.hidden + c.pad) * element_of(c.dtype)),
           static_cast<long long>(layer.desc.hidden + c.pad));
  }
}

void set_formats(flexq_experts_desc& desc, int round) {
  constexpr int32_t kUpBits[] = {6, 4, 5, 8}, kDownBits[] = {6, 8, 4, 5};
  desc.gate_up = {kUpBits[round], round % 2 ? FLEXQ_SCHEME_CHANNEL : FLEXQ_SCHEME_GROUP,
                  round / 2 % 2 ? FLEXQ_ROTATION_NONE : FLEXQ_ROTATION_HADAMARD128, round % 2 ? 6 : 8};
  desc.down = {kDownBits[round], round / 2 % 2 ? FLEXQ_SCHEME_CHANNEL : FLEXQ_SCHEME_GROUP,
               round % 2 ? FLEXQ_ROTATION_NONE : FLEXQ_ROTATION_HADAMARD128, round / 2 % 2 ? 6 : 8};
  desc.layout = round % 2 ? FLEXQ_GATE_UP_INTERLEAVED : FLEXQ_GATE_UP_CONCATENATED;
  set_activation(desc, round % 4);
}

void test_layers(const Gpu& gpu, bool quick) {
  std::mt19937 rng(6);
  for (const auto& [experts, hidden, intermediate] : {std::tuple{1, 100, 96}, {3, 576, 200}, {128, 100, 96}}) {
    for (const int round : {0, 1, 2, 3}) {
      flexq_experts_desc desc = desc_of(experts, hidden, intermediate);
      set_formats(desc, round);
      const Experts layer(gpu, desc, rng);
      for (const int64_t top_k : {1, 2, 8}) {
        for (const int64_t m : {0, 1, 7, 300}) {
          if (quick && (m == 300 || top_k == 2)) continue;
          const auto dtype = static_cast<flexq_dtype>(rng() % 3);
          now("layer, %d experts, H %d, I %d, formats %d, %lld tokens, top %lld, dtype %d", experts, hidden,
              intermediate, round, static_cast<long long>(m), static_cast<long long>(top_k), dtype);
          Call c = random_call(m, top_k, hidden, experts, dtype, rng() % 2 ? 3 : 0, rng);
          if (m == 7) std::fill(c.ids.begin(), c.ids.end(), experts / 2);  // all to one expert
          c.wide = rng() % 2;
          c.bias = round > 1;
          c.weights_dtype = static_cast<flexq_dtype>(rng() % 3);
          c.on_input = rng() % 4 == 0;
          check_layer(gpu, layer, c);
        }
      }
    }
  }
}

// Pairs so many that quantizers take tiles of them and products are as wide as x.
void test_many_pairs(const Gpu& gpu) {
  std::mt19937 rng(13);
  for (const int round : {0, 1, 2, 3}) {
    flexq_experts_desc desc = desc_of(9, 576, 200);
    set_formats(desc, round);
    const Experts layer(gpu, desc, rng);
    for (const int64_t m : {930, 1203}) {
      const auto dtype = static_cast<flexq_dtype>((m + round) % 3);
      now("many pairs, formats %d, %lld tokens, dtype %d", round, static_cast<long long>(m), dtype);
      Call c = random_call(m, 8, desc.hidden, desc.experts, dtype, round % 2 ? 3 : 0, rng);
      for (size_t i = 0; i < c.ids.size(); i += 3) c.ids[i] = 4;  // uneven
      c.bias = round % 2;
      c.on_input = round == 2;
      check_layer(gpu, layer, c);
    }
  }
}

// Tokens that are not sorted: a token's pairs and groups are any number of steps for a warp, up to all that there may
// be.
void test_few_tokens(const Gpu& gpu) {
  std::mt19937 rng(12);
  for (const auto& [experts, hidden, intermediate, top_k] :
       {std::tuple{16, 300, 768, 8}, {5, 140, 2900, 4}, {2, 2000, 12200, 1}, {40, 72, 100, 32}, {40, 72, 100, 33}}) {
    for (const int round : {0, 1, 2, 3}) {
      flexq_experts_desc desc = desc_of(experts, hidden, intermediate);
      set_formats(desc, round);
      const Experts layer(gpu, desc, rng);
      for (const int64_t m : {1, 2, 4, 5}) {
        const auto dtype = static_cast<flexq_dtype>((m + round) % 3);
        now("few tokens, %d experts, H %d, I %d, formats %d, %lld tokens, top %d, dtype %d", experts, hidden,
            intermediate, round, static_cast<long long>(m), top_k, dtype);
        Call c = random_call(m, top_k, hidden, experts, dtype, rng() % 2 ? 3 : 0, rng);
        c.bias = round % 2;
        c.on_input = m == 2;
        check_layer(gpu, layer, c);
      }
    }
  }
}

// Each kernel for both projections.
void test_kernels(const Gpu& gpu, const Device& device) {
  std::mt19937 rng(7);
  for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
    flexq_experts_desc desc = desc_of(7, 576, 200);
    desc.gate_up.scheme = desc.down.scheme = scheme;
    const Experts layer(gpu, desc, rng);
    std::set<std::string> tried;
    for (const GemmPlan& plan : plans_for(device, scheme)) {
      const std::string kernel = flexq::cuda::name_of(plan).text;
      Call c = random_call(90, 4, desc.hidden, desc.experts, FLEXQ_F32, 0, rng);
      c.bias = true;
      c.kernel = kernel.c_str();
      now("layer of %s by %s", name_of(scheme), c.kernel);
      flexq_stream stream = gpu.cuda;
      stream.kernel = c.kernel;
      size_t bytes = 0;
      // Of fewer rows in a CTA, only those that fill this GPU are candidates.
      if (flexq_experts_workspace_size(&stream, &desc, c.m, c.top_k, c.dtype, &bytes) != FLEXQ_OK) continue;
      tried.insert(kernel);
      check_layer(gpu, layer, c);
    }
    now("layers of %s", name_of(scheme));
    expect(tried.size() >= 8, "only %zu kernels ran by their names", tried.size());
    flexq_stream stream = gpu.cuda;
    stream.kernel = "none of these";
    size_t bytes = 0;
    CHECK(flexq_experts_workspace_size(&stream, &desc, 1, 1, FLEXQ_F32, &bytes) == FLEXQ_INVALID_ARGUMENT);
  }
}

// Of 6 experts everywhere, 3 are here; the CPU refuses what counts as not here on the GPU.
void test_not_here(const Gpu& gpu) {
  std::mt19937 rng(8);
  const Experts layer(gpu, desc_of(3, 100, 96), rng);
  for (const int64_t m : {1, 4, 20}) {
    Call c = random_call(m, 2, 100, 6, FLEXQ_F32, 0, rng);
    c.map = {-1, 2, -1, 0, 1, -1};
    c.bias = true;
    now("map, %lld tokens", static_cast<long long>(m));
    check_layer(gpu, layer, c);
    std::fill(c.ids.end() - 2, c.ids.end(), 5);  // a token with none here
    check_layer(gpu, layer, c);
    now("bad ids and map entries, %lld tokens", static_cast<long long>(m));
    c.wide = true;
    c.cpu_ids = c.ids;
    c.map[0] = 3, c.map[5] = -7;
    c.cpu_map = {-1, 2, -1, 0, 1, -1};
    c.ids[0] = rng() % 2 ? INT64_MIN : int64_t{1} << 40;
    c.cpu_ids[0] = 0;
    c.ids[1] = 6;
    c.cpu_ids[1] = 5;
    check_layer(gpu, layer, c);
    now("no expert here at all, %lld tokens", static_cast<long long>(m));
    std::fill(c.ids.begin(), c.ids.end(), -1);
    const std::vector<uint8_t> y = DeviceCall(gpu, layer, c).run();
    for (size_t i = 0; i < y.size(); ++i) expect(y[i] == 0, "byte %zu is not zero", i);
  }
}

// One graph, replayed with other inputs and routings, gives what calls give.
void test_graph(const Gpu& gpu) {
  std::mt19937 rng(9);
  const cudaStream_t handle = handle_of(gpu);
  for (const int64_t m : {1, 4, 5, 64, 300}) {
    const Experts layer(gpu, desc_of(16, 576, 200), rng);
    Call c = random_call(m, 4, 576, 16, FLEXQ_BF16, 0, rng);
    DeviceCall call(gpu, layer, c);
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cuda_check(cudaStreamBeginCapture(handle, cudaStreamCaptureModeThreadLocal));
    call.queue(call.y.data());
    cuda_check(cudaStreamEndCapture(handle, &graph));
    cuda_check(cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 0; i < 12; ++i) {
      now("graph, %lld tokens, replay %d", static_cast<long long>(m), i);
      Call other = random_call(m, 4, 576, 16, FLEXQ_BF16, 0, rng);
      if (i % 4 == 1) std::fill(other.ids.begin(), other.ids.end(), i);
      if (i % 4 == 2) std::fill(other.ids.begin(), other.ids.end(), -1);
      if (i % 4 == 3) {
        for (int64_t& id : other.ids) id = id % 2 * 9;
      }
      call.set(other);
      for (int repeat = 0; repeat < 3; ++repeat) cuda_check(cudaGraphLaunch(executable, handle));
      cuda_check(cudaStreamSynchronize(handle));
      const std::vector<uint8_t> replayed = call.y.host(), called = DeviceCall(gpu, layer, other).run();
      for (size_t b = 0; b < called.size(); ++b) {
        expect(replayed[b] == called[b], "token %zu, feature %zu differs", b / 2 / 576, b / 2 % 576);
      }
    }
    cuda_check(cudaGraphExecDestroy(executable));
    cuda_check(cudaGraphDestroy(graph));
  }
}

void test_not_finite(const Gpu& gpu) {
  std::mt19937 rng(10);
  for (const int round : {0, 1, 2, 3}) {
    for (const int64_t m : {4, 5, 200}) {
      now("not finite, formats %d, %lld tokens", round, static_cast<long long>(m));
      flexq_experts_desc desc = desc_of(3, 100, 96);
      set_formats(desc, round);
      const Experts layer(gpu, desc, rng);
      Call c = random_call(m, 2, 100, 3, FLEXQ_F32, 0, rng);
      auto set = [&](size_t i, float v) { std::memcpy(c.x.data() + 4 * i, &v, 4); };
      set(1 * 100 + 99, std::numeric_limits<float>::quiet_NaN());
      set(3 * 100, -INFINITY);
      const std::vector<uint8_t> y = DeviceCall(gpu, layer, c).run();
      for (size_t i = 0; i < y.size() / 4; ++i) {
        const float v = value_at(y, i, FLEXQ_F32);
        expect(std::isnan(v) == (i / 100 == 1 || i / 100 == 3), "token %zu, feature %zu is %g", i / 100, i % 100, v);
      }
    }
  }
}

// More pairs than are worked on at once; y in the place of x.
void test_many_tokens(const Gpu& gpu) {
  std::mt19937 rng(11);
  now("many tokens");
  const Experts layer(gpu, desc_of(4, 64, 40), rng);
  const Call c = random_call(9000, 8, 64, 4, FLEXQ_F32, 0, rng);
  const DeviceCall call(gpu, layer, c);
  const std::vector<uint8_t> y = call.run();
  check_near(y, on_cpu(gpu, layer, c), c, 64);
  call.queue(call.x.data());
  cuda_check(cudaStreamSynchronize(handle_of(gpu)));
  const std::vector<uint8_t> in_place = call.x.host();
  for (size_t i = 0; i < y.size(); ++i) expect(in_place[i] == y[i], "token %zu differs in place", i / 4 / 64);
}

void test_refuses(const Gpu& gpu) {
  now("refused");
  const flexq_experts_desc desc = desc_of(kernels::kMaxExperts + 1, 64, 64);
  size_t bytes = 0;
  CHECK(flexq_experts_workspace_size(&gpu.cuda, &desc, 1, 1, FLEXQ_F32, &bytes) == FLEXQ_UNSUPPORTED);
  CHECK(std::strstr(flexq_last_error(), "experts must be at most 8192 on CUDA, got 8193") != nullptr);
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
  const Device device = device_for(gpu);
  const std::pair<const char*, std::function<void()>> tests[] = {
      {"route", [&] { test_route(gpu, device); }},
      {"inputs", [&] { test_inputs(gpu, device); }},
      {"hidden", [&] { test_hidden(gpu, device); }},
      {"gemms", [&] { test_gemms(gpu, device); }},
      {"combine", [&] { test_combine(gpu, device); }},
      {"layers", [&] { test_layers(gpu, quick); }},
      {"few tokens", [&] { test_few_tokens(gpu); }},
      {"many pairs", [&] { test_many_pairs(gpu); }},
      {"kernels", [&] { test_kernels(gpu, device); }},
      {"not here", [&] { test_not_here(gpu); }},
      {"graph", [&] { test_graph(gpu); }},
      {"not finite", [&] { test_not_finite(gpu); }},
      {"many tokens", [&] { test_many_tokens(gpu); }},
      {"refuses", [&] { test_refuses(gpu); }},
  };
  for (const auto& [name, test] : tests) {
    test();
    std::printf("%s ok\n", name);
    std::fflush(stdout);
  }
  cuda_check(cudaStreamDestroy(stream));
  std::printf("ok\n");
  return 0;
}
