#include "cpu/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/executor.h"
#include "core/float_types.h"
#include "core/format.h"
#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/prepack.h"

namespace flexq::cpu {
namespace {

// Pairs whose products are kept until they are added up: enough to use each expert's weights well.
constexpr int64_t kBatchPairs = 16384;
// Pairs that go through both projections together, so that what is between them stays in the caches.
constexpr int64_t kPanelPairs = 512;
// Below so many values, waking a thread costs more than it saves.
constexpr int64_t kValuesWorthAThread = 16384;

int64_t tokens_at_once(int64_t m, int64_t top_k) { return std::min(m, std::max<int64_t>(kBatchPairs / top_k, 1)); }

int64_t num_threads(const flexq_executor* executor) { return executor == nullptr ? 1 : executor->num_threads; }

// What an expert has to do in a panel: pairs [begin, end) of it.
struct Segment {
  int64_t expert;
  int64_t begin;
  int64_t end;
  int64_t first_piece;  // of the pieces that a GEMM is cut into
};

// Of one batch of tokens.
struct Workspace {
  Workspace(const flexq_experts_desc& desc, int64_t m, int64_t top_k, flexq_dtype x_dtype) {
    const int64_t pairs = m * top_k, panel = std::min(pairs, kPanelPairs);
    const auto activation = [&](flexq_projection projection, int64_t rows) {
      return add(ActivationLayout(activation_of_expert(desc, projection, rows)).size);
    };
    const auto matrix = [&](int64_t rows, int64_t columns, size_t element_size) {
      return add(static_cast<size_t>(rows) * static_cast<size_t>(columns) * element_size);
    };
    tokens = activation(FLEXQ_GATE_UP, m);
    inputs = activation(FLEXQ_GATE_UP, panel);
    gate_up = matrix(panel, 2 * desc.intermediate, dtype_size(x_dtype));
    hidden = activation(FLEXQ_DOWN, panel);
    products = matrix(pairs, desc.hidden, sizeof(float));
    slots = matrix(pairs, 1, sizeof(int32_t));
    sorted = matrix(pairs, 1, sizeof(int32_t));
    offsets = matrix(desc.experts + 1, 1, sizeof(int32_t));
    segments = matrix(std::min(desc.experts, panel), 1, sizeof(Segment));
  }
  size_t tokens;    // quantized x
  size_t inputs;    // the same for each pair of a panel
  size_t gate_up;   // [panel][2I]
  size_t hidden;    // quantized h of a panel
  size_t products;  // fp32 [pairs][H]
  size_t slots;     // int32 [pairs]: a pair's place in the order by expert, or -1 if its expert is not here
  size_t sorted;    // int32 [pairs]: the pair at each place
  size_t offsets;   // int32 [E + 1]: where each expert's pairs begin
  size_t segments;
  size_t size = 0;

 private:
  size_t add(size_t bytes) {
    const size_t at = size;
    size += align_up(bytes);
    return at;
  }
};

// ---- Routing ----

int64_t read_id(const flexq_routing& routing, int64_t pair) {
  return routing.ids_type == FLEXQ_I64 ? static_cast<const int64_t*>(routing.ids)[pair]
                                       : static_cast<const int32_t*>(routing.ids)[pair];
}

// The local expert of a pair that check_ids has seen, or -1.
int32_t expert_of(const flexq_routing& routing, int64_t pair) {
  const int64_t id = read_id(routing, pair);
  return routing.expert_map == nullptr ? static_cast<int32_t>(id) : routing.expert_map[id];
}

void check_ids(const flexq_experts_desc& desc, const flexq_routing& routing) {
  const bool mapped = routing.expert_map != nullptr;
  for (int64_t i = 0; i < routing.map_size; ++i) {
    const int32_t local = routing.expert_map[i];
    require(local >= -1 && local < desc.experts, "expert_map[", i, "] is ", local, "; accepted are 0 to ",
            desc.experts - 1, ", the experts that are here, and -1");
  }
  const int64_t known = mapped ? routing.map_size : desc.experts;
  for (int64_t pair = 0; pair < routing.m * routing.top_k; ++pair) {
    const int64_t id = read_id(routing, pair);
    if (id >= 0 && id < known) continue;
    fail(FLEXQ_INVALID_ARGUMENT, "ids[", pair / routing.top_k, "][", pair % routing.top_k, "] is ", id,
         "; accepted are 0 to ", known - 1, mapped ? ", the entries of expert_map" : "");
  }
}

float router_weight(const flexq_routing& routing, int64_t pair) {
  return dispatch_dtype(routing.weights_dtype,
                        [&](auto type) { return to_float(static_cast<const decltype(type)*>(routing.weights)[pair]); });
}

// The pairs of a batch in the order of their experts, and within an expert in that of the tokens.
struct Pairs {
  int64_t first;  // the batch's, among all there are
  int64_t count;  // of those whose expert is here
  int32_t* slots;
  int32_t* sorted;
  int32_t* offsets;
};

void sort_pairs(const flexq_experts_desc& desc, const flexq_routing& routing, int64_t num_pairs, Pairs& pairs) {
  int32_t* offsets = pairs.offsets;
  std::fill(offsets, offsets + desc.experts + 1, 0);
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int32_t expert = expert_of(routing, pairs.first + p);
    if (expert >= 0) ++offsets[expert + 1];
  }
  for (int64_t e = 0; e < desc.experts; ++e) offsets[e + 1] += offsets[e];
  pairs.count = offsets[desc.experts];
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int32_t expert = expert_of(routing, pairs.first + p);
    pairs.slots[p] = expert < 0 ? -1 : offsets[expert]++;  // moves each begin to its end, put back below
    if (expert >= 0) pairs.sorted[pairs.slots[p]] = static_cast<int32_t>(p);
  }
  std::copy_backward(offsets, offsets + desc.experts, offsets + desc.experts + 1);
  offsets[0] = 0;
}

// Pairs [begin, begin + count) of the sorted ones, and their experts. Segments count from the panel's begin.
struct Panel {
  int64_t begin;
  int64_t count;
  Segment* segments;
  int64_t num_segments;
};

// Calls body(segment, begin, end), both within the segment, for all that pairs [begin, end) of a panel have a part in.
template <typename Body>
void for_segments(const Panel& panel, int64_t begin, int64_t end, const Body& body) {
  const Segment* segment = std::upper_bound(panel.segments, panel.segments + panel.num_segments, begin,
                                            [](int64_t at, const Segment& s) { return at < s.end; });
  for (; begin < end; begin = segment++->end) {
    body(*segment, begin - segment->begin, std::min(end, segment->end) - segment->begin);
  }
}

// The quantized inputs of a segment's pairs. Each segment's are an activation of their own, close together in memory.
Activation activation_of(const flexq_activation_desc& desc, const ActivationLayout& layout, void* panel_bytes,
                         const Segment& segment) {
  const Activation panel = layout.at(panel_bytes);
  const int64_t groups = num_groups(desc.k);
  return {panel.codes + segment.begin * groups * kGroup, panel.scales + segment.begin * scales_per_token(desc),
          panel.sums + segment.begin * groups};
}

// The next panel; `expert` is the one that it begins with, and is moved on.
Panel next_panel(const Pairs& pairs, int64_t begin, int64_t& expert, Segment* segments) {
  Panel panel{begin, std::min(kPanelPairs, pairs.count - begin), segments, 0};
  for (int64_t at = 0; at < panel.count;) {
    const int64_t end = std::min<int64_t>(pairs.offsets[expert + 1] - begin, panel.count);
    if (end > at) segments[panel.num_segments++] = {expert, at, end, 0};
    at = std::max(at, end);
    if (at < panel.count) ++expert;
  }
  return panel;
}

// ---- Steps ----

void quantize(const flexq_executor* executor, const flexq_activation_desc& desc, const ActivationSource& source,
              void* quantized) {
  const QuantizeArgs args{desc, source, ActivationLayout(desc).at(quantized)};
  parallel_ranges(executor, desc.m, balanced_grain(executor, desc.m, ceil_div(kValuesWorthAThread, padded_k(desc.k))),
                  [&](int64_t begin, int64_t end) { kernels().quantize(args, begin, end); });
}

// The quantized tokens, once for each pair of a panel.
void gather(const flexq_executor* executor, const ExpertsCall& call, const Pairs& pairs, const Panel& panel,
            const flexq_activation_desc& from_desc, void* from_bytes, const flexq_activation_desc& to_desc,
            void* to_bytes) {
  const Activation from = ActivationLayout(from_desc).at(from_bytes);
  const ActivationLayout to_layout(to_desc);
  const int64_t groups = num_groups(from_desc.k), token_scales = scales_per_token(from_desc);
  const flexq_routing& routing = call.routing;
  const int64_t at_least = ceil_div(4 * kValuesWorthAThread, padded_k(from_desc.k));
  const auto copy = [&](const Segment& segment, int64_t begin, int64_t end) {
    const Activation to = activation_of(to_desc, to_layout, to_bytes, segment);
    const int64_t count = segment.end - segment.begin;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = pairs.sorted[panel.begin + segment.begin + i], token = pair / routing.top_k;
      const float factor = routing.weights_on_input ? router_weight(routing, pairs.first + pair) : 1.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t source = g * from_desc.m + token, target = g * count + i;
        std::memcpy(to.codes + target * kGroup, from.codes + source * kGroup, kGroup);
        to.sums[target] = from.sums[source];
      }
      for (int64_t g = 0; g < token_scales; ++g) {
        to.scales[g * count + i] = from.scales[g * from_desc.m + token] * factor;
      }
    }
  };
  parallel_ranges(executor, panel.count, balanced_grain(executor, panel.count, at_least),
                  [&](int64_t begin, int64_t end) { for_segments(panel, begin, end, copy); });
}

// How the output of one expert is cut: rows first, tokens only where rows are too few.
struct Cut {
  Cut(int64_t blocks, int64_t tokens, int64_t wanted) {
    constexpr int64_t kTokenGrain = 64;
    row_grain = ceil_div(blocks, std::clamp<int64_t>(wanted, 1, blocks));
    row_pieces = ceil_div(blocks, row_grain);
    const int64_t columns = std::min(std::max<int64_t>(wanted / row_pieces, 1), ceil_div(tokens, kTokenGrain));
    token_grain = ceil_div(ceil_div(tokens, columns), kTokenGrain) * kTokenGrain;
    token_pieces = ceil_div(tokens, token_grain);
  }
  int64_t row_grain;
  int64_t row_pieces;
  int64_t token_grain;
  int64_t token_pieces;
};

struct Products {
  const void* prepacked;
  size_t stride;
  const void* bias;
  void* y;
  flexq_dtype y_dtype;
};

// y [pairs][N] of one projection of a panel: each expert's weights times its own pairs.
void gemm(const flexq_executor* executor, const ExpertsCall& call, flexq_projection projection, const Panel& panel,
          const flexq_activation_desc& act, void* quantized, const Products& products) {
  const flexq_weight_desc weight = weight_of_expert(call.desc, projection);
  const int64_t blocks = ceil_div(weight.n, kBlockRows);
  const int64_t token_products = blocks * kBlockRows * padded_k(weight.k);
  // Unpacking a block costs about as much as a few tokens' products with it.
  constexpr int64_t kUnpackTokens = 4;
  constexpr int64_t kProductsWorthAThread = 1 << 18;
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t total = (panel.count + kUnpackTokens * panel.num_segments) * token_products;
  const int64_t piece = std::max(kProductsWorthAThread, ceil_div(total, num_threads(executor) * kPiecesPerThread));
  const auto cut_of = [&](const Segment& segment) {
    const int64_t tokens = segment.end - segment.begin;
    return Cut(blocks, tokens, ceil_div((tokens + kUnpackTokens) * token_products, piece));
  };
  Segment* const last_segment = panel.segments + panel.num_segments;
  int64_t pieces = 0;
  for (Segment* segment = panel.segments; segment != last_segment; ++segment) {
    const Cut cut = cut_of(*segment);
    segment->first_piece = pieces;
    pieces += cut.row_pieces * cut.token_pieces;
  }
  const ActivationLayout layout(act);
  parallel_ranges(executor, pieces, 1, [&](int64_t begin, int64_t end) {
    const Segment* segment = std::upper_bound(panel.segments, last_segment, begin,
                                              [](int64_t at, const Segment& s) { return at < s.first_piece; }) -
                             1;
    for (; begin < end; ++segment) {
      const auto expert = static_cast<size_t>(segment->expert);
      const size_t bias_at = expert * static_cast<size_t>(weight.n) * dtype_size(call.bias_dtype);
      const size_t y_at = static_cast<size_t>(segment->begin * weight.n) * dtype_size(products.y_dtype);
      const int64_t tokens = segment->end - segment->begin;
      const GemmArgs args{
          weight,
          packed_weight(weight, static_cast<const uint8_t*>(products.prepacked) + expert * products.stride),
          tokens,
          act.act_bits,
          activation_of(act, layout, quantized, *segment),
          products.bias == nullptr ? nullptr : static_cast<const uint8_t*>(products.bias) + bias_at,
          call.bias_dtype,
          static_cast<uint8_t*>(products.y) + y_at,
          products.y_dtype,
          weight.n};
      const Cut cut = cut_of(*segment);
      const int64_t last = std::min(end, segment->first_piece + cut.row_pieces * cut.token_pieces);
      for (; begin < last; ++begin) {
        const int64_t local = begin - segment->first_piece;
        const int64_t row = local / cut.token_pieces * cut.row_grain;
        const int64_t token = local % cut.token_pieces * cut.token_grain;
        kernels().gemm(args, row, std::min(blocks, row + cut.row_grain), token,
                       std::min(tokens, token + cut.token_grain));
      }
    }
  });
}

template <flexq_gate_function kFunction>
float gate_value(float g, float alpha) {
  constexpr float kInverseSqrt2 = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f;
  switch (kFunction) {
    case FLEXQ_GATE_GELU:
      return 0.5f * g * (1.0f + std::erf(g * kInverseSqrt2));
    case FLEXQ_GATE_GELU_TANH:
      return 0.5f * g * (1.0f + std::tanh(kSqrt2OverPi * (g + 0.044715f * g * g * g)));
    default:
      return g / (1.0f + std::exp(-alpha * g));
  }
}

// h = f(gate) * up over the gate and up values of a pair, in place: h[i] goes where no later value is.
template <flexq_gate_function kFunction, typename T>
void apply_gate(const flexq_experts_desc& desc, T* u) {
  const auto rounded = [](float x) { return to_float(from_float<T>(x)); };
  const bool concatenated = desc.layout == FLEXQ_GATE_UP_CONCATENATED;
  const float limit = desc.limit > 0.0f ? desc.limit : INFINITY, alpha = desc.alpha, up_offset = desc.up_offset;
  const int64_t count = desc.intermediate, step = concatenated ? 1 : 2;
  const T* up_values = u + (concatenated ? count : 1);
  for (int64_t i = 0; i < count; ++i) {
    const float gate = std::min(to_float(u[i * step]), limit);
    const float up = std::clamp(to_float(up_values[i * step]), -limit, limit);
    u[i] = from_float<T>(rounded(gate_value<kFunction>(gate, alpha)) * rounded(up + up_offset));
  }
}

template <typename T>
void apply_gate(const flexq_experts_desc& desc, T* u) {
  switch (desc.function) {
    case FLEXQ_GATE_GELU:
      return apply_gate<FLEXQ_GATE_GELU>(desc, u);
    case FLEXQ_GATE_GELU_TANH:
      return apply_gate<FLEXQ_GATE_GELU_TANH>(desc, u);
    default:
      return apply_gate<FLEXQ_GATE_SILU>(desc, u);
  }
}

// Of each pair: h over its gate and up values, quantized.
void gate_quantize(const flexq_executor* executor, const ExpertsCall& call, const Panel& panel,
                   const flexq_activation_desc& act, void* u, void* quantized) {
  const int64_t ld = 2 * call.desc.intermediate;
  const ActivationLayout layout(act);
  const auto run = [&](const Segment& segment, int64_t begin, int64_t end) {
    dispatch_dtype(call.x_dtype, [&](auto type) {
      auto* rows = static_cast<decltype(type)*>(u) + segment.begin * ld;
      for (int64_t i = begin; i < end; ++i) apply_gate(call.desc, rows + i * ld);
      flexq_activation_desc desc = act;
      desc.m = segment.end - segment.begin;
      const ActivationSource source{ActivationSource::kPlain, call.x_dtype, rows, ld};
      kernels().quantize({desc, source, activation_of(act, layout, quantized, segment)}, begin, end);
    });
  };
  // An exponential costs some ten times what quantizing a value does.
  const int64_t at_least = ceil_div(kValuesWorthAThread / 8, call.desc.intermediate);
  parallel_ranges(executor, panel.count, balanced_grain(executor, panel.count, at_least),
                  [&](int64_t begin, int64_t end) { for_segments(panel, begin, end, run); });
}

// y of tokens [first, first + m): their pairs' products, weighted and added up in the order of their ids.
void combine(const flexq_executor* executor, const ExpertsCall& call, const Pairs& pairs, int64_t first, int64_t m,
             const float* products) {
  const flexq_routing& routing = call.routing;
  const int64_t n = call.desc.hidden;
  const int64_t at_least = ceil_div(kValuesWorthAThread, n * routing.top_k);
  parallel_ranges(executor, m, balanced_grain(executor, m, at_least), [&](int64_t begin, int64_t end) {
    constexpr int64_t kColumns = 512;
    float sums[kColumns];
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t column = 0; column < n; column += kColumns) {
        const int64_t count = std::min(kColumns, n - column);
        std::fill(sums, sums + count, 0.0f);
        for (int64_t j = 0; j < routing.top_k; ++j) {
          const int64_t slot = pairs.slots[t * routing.top_k + j];
          if (slot < 0) continue;
          const float weight =
              routing.weights_on_input ? 1.0f : router_weight(routing, (first + t) * routing.top_k + j);
          const float* product = products + slot * n + column;
          for (int64_t i = 0; i < count; ++i) sums[i] += weight * product[i];
        }
        dispatch_dtype(call.y_dtype, [&](auto type) {
          using T = decltype(type);
          T* y = static_cast<T*>(call.y) + (first + t) * call.ldy + column;
          for (int64_t i = 0; i < count; ++i) y[i] = from_float<T>(sums[i]);
        });
      }
    }
  });
}

}  // namespace

void check_expert_scales(const flexq_experts_desc& desc, flexq_projection projection, int64_t first, int64_t count,
                         const uint16_t* scales) {
  const flexq_weight_desc weight = weight_of_expert(desc, projection);
  for (int64_t i = 0; i < count; ++i) {
    check_scales(weight, scales + static_cast<size_t>(i) * num_scales(weight), cat("expert ", first + i, ", "));
  }
}

size_t experts_workspace_size(const flexq_experts_desc& desc, int64_t m, int64_t top_k, flexq_dtype x_dtype) {
  return m == 0 ? 0 : Workspace(desc, tokens_at_once(m, top_k), top_k, x_dtype).size;
}

void experts_forward(const flexq_executor* executor, const ExpertsCall& call, size_t gate_up_stride,
                     size_t down_stride) {
  const flexq_experts_desc& desc = call.desc;
  const flexq_routing& routing = call.routing;
  check_ids(desc, routing);
  const int64_t batch = tokens_at_once(routing.m, routing.top_k);
  const Workspace at(desc, batch, routing.top_k, call.x_dtype);
  auto* workspace = static_cast<uint8_t*>(call.workspace);
  auto* products = reinterpret_cast<float*>(workspace + at.products);
  auto* segments = reinterpret_cast<Segment*>(workspace + at.segments);
  Pairs pairs{0, 0, reinterpret_cast<int32_t*>(workspace + at.slots), reinterpret_cast<int32_t*>(workspace + at.sorted),
              reinterpret_cast<int32_t*>(workspace + at.offsets)};
  for (int64_t first = 0; first < routing.m; first += batch) {
    const int64_t m = std::min(batch, routing.m - first);
    pairs.first = first * routing.top_k;
    sort_pairs(desc, routing, m * routing.top_k, pairs);
    const flexq_activation_desc tokens = activation_of_expert(desc, FLEXQ_GATE_UP, m);
    if (pairs.count > 0) {
      const size_t x_at = static_cast<size_t>(first * call.ldx) * dtype_size(call.x_dtype);
      const auto* x = static_cast<const uint8_t*>(call.x) + x_at;
      quantize(executor, tokens, {ActivationSource::kPlain, call.x_dtype, x, call.ldx}, workspace + at.tokens);
    }
    int64_t expert = 0;
    for (int64_t begin = 0; begin < pairs.count; begin += kPanelPairs) {
      const Panel panel = next_panel(pairs, begin, expert, segments);
      const flexq_activation_desc inputs = activation_of_expert(desc, FLEXQ_GATE_UP, panel.count);
      const flexq_activation_desc hidden = activation_of_expert(desc, FLEXQ_DOWN, panel.count);
      gather(executor, call, pairs, panel, tokens, workspace + at.tokens, inputs, workspace + at.inputs);
      gemm(executor, call, FLEXQ_GATE_UP, panel, inputs, workspace + at.inputs,
           {call.gate_up, gate_up_stride, call.gate_up_bias, workspace + at.gate_up, call.x_dtype});
      gate_quantize(executor, call, panel, hidden, workspace + at.gate_up, workspace + at.hidden);
      gemm(executor, call, FLEXQ_DOWN, panel, hidden, workspace + at.hidden,
           {call.down, down_stride, call.down_bias, products + begin * desc.hidden, FLEXQ_F32});
    }
    combine(executor, call, pairs, first, m, products);
  }
}

}  // namespace flexq::cpu
