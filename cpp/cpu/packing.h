// How the CPU packs the codes of each width into bytes.
#pragma once

#include "core/format.h"

namespace flexq::cpu {

// A block is 16 rows, a quad 4 k of a block: 64 bytes, those of row r and i = 0..3 at 4 * r + i, which is what one
// instruction multiplies with 4 codes of an activation.
inline constexpr int kBlockRows = 16;
inline constexpr int kQuadK = 4;
inline constexpr int kQuadBytes = kQuadK * kBlockRows;
inline constexpr int kGroupQuads = kGroup / kQuadK;

constexpr int block_group_bytes(int bits) { return kBlockRows * group_bytes(bits); }

// A block's group of codes of b bits is a row of chunks: `vectors` times 64 bytes that hold `quads` quads. The low b
// bits of vector j are quad j, as code + 2^(b-1), which is never negative. The quads after those are in the bits above:
// a field moves `count` bits, from bit `from` of a vector to bit `to` of a quad. The fields of a quad come from its
// lowest bit on.
struct Packing {
  struct Field {
    int quad;
    int vector;
    int from;
    int to;
    int count;
  };
  int vectors;
  int quads;
  int num_fields;
  Field fields[7];
};

constexpr Packing packing_of(int bits) {
  switch (bits) {
    case 4:
      return {1, 2, 1, {{1, 0, 4, 0, 4}}};
    case 5:
      return {5,
              8,
              7,
              {{5, 3, 6, 0, 2},
               {5, 0, 5, 2, 3},
               {6, 4, 6, 0, 2},
               {6, 1, 5, 2, 3},
               {7, 4, 5, 0, 1},
               {7, 3, 5, 1, 1},
               {7, 2, 5, 2, 3}}};
    case 6:
      return {3, 4, 3, {{3, 2, 6, 0, 2}, {3, 1, 6, 2, 2}, {3, 0, 6, 4, 2}}};
    default:
      return {1, 1, 0, {}};
  }
}

// Neither adds nor loses bits: every bit of every vector is used once.
constexpr bool fills_its_bytes(int bits) {
  const Packing p = packing_of(bits);
  unsigned used[8] = {}, known[8] = {};
  for (int v = 0; v < p.vectors; ++v) used[v] = known[v] = (1u << bits) - 1;
  for (int i = 0; i < p.num_fields; ++i) {
    const Packing::Field& f = p.fields[i];
    const unsigned mask = (1u << f.count) - 1;
    if ((used[f.vector] & mask << f.from) != 0 || (known[f.quad] & mask << f.to) != 0) return false;
    used[f.vector] |= mask << f.from;
    known[f.quad] |= mask << f.to;
  }
  for (int v = 0; v < p.vectors; ++v) {
    if (used[v] != 0xff) return false;
  }
  for (int q = 0; q < p.quads; ++q) {
    if (known[q] != (1u << bits) - 1) return false;
  }
  return kGroupQuads % p.quads == 0;
}
static_assert(fills_its_bytes(4) && fills_its_bytes(5) && fills_its_bytes(6) && fills_its_bytes(8));

}  // namespace flexq::cpu
