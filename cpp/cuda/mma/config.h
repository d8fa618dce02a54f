// The tile shapes of the mma.sync GEMM, and what a launch passes to its kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "cuda/layout.h"
#include "cuda/params.h"

namespace flexq::cuda::mma {

// kB1A6, kB1A8: int8 products as weighted sums of 1-bit products (arXiv 2508.04405), a cross-check of the others.
enum class Product { kS8, kB1A6, kB1A8 };

struct Config {
  int token_tiles;  // of 8 tokens each, in a CTA's tile
  int warps_n;      // warps side by side along N
  int warps_k;      // warps that share K, each taking every warps_k-th group
  int blocks;       // of 16 rows, a warp's; the most it may have where it loads its own activations
  int slots;        // records in a warp's ring of copies
  int ctas_per_sm;  // that registers and shared memory are planned for
  bool shared_act;  // the CTA copies activations to shared memory once for all warps
  Product product = Product::kS8;
  int weight_bits = 6;

  constexpr int threads() const { return 32 * warps_n * warps_k; }
  constexpr int tokens() const { return kTokenTile * token_tiles; }
  constexpr int warp_rows() const { return kRecordRows * blocks; }
  constexpr int rows() const { return warp_rows() * warps_n; }
  constexpr int stages() const { return slots / blocks; }  // of shared activations
  constexpr int ring_bytes(bool per_group) const {
    return warps_n * warps_k * slots * record_and_scale_bytes(weight_bits, per_group);
  }
  constexpr int act_step_bytes(bool per_group) const {
    return warps_k * token_tiles * (kTileGroupBytes + (per_group ? kTokenTile * 4 : 0));
  }
  constexpr int act_ring_bytes(bool per_group) const { return shared_act ? stages() * act_step_bytes(per_group) : 0; }
  // Where registers allow, a warp loads its activations one step ahead.
  constexpr bool act_ahead() const { return !shared_act && token_tiles <= 2 && token_tiles * blocks <= 8; }
  constexpr int sums() const { return rows() * tokens(); }
  constexpr int shared_bytes(bool per_group) const {
    const int rings = ring_bytes(per_group) + act_ring_bytes(per_group);
    return std::max(rings, warps_k * sums() * 4);  // the sums overlay the rings
  }
};

// dispatch.cpp chooses among these by their costs; the index is GemmPlan::config.
constexpr Config kConfigs[] = {
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 1, .slots = 2, .ctas_per_sm = 4, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 2, .slots = 3, .ctas_per_sm = 3, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 4, .slots = 6, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 1, .warps_n = 1, .warps_k = 8, .blocks = 8, .slots = 8, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 1, .slots = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 2, .slots = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 4, .slots = 6, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 1, .warps_k = 8, .blocks = 8, .slots = 8, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 2, .warps_n = 4, .warps_k = 2, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 2, .warps_n = 8, .warps_k = 1, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 4, .warps_n = 1, .warps_k = 8, .blocks = 2, .slots = 3, .ctas_per_sm = 2, .shared_act = false},
    {.token_tiles = 4, .warps_n = 1, .warps_k = 8, .blocks = 4, .slots = 6, .ctas_per_sm = 1, .shared_act = false},
    {.token_tiles = 4, .warps_n = 4, .warps_k = 2, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 4, .warps_n = 8, .warps_k = 1, .blocks = 2, .slots = 6, .ctas_per_sm = 2, .shared_act = true},
    {.token_tiles = 8, .warps_n = 8, .warps_k = 1, .blocks = 2, .slots = 6, .ctas_per_sm = 1, .shared_act = true},
    {.token_tiles = 1,
     .warps_n = 1,
     .warps_k = 8,
     .blocks = 1,
     .slots = 3,
     .ctas_per_sm = 3,
     .shared_act = false,
     .product = Product::kB1A6},
    {.token_tiles = 1,
     .warps_n = 1,
     .warps_k = 8,
     .blocks = 1,
     .slots = 3,
     .ctas_per_sm = 3,
     .shared_act = false,
     .product = Product::kB1A8},
};

// Of weights of so many bits.
constexpr Config config_for(int index, int weight_bits) {
  Config c = kConfigs[index];
  c.weight_bits = weight_bits;
  return c;
}
// Bits are for 6-bit weights, and as many CTAs as are planned for must fit on an SM.
constexpr bool has_kernel(int index, int weight_bits, bool per_group) {
  constexpr int kSharedPerSm = 228 * 1024, kReserved = 1024;
  const Config c = config_for(index, weight_bits);
  return (c.product == Product::kS8 || weight_bits == 6) &&
         (c.shared_bytes(per_group) + kReserved) * c.ctas_per_sm <= kSharedPerSm;
}

struct Params : LinearParams {
  int64_t row_blocks;   // of 16 rows
  int blocks;           // of them, a warp's
  int groups;           // of 128 k
  int steps;            // ceil(groups / warps_k)
  int64_t token_tiles;  // of 8 tokens
  void* partials;       // [splits][tiles][sums of a tile], where K is split
};

// kernel_table.h
struct Family {
  using Function = void (*)(Params);
  static constexpr size_t kCount = std::size(kConfigs);
  template <int kConfig, bool kPerGroup, int kBits>
  static Function kernel();
};

}  // namespace flexq::cuda::mma
