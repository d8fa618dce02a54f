// Quantizers between the steps of a mixture-of-experts layer: of tokens, each to the places of all its pairs, and of
// what is between the two GEMMs.
#include <algorithm>
#include <cmath>

#include "cuda/elements.cuh"
#include "cuda/experts/kernels.h"
#include "cuda/launch.h"
#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda::experts {
namespace {

using quantize::Part;
using quantize::rounded;
using quantize::Scale;
using quantize::Vector;

constexpr int kGroupWarps = 8;      // of a CTA, each with a group
constexpr int kMaxTokenWarps = 16;  // of a CTA that has a whole row
constexpr int kKept = 8;            // groups that a warp keeps in registers until the row's scale is known
constexpr int kLanes = 32;
using Lane = Part<kLanes>;
using Values = float[Lane::kValues];

// A source is what is quantized: `begin` has what is known of an item before the kernel ahead has finished. kEarly:
// that is all but the places.

// Rows of x: a token's codes go to all its pairs.
struct Tokens {
  static constexpr bool kEarly = true;
  using Item = int64_t;  // token

  const void* x;
  int64_t ldx;
  int top_k;
  const Place* places;
  const void* weights;  // or null
  flexq_dtype weights_dtype;

  __device__ Item begin(int64_t token) const { return token; }
  __device__ bool exists(Item) const { return true; }

  template <typename T>
  __device__ void load(const quantize::Params& p, const Lane& part, Item token, int64_t group, Values& v) const {
    part.load<T>(p, x, ldx, token, group, v);
  }

  // use(place, what the scale is multiplied by)
  template <typename Use>
  __device__ void for_each_place(Item token, const Use& use) const {
    for (int j = 0; j < top_k; ++j) {
      const int64_t pair = token * top_k + j;
      const int place = places[pair].act;
      if (place >= 0) use(place, weights == nullptr ? 1.0f : load_float(weights, weights_dtype, pair));
    }
  }
};

// h of pairs, from their rows of gate and up values.
struct Hidden {
  static constexpr bool kEarly = false;
  using Item = Place;

  const void* u;
  int64_t intermediate;
  const Place* places;
  flexq_gate_function function;
  bool interleaved;
  float alpha, limit, up_offset;

  __device__ Item begin(int64_t pair) const { return places[pair]; }
  __device__ bool exists(Item place) const { return place.row >= 0; }

  template <typename T>
  __device__ void load(const quantize::Params& p, const Lane& part, Item place, int64_t group, Values& v) const {
    const T* row = static_cast<const T*>(u) + place.row * 2 * intermediate;
    Values up;
    if (interleaved) {
      load_interleaved(p, row, group * kGroup + part.k(0), v, up);
    } else {
      part.load<T>(p, row, 0, 0, group, v);
      part.load<T>(p, row + intermediate, 0, 0, group, up);
    }
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) {
      const bool there = group * kGroup + part.k(0) + i < intermediate;
      v[i] = there ? rounded<T>(rounded<T>(gate(v[i])) * rounded<T>(clamped(up[i]) + up_offset)) : 0.0f;
    }
  }

  template <typename Use>
  __device__ void for_each_place(Item place, const Use& use) const {
    use(place.act, 1.0f);
  }

 private:
  static_assert(Lane::kVectors == 1, "a lane's values are neighbours");

  template <typename T>
  __device__ void load_interleaved(const quantize::Params& p, const T* row, int64_t at, Values& gates,
                                   Values& ups) const {
    constexpr int kCount = 2 * Lane::kValues;
    Vector<T, kCount> both;
    if (p.vectors && at + Lane::kValues <= intermediate) {
      both = *reinterpret_cast<const Vector<T, kCount>*>(row + 2 * at);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        both.value[i] = 2 * at + i < 2 * intermediate ? row[2 * at + i] : quantize::from_float<T>(0.0f);
      }
    }
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) {
      gates[i] = quantize::to_float(both.value[2 * i]);
      ups[i] = quantize::to_float(both.value[2 * i + 1]);
    }
  }

  // Comparisons that NaN fails, so that it stays.
  __device__ float clamped(float up) const { return up < -limit ? -limit : limit < up ? limit : up; }

  __device__ float gate(float g) const {
    constexpr float kInverseSqrt2 = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f;
    if (limit < g) g = limit;
    switch (function) {
      case FLEXQ_GATE_GELU:
        return 0.5f * g * (1.0f + erff(g * kInverseSqrt2));
      case FLEXQ_GATE_GELU_TANH:
        return 0.5f * g * (1.0f + tanhf(kSqrt2OverPi * (g + 0.044715f * g * g * g)));
      default:
        return __fdiv_rn(g, 1.0f + expf(-alpha * g));
    }
  }
};

// Items are tokens or pairs.
template <typename Source>
struct QuantizeParams : quantize::Params {
  Source from;
  int64_t items;
};

// What is behind reads what routing gave as soon as it starts (table.cuh): so not before this kernel has waited.
__device__ void wait() {
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
}

// Scheme group: a warp has a group of an item.
template <typename T, typename Source>
__global__ void __launch_bounds__(32 * kGroupWarps) quantize_groups(const __grid_constant__ QuantizeParams<Source> p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGroupWarps + threadIdx.x / 32;
  const int64_t group = index % p.groups;
  if (index / p.groups >= p.items) return wait();
  const auto item = p.from.begin(index / p.groups);
  if constexpr (!Source::kEarly) wait();
  if (!p.from.exists(item)) return;
  const Lane part(static_cast<int>(threadIdx.x % 32));
  Values v;
  p.from.template load<T>(p, part, item, group, v);
  const int largest = quantize::largest_of_lanes<kLanes>(part.rotate_and_max(p, v));
  const Scale scale = quantize::scale_of(largest, p.rotate, p.qmax);
  if constexpr (Source::kEarly) wait();
  p.from.for_each_place(item, [&](int place, float factor) {
    part.store_codes(p, place, group, v, scale.inverse);
    if (part.lane == 0) p.scales[group * p.tiles * kTokenTile + place] = __fmul_rn(scale.scale, factor);
  });
}

// Scheme channel: a CTA has an item. Groups beyond what its warps keep are read again.
template <typename T, typename Source>
__global__ void __launch_bounds__(32 * kMaxTokenWarps)
    quantize_tokens(const __grid_constant__ QuantizeParams<Source> p) {
  __shared__ int of_warp[kMaxTokenWarps];
  const auto item = p.from.begin(blockIdx.x);
  if constexpr (!Source::kEarly) wait();
  if (!p.from.exists(item)) return;
  const Lane part(static_cast<int>(threadIdx.x % 32));
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const auto read = [&](int64_t group, Values& v) {
    p.from.template load<T>(p, part, item, group, v);
    return part.rotate_and_max(p, v);
  };
  Values kept[kKept];
  int largest = 0;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (warp + i * warps < p.groups) largest = max(largest, read(warp + i * warps, kept[i]));
  }
  const int64_t first_again = warp + kKept * warps;
  for (int64_t group = first_again; group < p.groups; group += warps) {
    Values v;
    largest = max(largest, read(group, v));
  }
  largest = quantize::largest_of_lanes<kLanes>(largest);
  if (part.lane == 0) of_warp[warp] = largest;
  __syncthreads();
  for (int w = 0; w < warps; ++w) largest = max(largest, of_warp[w]);
  const Scale scale = quantize::scale_of(largest, p.rotate, p.qmax);
  if constexpr (Source::kEarly) wait();
  p.from.for_each_place(item, [&](int place, float factor) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (warp + i * warps < p.groups) part.store_codes(p, place, warp + i * warps, kept[i], scale.inverse);
    }
    if (threadIdx.x == 0) p.scales[place] = __fmul_rn(scale.scale, factor);
  });
  for (int64_t group = first_again; group < p.groups; group += warps) {
    Values v;
    read(group, v);
    p.from.for_each_place(item, [&](int place, float) { part.store_codes(p, place, group, v, scale.inverse); });
  }
}

template <typename Source>
QuantizeParams<Source> params_of(const flexq_activation_desc& act, void* quantized, const Source& from, int64_t items,
                                 bool vectors) {
  const ActivationLayout layout(act);
  auto* bytes = static_cast<uint8_t*>(quantized);
  QuantizeParams<Source> params{};
  params.m = act.m;
  params.k = act.k;
  params.groups = num_groups(act.k);
  params.tiles = layout.tiles;
  params.qmax = act_max_code(act.act_bits);
  params.rotate = act.rotation == FLEXQ_ROTATION_HADAMARD128;
  params.per_group = act.scheme == FLEXQ_SCHEME_GROUP;
  params.vectors = vectors;
  params.cluster = 1;
  params.codes = bytes;
  params.scales = reinterpret_cast<float*>(bytes + layout.scales);
  params.from = from;
  params.items = items;
  return params;
}

template <typename T, typename Source>
void launch_for(cudaStream_t stream, const Device& device, const char* what, const QuantizeParams<Source>& params) {
  if (params.per_group) {
    launch(stream, what, quantize_groups<T, Source>,
           {.grid = checked_grid(what, ceil_div(params.items * params.groups, kGroupWarps)),
            .block = dim3(32 * kGroupWarps),
            .overlapped = device.has_sm90},
           params);
  } else {
    const int64_t warps = std::min<int64_t>(params.groups, kMaxTokenWarps);
    launch(stream, what, quantize_tokens<T, Source>,
           {.grid = checked_grid(what, params.items),
            .block = dim3(static_cast<unsigned>(32 * warps)),
            .overlapped = device.has_sm90},
           params);
  }
}

template <typename Source>
void launch_for(cudaStream_t stream, const Device& device, const char* what, flexq_dtype dtype,
                const QuantizeParams<Source>& params) {
  switch (dtype) {
    case FLEXQ_F16:
      return launch_for<__half>(stream, device, what, params);
    case FLEXQ_BF16:
      return launch_for<__nv_bfloat16>(stream, device, what, params);
    default:
      return launch_for<float>(stream, device, what, params);
  }
}

// 16-byte accesses to all rows are aligned.
bool rows_are_vectors(const void* rows, int64_t ld, flexq_dtype dtype) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && ld * (dtype == FLEXQ_F32 ? 4 : 2) % 16 == 0;
}

}  // namespace

void quantize_inputs(cudaStream_t stream, const Device& device, const InputsArgs& args) {
  const Tokens from{args.x, args.ldx, static_cast<int>(args.top_k), args.places, args.weights, args.weights_dtype};
  launch_for(stream, device, "quantize_inputs", args.dtype,
             params_of(args.act, args.quantized, from, args.tokens, rows_are_vectors(args.x, args.ldx, args.dtype)));
}

void quantize_hidden(cudaStream_t stream, const Device& device, const HiddenArgs& args) {
  const flexq_experts_desc& desc = args.desc;
  const Hidden from{.u = args.u,
                    .intermediate = desc.intermediate,
                    .places = args.places,
                    .function = desc.function,
                    .interleaved = desc.layout == FLEXQ_GATE_UP_INTERLEAVED,
                    .alpha = desc.alpha,
                    .limit = desc.limit > 0.0f ? desc.limit : INFINITY,
                    .up_offset = desc.up_offset};
  // Of both halves of a row, where they are halves.
  const bool vectors =
      rows_are_vectors(args.u, from.interleaved ? 2 * desc.intermediate : desc.intermediate, args.dtype);
  launch_for(stream, device, "quantize_hidden", args.dtype,
             params_of(args.act, args.quantized, from, args.pairs, vectors));
}

}  // namespace flexq::cuda::experts
