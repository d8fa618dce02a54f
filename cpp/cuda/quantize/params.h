// What a launch passes to the quantizers, and their limits.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "core/format.h"
#include "cuda/layout.h"

namespace flexq::cuda::quantize {

constexpr int kWarps = 8;              // of a CTA, where nothing of the whole token is needed
constexpr int kMaxTokenThreads = 512;  // of a CTA, where the whole token decides
constexpr int kMaxCluster = 16;

// Where a CTA has two tokens: the least whose codes fill sectors of 32 bytes. 4 lanes have a group, half a warp a
// token.
constexpr int kPairTokens = 2;
constexpr int kPairWarpGroups = 32 / kPairTokens / 4;
constexpr int kMaxPairThreads = 1024;
constexpr int kMaxPairGroups = kMaxPairThreads / 32 * kPairWarpGroups;

// Matrices that a source reads, a norm's weight aside.
constexpr int inputs_of(ActivationSource::Kind kind) { return kind == ActivationSource::kPlain ? 1 : 2; }

struct Params {
  ActivationSource source;
  int64_t m;
  int64_t k;
  int64_t groups;
  int64_t tiles;
  int qmax;
  bool rotate;
  bool per_group;
  bool vectors;   // all rows are aligned for 16 bytes at a time
  int cluster;    // CTAs that share a tile of tokens, or a token
  bool prefetch;  // the next tile is copied to shared memory while one is quantized
  uint8_t* codes;
  float* scales;
};

// Those of a format; what a launch adds: source, vectors, codes and scales.
inline Params params_for(const flexq_activation_desc& desc) {
  Params params{};
  params.m = desc.m;
  params.k = desc.k;
  params.groups = num_groups(desc.k);
  params.tiles = ceil_div(desc.m, kTokenTile);
  params.qmax = act_max_code(desc.act_bits);
  params.rotate = desc.rotation == FLEXQ_ROTATION_HADAMARD128;
  params.per_group = desc.scheme == FLEXQ_SCHEME_GROUP;
  params.cluster = 1;
  return params;
}
// The same, with the memory that codes and scales go to (layout.h).
inline Params params_for(const flexq_activation_desc& desc, void* quantized) {
  Params params = params_for(desc);
  params.codes = static_cast<uint8_t*>(quantized);
  params.scales = reinterpret_cast<float*>(params.codes + ActivationLayout(desc).scales);
  return params;
}

// 16-byte accesses to all rows are aligned.
inline bool rows_are_vectors(const void* rows, int64_t ld, flexq_dtype dtype) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && ld * (dtype == FLEXQ_F32 ? 4 : 2) % 16 == 0;
}

// Groups that a warp keeps in registers while a statistic of the whole token is reduced. Fusing takes registers too.
constexpr int kept_groups(ActivationSource::Kind kind, int lanes) {
  return lanes == 32 || kind == ActivationSource::kPlain ? 2 : 1;
}

// CTAs an SM has registers for. Kernels for few tokens must fit beside the GEMM before them, to start as it ends.
constexpr int min_ctas(int lanes) { return lanes == 32 ? 2 : 1; }

}  // namespace flexq::cuda::quantize
