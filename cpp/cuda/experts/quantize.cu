// Quantizers between the steps of a mixture-of-experts layer: of tokens, each to the places of all its pairs, and of
// what is between the two GEMMs. Where pairs are many: gather.cu, hidden_tiles.cu.
#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/experts/hidden.cuh"
#include "cuda/experts/kernels.h"
#include "cuda/launch.h"
#include "cuda/quantize/group_part.cuh"

namespace flexq::cuda::experts {
namespace {

using quantize::Scale;

constexpr int kGroupWarps = 8;      // of a CTA, each with a group
constexpr int kMaxTokenWarps = 16;  // of a CTA that has a whole row
constexpr int kKept = 128;          // groups of a row that stay in shared memory until its scale is known
constexpr int kLanes = 32;

// A source is what is quantized: `begin` has what is known of an item before the kernel ahead has finished. early():
// that is all but the places.

// Rows of x: a token's codes go to all its pairs.
struct Tokens {
  using Item = int64_t;  // token

  const void* x;
  int64_t ldx;
  int top_k;
  const Place* places;
  const void* weights;  // or null
  flexq_dtype weights_dtype;

  __device__ bool early() const { return true; }  // the kernel that sorts has waited for x
  __device__ bool ids_only() const { return false; }
  __device__ Item begin(int64_t token) const { return token; }
  __device__ bool exists(Item) const { return true; }

  template <typename T>
  __device__ void load(const quantize::Params& p, const Lane& part, Item token, int64_t group, Values& v) const {
    part.load<T>(p, x, ldx, token, group, v);
  }

  // use(place, what the scale is multiplied by), by all lanes of a warp
  template <typename Use>
  __device__ void for_each_place(Item token, const Use& use) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (int first = 0; first < top_k; first += 32) {
      const int count = min(top_k - first, 32);
      int64_t place = -1;  // of a lane's pair
      float factor = 1.0f;
      if (lane < count) {
        const int64_t pair = token * top_k + first + lane;
        place = places[pair].act;
        if (weights != nullptr) factor = load_float(weights, weights_dtype, pair);
      }
      for (int i = 0; i < count; ++i) {
        const int64_t to = __shfl_sync(~0u, place, i);
        const float times = __shfl_sync(~0u, factor, i);
        if (to >= 0) use(to, times);
      }
    }
  }
};

// h of pairs, from their rows of gate and up values.
struct Hidden {
  using Item = Place;

  HiddenRows<> rows;
  const Place* places;  // null: every pair has a tile of its own

  __device__ bool early() const { return false; }
  __device__ bool ids_only() const { return places == nullptr; }
  __device__ Item begin(int64_t pair) const {
    return places == nullptr ? Place{static_cast<int>(pair * kTokenTile), static_cast<int>(pair)} : places[pair];
  }
  __device__ bool exists(Item place) const { return place.row >= 0; }

  template <typename T>
  __device__ void load(const quantize::Params& p, const Lane& part, Item place, int64_t group, Values& v) const {
    rows.load<T>(p, part, place.row, group, v);
  }

  template <typename Use>
  __device__ void for_each_place(Item place, const Use& use) const {
    use(place.act, 1.0f);
  }
};

// Items are tokens or pairs.
template <typename Source>
struct QuantizeParams : quantize::Params {
  Source from;
  int64_t items;
};

// What is behind reads what routing gave as soon as it starts (table.cuh): so not before this kernel has waited, unless
// the ids themselves are all of it, which the first kernel of the layer has waited for.
template <typename Source>
__device__ void wait(const Source& from) {
  if (from.ids_only()) ptx::launch_dependents();
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
}

// Scheme group: a warp has a group of an item.
template <typename T, typename Source>
__global__ void __launch_bounds__(32 * kGroupWarps) quantize_groups(const __grid_constant__ QuantizeParams<Source> p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGroupWarps + threadIdx.x / 32;
  const int64_t group = index % p.groups;
  if (index / p.groups >= p.items) return wait(p.from);
  const auto item = p.from.begin(index / p.groups);
  if (!p.from.early()) wait(p.from);
  if (!p.from.exists(item)) return;
  const Lane part(static_cast<int>(threadIdx.x % 32));
  Values v;
  p.from.template load<T>(p, part, item, group, v);
  const int largest = quantize::largest_of_lanes<kLanes>(part.rotate_and_max(p, v));
  const Scale scale = quantize::scale_of(largest, p.rotate, p.qmax);
  if (p.from.early()) wait(p.from);
  p.from.for_each_place(item, [&](int64_t place, float factor) {
    part.store_codes(p, place, group, v, scale.inverse);
    if (part.lane == 0) p.scales[group * p.tiles * kTokenTile + place] = __fmul_rn(scale.scale, factor);
  });
}

// Scheme channel: a CTA has an item. Its values stay in shared memory until the scale of all is known; groups beyond
// those are read again. Loops are not unrolled: instructions would take longer to arrive than data.
template <typename T, typename Source>
__global__ void __launch_bounds__(32 * kMaxTokenWarps)
    quantize_tokens(const __grid_constant__ QuantizeParams<Source> p) {
  extern __shared__ float4 kept[];  // [groups][32]
  __shared__ int of_warp[kMaxTokenWarps];
  const auto item = p.from.begin(blockIdx.x);
  if (!p.from.early()) wait(p.from);
  if (!p.from.exists(item)) return;
  const Lane part(static_cast<int>(threadIdx.x % 32));
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  const auto read = [&](int64_t group, Values& v) {
    p.from.template load<T>(p, part, item, group, v);
    return part.rotate_and_max(p, v);
  };
  int largest = 0;
#pragma unroll 1
  for (int64_t group = warp; group < p.groups; group += warps) {
    Values v;
    largest = max(largest, read(group, v));
    if (group < kKept) kept[group * 32 + part.lane] = {v[0], v[1], v[2], v[3]};
  }
  largest = quantize::largest_of_lanes<kLanes>(largest);
  if (part.lane == 0) of_warp[warp] = largest;
  __syncthreads();
  for (int w = 0; w < warps; ++w) largest = max(largest, of_warp[w]);
  const Scale scale = quantize::scale_of(largest, p.rotate, p.qmax);
  if (p.from.early()) wait(p.from);
  p.from.for_each_place(item, [&](int64_t place, float factor) {
    if (threadIdx.x == 0) p.scales[place] = __fmul_rn(scale.scale, factor);
  });
#pragma unroll 1
  for (int64_t group = warp; group < p.groups; group += warps) {
    Values v;
    if (group < kKept) {
      const float4 four = kept[group * 32 + part.lane];
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    } else {
      read(group, v);
    }
    p.from.for_each_place(item, [&](int64_t place, float) { part.store_codes(p, place, group, v, scale.inverse); });
  }
}

template <typename Source>
QuantizeParams<Source> params_of(const flexq_activation_desc& act, void* quantized, const Source& from, int64_t items,
                                 bool vectors) {
  QuantizeParams<Source> params{quantize::params_for(act, quantized), from, items};
  params.vectors = vectors;
  return params;
}

template <typename T, typename Source>
void launch_for(cudaStream_t stream, const Device& device, const char* what, const QuantizeParams<Source>& params) {
  if (params.per_group) {
    launch(stream, what, quantize_groups<T, Source>,
           {.grid = checked_grid(what, ceil_div(params.items * params.groups, kGroupWarps)),
            .block = dim3(32 * kGroupWarps),
            .overlapped = device.has_sm90,
            .most_shared = true},
           params);
  } else {
    const int64_t warps = std::min<int64_t>(params.groups, kMaxTokenWarps);
    launch(stream, what, quantize_tokens<T, Source>,
           {.grid = checked_grid(what, params.items),
            .block = dim3(static_cast<unsigned>(32 * warps)),
            .shared_bytes = static_cast<size_t>(std::min<int64_t>(params.groups, kKept)) * 32 * sizeof(float4),
            .overlapped = device.has_sm90,
            .most_shared = true},
           params);
  }
}

template <typename Source>
void launch_for(cudaStream_t stream, const Device& device, const char* what, flexq_dtype dtype,
                const QuantizeParams<Source>& params) {
  quantize::dispatch_type(dtype, [&](auto type) { launch_for<decltype(type)>(stream, device, what, params); });
}

}  // namespace

void quantize_inputs(cudaStream_t stream, const Device& device, const InputsArgs& args) {
  const Tokens from{args.x, args.ldx, static_cast<int>(args.top_k), args.places, args.weights, args.weights_dtype};
  launch_for(
      stream, device, "quantize_inputs", args.dtype,
      params_of(args.act, args.quantized, from, args.tokens, quantize::rows_are_vectors(args.x, args.ldx, args.dtype)));
}

void quantize_hidden(cudaStream_t stream, const Device& device, const HiddenArgs& args) {
  const Hidden from{hidden_rows(args.desc, args.u), args.places};
  launch_for(
      stream, device, "quantize_hidden", args.dtype,
      params_of(args.act, args.quantized, from, args.pairs, hidden_rows_are_vectors(args.desc, args.u, args.dtype)));
}

}  // namespace flexq::cuda::experts
