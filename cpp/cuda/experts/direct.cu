// The GEMMs of few tokens, whose pairs are not sorted: each reads its expert's weights.
//
// A CTA has up to four blocks of 16 features, of one pair (gate_up) or of all pairs of a token (down, which sums over
// them). Their records are one row of steps, a step being a group of a pair, and the CTA's warps share the steps
// evenly. down's weights stream into each warp's ring while the kernels ahead still run. gate_up quantizes x itself: a
// launch would take longer than doing it in every CTA.
#include <algorithm>
#include <type_traits>

#include "cuda/elements.cuh"
#include "cuda/experts/kernels.h"
#include "cuda/experts/table.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/quantize/group_part.cuh"
#include "cuda/records.cuh"

namespace flexq::cuda::experts {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxBlocks = 4;
constexpr int kMaxPairs = 32;   // of a token: a warp's lanes
constexpr int kMaxSteps = 384;  // of a CTA: their codes are in shared memory
constexpr int kCtasPerSm = 2;   // of gate_up, and one of down
using Lane = quantize::Part<32>;
using Values = float[Lane::kValues];

struct DirectParams {
  Ids ids;
  int top_k, groups;
  int blocks;  // of a CTA
  const uint8_t* records;
  int64_t weight_stride, channel_scales, row_blocks, n;
  const void* bias;
  flexq_dtype bias_dtype;
  const void* weights;  // of pairs, or null
  flexq_dtype weights_dtype;
  bool read_once;
  void* y;  // a row for each pair, or each token
  flexq_dtype y_dtype;
  int64_t ldy;
  // Of gate_up: x, and how it is quantized.
  quantize::Params act;
  const void* x;
  int64_t ldx;
  // Of down: h, which is quantized. Pair i is the first token of tile i.
  const uint8_t* codes;
  const float* act_scales;
  int64_t token_tiles;
};

struct Pair {
  int index, expert;
  float weight;
};

// Two CTAs of gate_up and one of down fit on an SM, so that down's weights are on their way before gate_up has ended.
template <bool kUp, bool kPerGroup, int kBits>
struct alignas(16) Shared {
  static constexpr int kPairs = kUp ? 1 : kMaxPairs;
  static constexpr int kSlots = kUp ? 5 : 6;  // records in a warp's ring
  union {
    uint8_t ring[kWarps][kSlots][record_and_scale_bytes(kBits, kPerGroup)];
    float sums[kWarps][kMaxBlocks * kRecordRows];  // once the ring is done with
  };
  Pair pairs[kWarps][kPairs];                                             // the same for each
  uint16_t row_scales[kPerGroup ? 1 : kPairs][kMaxBlocks * kRecordRows];  // in scheme channel
  int largest[kWarps];  // bits of a warp's largest magnitude, in scheme channel
};

// What a warp knows of its activations of a step. Steps are behind Shared.
struct alignas(16) Step {
  uint8_t codes[kGroup];
  float scale;  // of the activations, times the pair's weight
  float unused[3];
};

// Where a warp is among the steps of its CTA.
struct Position {
  int groups, pair, group;

  __device__ Position(int step, int groups) : groups(groups), pair(step / groups), group(step % groups) {}
  __device__ void advance() {
    if (++group == groups) group = 0, ++pair;
  }
};

// Pairs [first, first + count) whose experts are here, in their order; every warp finds them for itself.
__device__ int find_pairs(const DirectParams& p, int64_t first, int count, int lane, Pair* pairs) {
  const int64_t pair = first + lane;
  const int expert = lane < count ? expert_of(p.ids, pair) : -1;
  const float weight = expert < 0 || p.weights == nullptr ? 1.0f : load_float(p.weights, p.weights_dtype, pair);
  const unsigned here = __ballot_sync(~0u, expert >= 0);
  if (expert >= 0) pairs[__popc(here & ((1u << lane) - 1))] = {static_cast<int>(pair), expert, weight};
  __syncwarp();
  return __popc(here);
}

// Quantizes the groups [begin, end) of a row of x, this warp's. Its first loads go before those of weights, behind
// which they would wait. Loops are not unrolled: instructions come from L2, too, and would take longer to arrive than
// data.
template <typename T>
struct XQuantizer {
  static constexpr int kAhead = 4;
  const DirectParams& p;
  Lane part;
  int64_t token;
  int begin, end;
  Lane::Stored<T> ahead[kAhead];

  __device__ XQuantizer(const DirectParams& params, int lane, int64_t of_token, int first, int last)
      : p(params), part(lane), token(of_token), begin(first), end(last) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i < end) ahead[i] = load(begin + i);
    }
  }

  // The largest magnitude's bits of the row, once `each` was called with the values and the largest of each step.
  template <typename Each>
  __device__ int run(const Each& each) {
    int largest = 0;
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      Values v;
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) v[i] = ahead[0].value(i);
#pragma unroll
      for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
      if (step + kAhead < end) ahead[kAhead - 1] = load(step + kAhead);
      const int of_step = quantize::largest_of_lanes<32>(part.rotate_and_max(p.act, v));
      each(step, v, of_step);
      largest = max(largest, of_step);
    }
    return largest;
  }

  __device__ void store(const Values& v, int largest, float weight, Step& to) const {
    const quantize::Scale scale = quantize::scale_of(largest, p.act.rotate, p.act.qmax);
    *reinterpret_cast<Lane::Codes*>(to.codes + part.k(0)) = part.codes_of(v, scale.inverse, 0);
    if (part.lane == 0) to.scale = __fmul_rn(scale.scale, weight);
  }

 private:
  __device__ Lane::Stored<T> load(int step) const { return part.load_stored<T>(p.act, p.x, p.ldx, token, step); }
};

// Copies codes and scales of this warp's steps: eight lanes the chunks of one.
template <bool kPerGroup>
__device__ void copy_steps(const DirectParams& p, const Pair* pairs, int begin, int end, int lane, Step* of_steps) {
  for (int step = begin + lane / 8; step < end; step += 4) {
    const Position at(step, p.groups);
    const Pair& pair = pairs[at.pair];
    const int64_t tile = at.group * p.token_tiles + pair.index;
    ptx::cp_async_16(ptx::shared_address(of_steps[step].codes) + lane % 8 * kChunkBytes,
                     p.codes + tile * kTileGroupBytes + chunk_offset(0, lane % 8));
    if (lane % 8 != 0) continue;
    of_steps[step].scale = pair.weight * p.act_scales[(kPerGroup ? tile : pair.index) * kTokenTile];
  }
  ptx::cp_async_commit();
}

// X: the type of x in gate_up, void in down.
template <typename X, bool kPerGroup, int kBits>
__global__ void __launch_bounds__(32 * kWarps, kCtasPerSm + 1) direct_kernel(const __grid_constant__ DirectParams p) {
  constexpr bool kUp = !std::is_void_v<X>;
  extern __shared__ __align__(128) uint8_t bytes[];
  using SharedOfCta = Shared<kUp, kPerGroup, kBits>;
  constexpr int kSlots = SharedOfCta::kSlots;
  auto& shared = *reinterpret_cast<SharedOfCta*>(bytes);
  auto* of_steps = reinterpret_cast<Step*>(bytes + sizeof(shared));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t first_block = static_cast<int64_t>(blockIdx.x) * p.blocks;
  const auto blocks = static_cast<int>(min(static_cast<int64_t>(p.blocks), p.row_blocks - first_block));
  const int64_t y_row = blockIdx.y;
  Pair* pairs = shared.pairs[warp];
  const auto first_step = [&](int steps, int of_warp) { return steps * of_warp / kWarps; };
  auto quantizer = [&] {
    if constexpr (kUp) {
      // Ids may be as new as x. The kernels behind read them, and with them weights, as soon as they start.
      ptx::wait_for_previous_kernel();
      ptx::launch_dependents();
      return XQuantizer<X>(p, lane, y_row / p.top_k, first_step(p.groups, warp), first_step(p.groups, warp + 1));
    } else {
      return 0;
    }
  }();
  const int count = kUp ? find_pairs(p, y_row, 1, lane, pairs) : find_pairs(p, y_row * p.top_k, p.top_k, lane, pairs);
  if (kUp && count == 0) return;
  const int steps = count * p.groups, begin = first_step(steps, warp), end = first_step(steps, warp + 1);
  const auto weights_of = [&](int pair) { return p.records + pairs[pair].expert * p.weight_stride; };

  // What does not depend on the kernels ahead: weights, their scales and biases.
  if constexpr (!kPerGroup) {
    const int vectors = 2 * blocks;  // of 8 scales, a pair's
    for (int i = thread; i < count * vectors; i += 32 * kWarps) {
      const int pair = i / vectors, vector = i % vectors;
      ptx::cp_async_16(ptx::shared_address(shared.row_scales[pair]) + vector * 16,
                       weights_of(pair) + p.channel_scales + first_block * kRecordScaleBytes + vector * 16);
    }
  }
  const uint64_t policy = p.read_once ? ptx::evict_first_policy() : ptx::evict_normal_policy();
  Position copy_at(begin, p.groups);
  int copy_block = 0, copies_left = (end - begin) * blocks;
  const auto copy = [&](int slot) {
    if (copies_left > 0) {
      --copies_left;
      const uint8_t* from = weights_of(copy_at.pair);
      const int64_t block = first_block + copy_block;
      const uint32_t to = ptx::shared_address(shared.ring[warp][slot]);
      const uint8_t* record = from + record_offset(block, copy_at.group, p.row_blocks, p.groups, kBits, kPerGroup);
      Record<kBits>::for_each_copy(lane, [&](int at) { ptx::cp_async_16(to + at, record + at, policy); });
      if (kPerGroup && lane < 2) {
        ptx::cp_async_16(to + Record<kBits>::kBytes + lane * 16,
                         from + scales_offset(block, copy_at.group, p.row_blocks, p.groups, kBits) + lane * 16, policy);
      }
      if (++copy_block == blocks) copy_block = 0, copy_at.advance();
    }
    ptx::cp_async_commit();  // commits an empty group too: waits count groups
  };
  for (int slot = 0; slot < kSlots; ++slot) copy(slot);
  const int64_t row = first_block * kRecordRows + thread;  // of y, for the first threads
  float bias = 0.0f;
  if (p.bias != nullptr && thread < blocks * kRecordRows && row < p.n) {
    for (int i = 0; i < count; ++i) {
      bias += (kUp ? 1.0f : pairs[i].weight) * load_float(p.bias, p.bias_dtype, pairs[i].expert * p.n + row);
    }
  }

  if constexpr (kUp) {
    auto* values = reinterpret_cast<float4*>(of_steps + steps);  // in scheme channel, until the row's scale is known
    const int largest = quantizer.run([&](int step, const Values& v, int of_step) {
      if constexpr (kPerGroup) {
        quantizer.store(v, of_step, pairs[0].weight, of_steps[step]);
      } else {
        values[step * 32 + lane] = {v[0], v[1], v[2], v[3]};
      }
    });
    if constexpr (!kPerGroup) {
      if (lane == 0) shared.largest[warp] = largest;
      __syncthreads();
      const int of_row = quantize::largest_of_lanes<32>(lane < kWarps ? shared.largest[lane] : 0);
#pragma unroll 1
      for (int step = begin; step < end; ++step) {
        const float4 four = values[step * 32 + lane];
        quantizer.store({four.x, four.y, four.z, four.w}, of_row, pairs[0].weight, of_steps[step]);
      }
    }
    __syncwarp();
  } else {
    ptx::wait_for_previous_kernel();
    ptx::launch_dependents();
    copy_steps<kPerGroup>(p, pairs, begin, end, lane, of_steps);
    ptx::cp_async_wait<0>();
    __syncwarp();
  }
  if constexpr (!kPerGroup) {
    ptx::cp_async_wait<kSlots - 1>();
    __syncthreads();  // the row scales are other warps' copies
  }

  // All columns of an MMA are the same token. Sums of rows lane / 4 and 8 more.
  float low_sums[kMaxBlocks] = {}, high_sums[kMaxBlocks] = {};
  int32_t totals[kMaxBlocks][4] = {};
  Position at(begin, p.groups);
  int slot = 0;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    const auto* words = reinterpret_cast<const uint32_t*>(of_steps[step].codes) + lane % 4;
    const float scale = of_steps[step].scale;
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) codes[i] = words[4 * i];
    const bool scaled = kPerGroup || at.group + 1 == p.groups || step + 1 == end;
#pragma unroll
    for (int b = 0; b < kMaxBlocks; ++b) {
      if (b >= blocks) break;
      const uint8_t* record = shared.ring[warp][slot];
      ptx::cp_async_wait<kSlots - 1>();
      __syncwarp();
      const Record<kBits> packed(record, lane);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t a[4];
        packed.unpack(s, a);
        ptx::mma_m16n8k32_s8(totals[b], a, codes[2 * s], codes[2 * s + 1]);
      }
      if (scaled) {
        const auto* row_scales = kPerGroup
                                     ? reinterpret_cast<const __half*>(record + Record<kBits>::kBytes)
                                     : reinterpret_cast<const __half*>(shared.row_scales[at.pair] + b * kRecordRows);
        low_sums[b] += static_cast<float>(totals[b][0]) * (__half2float(row_scales[lane / 4]) * scale);
        high_sums[b] += static_cast<float>(totals[b][2]) * (__half2float(row_scales[lane / 4 + 8]) * scale);
#pragma unroll
        for (int32_t& total : totals[b]) total = 0;
      }
      __syncwarp();
      copy(slot);
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
    at.advance();
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (lane % 4 == 0) {
#pragma unroll
    for (int b = 0; b < kMaxBlocks; ++b) {
      shared.sums[warp][b * kRecordRows + lane / 4] = low_sums[b];
      shared.sums[warp][b * kRecordRows + lane / 4 + 8] = high_sums[b];
    }
  }
  __syncthreads();
  if (thread >= blocks * kRecordRows || row >= p.n) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][thread];
  const int64_t to = kUp ? static_cast<int64_t>(pairs[0].index) : y_row;
  store_float(p.y, p.y_dtype, to * p.ldy + row, sum * (1.0f / code_factor(kBits)) + bias);
}

DirectParams params_of(const DirectArgs& args, flexq_projection projection, const Device& device) {
  const flexq_weight_desc weight = weight_of_expert(args.desc, projection);
  DirectParams p{};
  p.ids = args.ids;
  p.top_k = static_cast<int>(args.top_k);
  p.groups = static_cast<int>(num_groups(weight.k));
  p.row_blocks = num_row_blocks(weight);
  const int64_t rows_of_ctas = projection == FLEXQ_GATE_UP ? args.tokens * args.top_k : args.tokens;
  p.blocks = static_cast<int>(std::clamp<int64_t>(
      ceil_div(p.row_blocks * rows_of_ctas, static_cast<int64_t>(device.num_sms) * kCtasPerSm), 1, kMaxBlocks));
  p.records = static_cast<const uint8_t*>(args.prepacked);
  p.weight_stride = args.weight_stride;
  p.channel_scales = static_cast<int64_t>(WeightLayout(weight).scales);
  p.n = weight.n;
  p.bias = args.bias;
  p.bias_dtype = args.bias_dtype;
  p.weights = args.weights;
  p.weights_dtype = args.weights_dtype;
  p.read_once = args.tokens == 1;
  p.y = args.y;
  p.y_dtype = args.y_dtype;
  p.ldy = args.ldy;
  return p;
}

// Of a kernel with so many steps: what each has of activations and, where x is quantized by channel, its values.
template <bool kUp, bool kPerGroup, int kBits>
size_t shared_bytes(int64_t steps) {
  constexpr size_t kStep = sizeof(Step) + (kUp && !kPerGroup ? 32 * sizeof(float4) : 0);
  return sizeof(Shared<kUp, kPerGroup, kBits>) + static_cast<size_t>(steps) * kStep;
}

template <bool kUp>
size_t shared_bytes(const flexq_projection_format& format, int64_t steps) {
  return dispatch_weight_bits(format.weight_bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    return format.scheme == FLEXQ_SCHEME_GROUP ? shared_bytes<kUp, true, kBits>(steps)
                                               : shared_bytes<kUp, false, kBits>(steps);
  });
}

template <typename X, bool kPerGroup, int kBits>
void launch_kernel(cudaStream_t stream, const Device& device, const DirectParams& params, int64_t rows, int64_t steps) {
  constexpr bool kUp = !std::is_void_v<X>;
  const char* what = kUp ? "direct_gate_up" : "direct_down";
  launch(stream, what, direct_kernel<X, kPerGroup, kBits>,
         {.grid = checked_grid(what, ceil_div(params.row_blocks, params.blocks), rows),
          .block = dim3(32 * kWarps),
          .shared_bytes = shared_bytes<kUp, kPerGroup, kBits>(steps),
          .overlapped = device.has_sm90,
          .most_shared = true},
         params);
}

template <typename X>
void launch_for(cudaStream_t stream, const Device& device, const flexq_projection_format& format,
                const DirectParams& params, int64_t rows, int64_t steps) {
  dispatch_weight_bits(format.weight_bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    (format.scheme == FLEXQ_SCHEME_GROUP ? launch_kernel<X, true, kBits>
                                         : launch_kernel<X, false, kBits>)(stream, device, params, rows, steps);
  });
}

}  // namespace

bool has_direct(const Device& device, const flexq_experts_desc& desc, int64_t top_k) {
  const int64_t up_steps = num_groups(desc.hidden), down_steps = top_k * num_groups(desc.intermediate);
  if (top_k > kMaxPairs || std::max(up_steps, down_steps) > kMaxSteps) return false;
  const size_t most = std::max(shared_bytes<true>(desc.gate_up, up_steps), shared_bytes<false>(desc.down, down_steps));
  return most <= static_cast<size_t>(device.shared_per_cta);
}

void direct_gate_up(cudaStream_t stream, const Device& device, const DirectArgs& args) {
  const flexq_activation_desc act = activation_of_expert(args.desc, FLEXQ_GATE_UP, args.tokens);
  DirectParams params = params_of(args, FLEXQ_GATE_UP, device);
  params.act = quantize::params_for(act);
  params.act.vectors = quantize::rows_are_vectors(args.x, args.ldx, args.x_dtype);
  params.x = args.x;
  params.ldx = args.ldx;
  quantize::dispatch_type(args.x_dtype, [&](auto type) {
    launch_for<decltype(type)>(stream, device, args.desc.gate_up, params, args.tokens * args.top_k, params.groups);
  });
}

void direct_down(cudaStream_t stream, const Device& device, const DirectArgs& args) {
  const flexq_activation_desc act = activation_of_expert(args.desc, FLEXQ_DOWN, args.tokens * args.top_k * kTokenTile);
  const ActivationLayout layout(act);
  DirectParams params = params_of(args, FLEXQ_DOWN, device);
  params.codes = static_cast<const uint8_t*>(args.x);
  params.act_scales = reinterpret_cast<const float*>(params.codes + layout.scales);
  params.token_tiles = layout.tiles;
  launch_for<void>(stream, device, args.desc.down, params, args.tokens, params.top_k * params.groups);
}

}  // namespace flexq::cuda::experts
