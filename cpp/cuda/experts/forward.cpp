#include "cuda/experts/forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "core/error.h"
#include "core/float_types.h"
#include "core/format.h"
#include "cuda/choices.h"
#include "cuda/dispatch.h"
#include "cuda/layout.h"

namespace flexq::cuda::experts {
namespace {

constexpr flexq_projection kProjections[] = {FLEXQ_GATE_UP, FLEXQ_DOWN};

// ---- Which kernels run ----

// From so many values of pairs' tokens on, quantizers take tiles of 8 pairs, and products are as wide as x.
constexpr int64_t kManyValues = int64_t{1} << 22;

struct Plan {
  int tile_tokens;
  bool many;
  GemmPlan gemms[2];
};

// However pairs are spread: an expert's last tile may hold a single one.
int64_t most_tiles(int64_t experts, int64_t pairs, int tile_tokens) {
  const int64_t used = std::min(experts, pairs);
  return used + (pairs - used) / tile_tokens;
}

// Where every pair's expert is any of them: an expert has a number of pairs of Poisson's distribution.
double expected_tiles(int64_t experts, int64_t pairs, int tile_tokens) {
  const double mean = static_cast<double>(pairs) / static_cast<double>(experts);
  double tiles = mean / tile_tokens + 0.5;  // of an expert with many
  if (mean <= 64) {
    tiles = 0;
    double probability = std::exp(-mean);
    for (int count = 0; count < 256; probability *= mean / ++count) {
      tiles += probability * static_cast<double>(ceil_div(count, tile_tokens));
    }
  }
  return std::clamp(tiles * static_cast<double>(experts), 1.0,
                    static_cast<double>(most_tiles(experts, pairs, tile_tokens)));
}

// The cheapest plan with this many tokens in a tile, or the one of this name; none if there is none. To the model of
// cost the tiles are one tile of a weight with the rows of all of them.
std::optional<Candidate> gemm_of(const Device& device, flexq_weight_desc desc, int32_t act_bits, int tile_tokens,
                                 double tiles, const char* kernel) {
  const int64_t row_blocks = num_row_blocks(desc);
  desc.n = row_blocks * kRecordRows * std::max<int64_t>(1, std::llround(tiles));
  std::optional<Candidate> best;
  for (Candidate candidate : Candidates(device, desc, act_bits, tile_tokens)) {
    GemmPlan& plan = candidate.plan;
    if (plan.family == GemmPlan::kMma) {
      const MmaShape shape = mma_shape(plan.config);
      if (shape.tokens != tile_tokens || shape.act_bits != 0 ||
          !has_experts_mma(device, plan.config, desc.weight_bits, desc.scheme == FLEXQ_SCHEME_GROUP))
        continue;
      candidate.microseconds *= plan.splits;  // K is not split here
      plan.splits = 1;
    } else {
      if (wgmma_shape(plan.config).tokens != tile_tokens || !has_experts_wgmma(plan.config)) continue;
      if (plan.splits > 1) continue;
    }
    if (kernel != nullptr && std::strcmp(name_of(plan).text, kernel) != 0) continue;
    if (!best || candidate.microseconds < best->microseconds) best = candidate;
  }
  return best;
}

std::optional<Plan> cheapest(const Device& device, const flexq_experts_desc& desc, int64_t pairs, const char* kernel) {
  std::optional<Plan> best;
  double least = 0;
  for (const int tile_tokens : {8, 16, 32, 64, 128, 256}) {
    const double tiles = expected_tiles(desc.experts, pairs, tile_tokens);
    Plan plan{tile_tokens, pairs * desc.hidden >= kManyValues, {}};
    double microseconds = 0;
    bool complete = true;
    for (const flexq_projection projection : kProjections) {
      const auto gemm = gemm_of(device, weight_of_expert(desc, projection), format_of(desc, projection).act_bits,
                                tile_tokens, tiles, kernel);
      complete = complete && gemm.has_value();
      if (!gemm) continue;
      plan.gemms[projection] = gemm->plan;
      microseconds += gemm->microseconds;
    }
    if (!complete || (best && microseconds >= least)) continue;
    best = plan;
    least = microseconds;
  }
  return best;
}

Plan plan_of(const Device& device, const flexq_stream& stream, const flexq_experts_desc& desc, int64_t pairs) {
  if (stream.kernel != nullptr) {
    const auto plan = cheapest(device, desc, pairs, stream.kernel);
    require(plan.has_value(), "stream.kernel ", stream.kernel, " does not run these experts");
    return *plan;
  }
  thread_local Choices<11, Plan> choices;
  return choices.get(
      {desc.experts, desc.hidden, desc.intermediate, pairs, stream.device_index, desc.gate_up.scheme, desc.down.scheme,
       desc.gate_up.act_bits, desc.down.act_bits, desc.gate_up.weight_bits, desc.down.weight_bits},
      [&] { return *cheapest(device, desc, pairs, nullptr); });
}

// ---- Where things are ----

int64_t tokens_at_once(int64_t m, int64_t top_k) { return std::min(m, std::max<int64_t>(kMaxPairs / top_k, 1)); }

// Of one batch of tokens.
struct Workspace {
  Workspace(const flexq_experts_desc& desc, const Plan& plan, int64_t m, int64_t top_k, flexq_dtype x_dtype)
      : products_dtype(plan.many ? x_dtype : FLEXQ_F32), x(activation_of_expert(desc, FLEXQ_GATE_UP, m)) {
    const int64_t pairs = m * top_k;
    max_tiles = most_tiles(desc.experts, pairs, plan.tile_tokens);
    for (const flexq_projection projection : kProjections) {
      act[projection] = activation_of_expert(desc, projection, max_tiles * plan.tile_tokens);
    }
    const auto matrix = [](int64_t rows, int64_t columns, size_t element) {
      return static_cast<size_t>(rows) * static_cast<size_t>(columns) * element;
    };
    num_tiles = add(sizeof(int32_t));
    tiles = add(matrix(max_tiles, 1, sizeof(ExpertTile)));
    places = add(matrix(pairs, 1, sizeof(Place)));
    pairs_of_rows = add(matrix(pairs, 1, sizeof(int32_t)));
    hidden = add(ActivationLayout(act[FLEXQ_DOWN]).size);
    // The products lie over what is done with by then.
    products = quantized_x = size;
    if (plan.many) add(ActivationLayout(x).size);
    inputs = size;
    add(ActivationLayout(act[FLEXQ_GATE_UP]).size);
    gate_up = add(matrix(pairs, 2 * desc.intermediate, dtype_size(x_dtype)));
    size = std::max(size, products + align_up(matrix(pairs, desc.hidden, dtype_size(products_dtype))));
  }
  flexq_dtype products_dtype;
  flexq_activation_desc x;
  int64_t max_tiles;
  flexq_activation_desc act[2];
  size_t num_tiles, tiles, places, pairs_of_rows;
  size_t quantized_x;  // of each token, if they are many
  size_t inputs;       // of each place
  size_t gate_up;      // [pairs][2I]
  size_t hidden;       // quantized h of each place
  size_t products;     // [pairs][H]
  size_t size = 0;

 private:
  size_t add(size_t bytes) {
    const size_t at = size;
    size += align_up(bytes);
    return at;
  }
};

const uint8_t* at_element(const void* p, int64_t index, size_t element) {
  return static_cast<const uint8_t*>(p) + static_cast<size_t>(index) * element;
}

Ids ids_from(const flexq_experts_desc& desc, const flexq_routing& routing, int64_t first_pair) {
  const bool wide = routing.ids_type == FLEXQ_I64, mapped = routing.expert_map != nullptr;
  return {at_element(routing.ids, first_pair, wide ? 8 : 4), wide, routing.expert_map,
          mapped ? routing.map_size : desc.experts, static_cast<int>(desc.experts)};
}

GemmArgs gemm_args(const ExpertsCall& call, flexq_projection projection, const flexq_activation_desc& act,
                   const void* quantized, void* y, flexq_dtype y_dtype) {
  const flexq_weight_desc weight = weight_of_expert(call.desc, projection);
  const bool up = projection == FLEXQ_GATE_UP;
  return {weight,
          up ? call.gate_up : call.down,
          act,
          quantized,
          up ? call.gate_up_bias : call.down_bias,
          call.bias_dtype,
          y,
          y_dtype,
          weight.n,
          nullptr};
}

// ---- Many tokens: pairs are sorted by expert ----

struct Batch {
  const Device& device;
  cudaStream_t stream;
  const ExpertsCall& call;
  const Plan& plan;
  const std::array<int64_t, 2>& weight_strides;
  int64_t first, tokens;

  void run() const {
    const flexq_experts_desc& desc = call.desc;
    const flexq_routing& routing = call.routing;
    const int64_t first_pair = first * routing.top_k, pairs = tokens * routing.top_k;
    const Workspace at(desc, plan, tokens, routing.top_k, call.x_dtype);
    auto* workspace = static_cast<uint8_t*>(call.workspace);
    const Routed routed{
        reinterpret_cast<int32_t*>(workspace + at.num_tiles), reinterpret_cast<ExpertTile*>(workspace + at.tiles),
        reinterpret_cast<Place*>(workspace + at.places), reinterpret_cast<int32_t*>(workspace + at.pairs_of_rows)};
    const ExpertTable table{routed.num_tiles, routed.tiles, plan.tile_tokens, 0, 0};
    const void* x = at_element(call.x, first * call.ldx, dtype_size(call.x_dtype));
    const void* weights = at_element(routing.weights, first_pair, dtype_size(routing.weights_dtype));
    const void* of_inputs = routing.weights_on_input ? weights : nullptr;
    const void* of_outputs = routing.weights_on_input ? nullptr : weights;

    if (plan.many) {
      const ActivationSource source{.kind = ActivationSource::kPlain, .dtype = call.x_dtype, .x = x, .ldx = call.ldx};
      quantize_activation(stream, device, at.x, source, workspace + at.quantized_x);
    }
    route(stream, device,
          {.ids = ids_from(desc, routing, first_pair),
           .pairs = pairs,
           .tile_tokens = plan.tile_tokens,
           .max_tiles = at.max_tiles,
           .to = routed});
    if (plan.many) {
      gather(stream, device,
             {.tokens = at.x,
              .places = at.act[FLEXQ_GATE_UP],
              .from = workspace + at.quantized_x,
              .to = workspace + at.inputs,
              .table = table,
              .pairs = routed.pairs,
              .top_k = routing.top_k,
              .weights = of_inputs,
              .weights_dtype = routing.weights_dtype});
    } else {
      quantize_inputs(stream, device,
                      {.act = at.act[FLEXQ_GATE_UP],
                       .quantized = workspace + at.inputs,
                       .x = x,
                       .dtype = call.x_dtype,
                       .ldx = call.ldx,
                       .tokens = tokens,
                       .top_k = routing.top_k,
                       .places = routed.places,
                       .weights = of_inputs,
                       .weights_dtype = routing.weights_dtype});
    }
    gemm(FLEXQ_GATE_UP, at, table, workspace + at.inputs, workspace + at.gate_up, call.x_dtype);
    const HiddenArgs hidden{.desc = desc,
                            .act = at.act[FLEXQ_DOWN],
                            .quantized = workspace + at.hidden,
                            .u = workspace + at.gate_up,
                            .dtype = call.x_dtype,
                            .pairs = pairs,
                            .places = routed.places,
                            .table = table};
    (plan.many ? quantize_hidden_tiles : quantize_hidden)(stream, device, hidden);
    gemm(FLEXQ_DOWN, at, table, workspace + at.hidden, workspace + at.products, at.products_dtype);
    combine(stream, device,
            {.tokens = tokens,
             .top_k = routing.top_k,
             .n = desc.hidden,
             .places = routed.places,
             .products = workspace + at.products,
             .products_dtype = at.products_dtype,
             .weights = of_outputs,
             .weights_dtype = routing.weights_dtype,
             .y = const_cast<uint8_t*>(at_element(call.y, first * call.ldy, dtype_size(call.y_dtype))),
             .y_dtype = call.y_dtype,
             .ldy = call.ldy});
  }

 private:
  void gemm(flexq_projection projection, const Workspace& at, const ExpertTable& table, const void* quantized, void* y,
            flexq_dtype y_dtype) const {
    ExpertsGemmArgs args{gemm_args(call, projection, at.act[projection], quantized, y, y_dtype), table, at.max_tiles,
                         tokens * call.routing.top_k <= plan.tile_tokens * call.desc.experts};
    args.table.weight_stride = weight_strides[static_cast<size_t>(projection)];
    args.table.bias_stride = args.gemm.desc.n * static_cast<int64_t>(dtype_size(call.bias_dtype));
    const GemmPlan& chosen = plan.gemms[projection];
    (chosen.family == GemmPlan::kMma ? gemm_mma : gemm_wgmma)(stream, device, args, chosen);
  }
};

// ---- Few tokens: every pair reads its expert's weights ----

// Two pairs of one expert both read it. Where pairs are few beside experts such are rare, and sorting takes longer.
constexpr int64_t kDirectTokens = 4, kExpertsPerPair = 4;

struct Direct {
  Direct(const flexq_experts_desc& desc, int64_t pairs, flexq_dtype x_dtype)
      : act(activation_of_expert(desc, FLEXQ_DOWN, pairs * kTokenTile)), gate_up(ActivationLayout(act).size) {
    size = gate_up + align_up(static_cast<size_t>(pairs * 2 * desc.intermediate) * dtype_size(x_dtype));
  }

  static bool fits(const Device& device, const flexq_stream& stream, const flexq_experts_desc& desc, int64_t m,
                   int64_t top_k) {
    const bool few = m == 1 || (m <= kDirectTokens && m * top_k * kExpertsPerPair <= desc.experts);
    return few && stream.kernel == nullptr && has_direct(device, desc, top_k);
  }

  void run(cudaStream_t stream, const Device& device, const ExpertsCall& call,
           const std::array<int64_t, 2>& weight_strides) const {
    const flexq_routing& routing = call.routing;
    auto* workspace = static_cast<uint8_t*>(call.workspace);
    const bool on_input = routing.weights_on_input;
    DirectArgs args{.desc = call.desc,
                    .ids = ids_from(call.desc, routing, 0),
                    .tokens = routing.m,
                    .top_k = routing.top_k,
                    .x = call.x,
                    .x_dtype = call.x_dtype,
                    .ldx = call.ldx,
                    .prepacked = call.gate_up,
                    .weight_stride = weight_strides[FLEXQ_GATE_UP],
                    .bias = call.gate_up_bias,
                    .bias_dtype = call.bias_dtype,
                    .weights = on_input ? routing.weights : nullptr,
                    .weights_dtype = routing.weights_dtype,
                    .y = workspace + gate_up,
                    .y_dtype = call.x_dtype,
                    .ldy = 2 * call.desc.intermediate};
    direct_gate_up(stream, device, args);
    quantize_hidden(stream, device,
                    {.desc = call.desc,
                     .act = act,
                     .quantized = workspace,
                     .u = workspace + gate_up,
                     .dtype = call.x_dtype,
                     .pairs = routing.m * routing.top_k,
                     .places = nullptr,
                     .table = {}});
    args.x = workspace;
    args.prepacked = call.down;
    args.weight_stride = weight_strides[FLEXQ_DOWN];
    args.bias = call.down_bias;
    args.weights = on_input ? nullptr : routing.weights;
    args.y = call.y;
    args.y_dtype = call.y_dtype;
    args.ldy = call.ldy;
    direct_down(stream, device, args);
  }

  flexq_activation_desc act;  // h, quantized: a tile for each pair
  size_t gate_up;             // behind it, [pairs][2I]
  size_t size;
};

}  // namespace

size_t workspace_size(const Device& device, const flexq_stream& stream, const flexq_experts_desc& desc, int64_t m,
                      int64_t top_k, flexq_dtype x_dtype) {
  if (Direct::fits(device, stream, desc, m, top_k)) return Direct(desc, m * top_k, x_dtype).size;
  const int64_t batch = tokens_at_once(m, top_k);
  return Workspace(desc, plan_of(device, stream, desc, batch * top_k), batch, top_k, x_dtype).size;
}

void forward(const Device& device, const flexq_stream& stream, const ExpertsCall& call,
             const std::array<int64_t, 2>& weight_strides) {
  const flexq_routing& routing = call.routing;
  if (Direct::fits(device, stream, call.desc, routing.m, routing.top_k)) {
    return Direct(call.desc, routing.m * routing.top_k, call.x_dtype)
        .run(static_cast<cudaStream_t>(stream.handle), device, call, weight_strides);
  }
  const int64_t batch = tokens_at_once(routing.m, routing.top_k);
  const Plan plan = plan_of(device, stream, call.desc, batch * routing.top_k);
  for (int64_t first = 0; first < routing.m; first += batch) {
    Batch{device, static_cast<cudaStream_t>(stream.handle), call, plan, weight_strides,
          first,  std::min(batch, routing.m - first)}
        .run();
  }
}

}  // namespace flexq::cuda::experts
