// What the kernels of a mixture-of-experts layer share: where its pairs of a token and an expert lie.
//
// Pairs are sorted by expert, and within an expert by token. Outputs have a row for each, without gaps. Quantized
// activations are padded, so that every expert's begin a tile of `tile_tokens`: tile i of all has rows i * tile_tokens
// on, of one expert.
#pragma once

#include <cstdint>

#include "cuda/params.h"

namespace flexq::cuda::experts {

// Which expert each pair is for, as the router says it.
struct Ids {
  const void* ids;     // [pairs]
  bool wide;           // int64, else int32
  const int32_t* map;  // from ids to the experts that are here, or null
  int64_t known;       // ids
  int experts;         // here
};

// Of a pair: its place among the padded activations, and its row of outputs. Both are -1 if its expert is not here.
struct Place {
  int32_t act, row;
};

struct alignas(16) ExpertTile {
  int32_t expert;
  int32_t tokens;  // up to tile_tokens; 0 past the last tile
  int32_t row;     // of outputs, the first token's
  int32_t unused;
};

// What routing gives. It stays on the device: the host knows only how many tiles there may be.
struct Routed {
  int32_t* num_tiles;
  ExpertTile* tiles;  // as many as there may be
  Place* places;      // [pairs]
  int32_t* pairs;     // of each row of outputs
};

// What the GEMMs need of it, and where an expert's part of the weights and biases begins.
struct ExpertTable {
  const int32_t* num_tiles;
  const ExpertTile* tiles;
  int tile_tokens;
  int64_t weight_stride, bias_stride;  // bytes
};

}  // namespace flexq::cuda::experts
