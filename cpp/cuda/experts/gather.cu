// Copies quantized tokens to the places of their pairs. A tile of 8 places is written whole: 16 bytes at a time, as a
// token that is quantized to all its places would, take L2 several times as long.
#include "cuda/elements.cuh"
#include "cuda/experts/kernels.h"
#include "cuda/experts/table.cuh"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda::experts {
namespace {

constexpr int kThreads = 256;

struct GatherParams {
  const uint8_t* codes;
  const float* scales;
  int64_t tiles;  // of 8 tokens
  uint8_t* to_codes;
  float* to_scales;
  int64_t to_tiles;  // of 8 places
  int64_t groups;
  bool per_group;
  ExpertTable table;
  const int32_t* pairs;
  int top_k;
  const void* weights;
  flexq_dtype weights_dtype;
};

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  ptx::wait_for_previous_kernel();
  ptx::launch_dependents();
  const int64_t tile = blockIdx.x;
  const int tiles = p.table.tile_tokens / kTokenTile;
  const ExpertTile at = load_tile(p.table, static_cast<int>(tile / tiles));
  const int place = static_cast<int>(threadIdx.x) % kTokenTile,
            token_of_tile = static_cast<int>(tile % tiles) * kTokenTile + place;
  if (token_of_tile >= at.tokens) return;
  const int pair = p.pairs[at.row + token_of_tile], token = pair / p.top_k;
  const int first = static_cast<int>(threadIdx.x) / kTokenTile;
  constexpr int kStride = kThreads / kTokenTile, kChunks = kGroup / kChunkBytes;

  const uint8_t* from = p.codes + token / kTokenTile * int64_t{kTileGroupBytes} + chunk_offset(token % kTokenTile, 0);
  uint8_t* to = p.to_codes + tile * kTileGroupBytes + chunk_offset(place, 0);
#pragma unroll 4
  for (int64_t chunk = first; chunk < p.groups * kChunks; chunk += kStride) {
    const int64_t group = chunk / kChunks, within = chunk % kChunks * kCoreMatrixBytes;
    *reinterpret_cast<uint4*>(to + group * p.to_tiles * kTileGroupBytes + within) =
        *reinterpret_cast<const uint4*>(from + group * p.tiles * kTileGroupBytes + within);
  }
  const float factor = p.weights == nullptr ? 1.0f : load_float(p.weights, p.weights_dtype, pair);
  const int64_t to_place = tile * kTokenTile + place;
  for (int64_t group = first; group < (p.per_group ? p.groups : 1); group += kStride) {
    p.to_scales[group * p.to_tiles * kTokenTile + to_place] =
        __fmul_rn(p.scales[group * p.tiles * kTokenTile + token], factor);
  }
}

}  // namespace

void gather(cudaStream_t stream, const Device& device, const GatherArgs& args) {
  const ActivationLayout tokens(args.tokens), places(args.places);
  const auto* from = static_cast<const uint8_t*>(args.from);
  auto* to = static_cast<uint8_t*>(args.to);
  const GatherParams params{.codes = from,
                            .scales = reinterpret_cast<const float*>(from + tokens.scales),
                            .tiles = tokens.tiles,
                            .to_codes = to,
                            .to_scales = reinterpret_cast<float*>(to + places.scales),
                            .to_tiles = places.tiles,
                            .groups = num_groups(args.tokens.k),
                            .per_group = args.tokens.scheme == FLEXQ_SCHEME_GROUP,
                            .table = args.table,
                            .pairs = args.pairs,
                            .top_k = static_cast<int>(args.top_k),
                            .weights = args.weights,
                            .weights_dtype = args.weights_dtype};
  launch(stream, "gather", gather_kernel,
         {.grid = checked_grid("gather", places.tiles), .block = dim3(kThreads), .overlapped = device.has_sm90},
         params);
}

}  // namespace flexq::cuda::experts
