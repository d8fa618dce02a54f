// What a launch passes to the quantizers, and their limits.
#pragma once

#include <cstdint>

#include "core/backend.h"

namespace flexq::cuda::quantize {

constexpr int kWarps = 8;              // of a CTA, where nothing of the whole token is needed
constexpr int kMaxTokenThreads = 512;  // of a CTA, where the whole token decides
constexpr int kMaxCluster = 16;

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

// Groups that a warp keeps in registers while a statistic of the whole token is reduced. Fusing takes registers too.
constexpr int kept_groups(ActivationSource::Kind kind, int lanes) {
  return lanes == 32 || kind == ActivationSource::kPlain ? 2 : 1;
}

// CTAs an SM has registers for. Kernels for few tokens must fit beside the GEMM before them, to start as it ends.
constexpr int min_ctas(int lanes) { return lanes == 32 ? 2 : 1; }

}  // namespace flexq::cuda::quantize
