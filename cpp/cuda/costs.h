// The constants of the model of cost by which dispatch.cpp chooses a GEMM's kernel: a table for each GPU.
//
// `flexq bench linear --device cuda --explain` measures the candidates on a GPU beside the model's estimates; fitting
// minimizes their difference (docs: kernels/dispatch.md). A table from a file, in the format of cost_table_text(),
// replaces the built-in one: FLEXQ_COSTS names the file and is read once.
#pragma once

#include <string>

namespace flexq::cuda {

// X(name, unit, meaning). "of the weights' time": a share of the time to read the weights from memory once.
#define FLEXQ_MMA_COSTS(X)                                                                                       \
  X(launch_us, "us", "start and end of the kernel, behind a quantizer")                                          \
  X(group_ops, "int8 operations a clock and SM", "reached in scheme group, unpacking and scaling included")      \
  X(channel_ops, "int8 operations a clock and SM", "the same in scheme channel")                                 \
  X(idle_wave, "of the weights' time", "lost where the last wave is idle, as a multiple of its idle share")      \
  X(idle_sms, "of the weights' time", "lost to SMs without a CTA, as a multiple of SMs / CTAs - 1")              \
  X(wide, "of the weights' time", "lost where a warp has more than 64 rows x tokens / 16: its activations wait") \
  X(again, "of the weights' time", "lost to each further tile of tokens")                                        \
  X(l2, "of memory's time", "to bring in, from L2, what tiles read beyond the weights once")                     \
  X(l1_misses, "share", "of the activations that warps load themselves and L1 does not have (scheme channel)")   \
  X(shared_act, "of memory's time", "for activations that a CTA's warps wait for together")                      \
  X(row_us, "us a row", "the epilogue of a tile")                                                                \
  X(split_us, "us", "the second kernel of split-K")

#define FLEXQ_COSTS(X)                                                                                                \
  X(bandwidth_share, "share", "of the memory's theoretical bandwidth that a kernel that only reads reaches")          \
  X(mma_only_tokens, "tokens", "up to which only mma.sync is a candidate")                                            \
  X(wgmma_only_tokens, "tokens", "from which mma.sync runs only by its name, where there is wgmma")                   \
  X(mma_wave_us, "us", "each further wave of CTAs")                                                                   \
  X(mma_bits_clocks, "clocks", "1-bit products: transposes of a record, on one SM")                                   \
  X(mma_bit_product_clocks, "clocks", "1-bit products: one pair of planes of a record, on one SM")                    \
  X(wgmma_launch_us, "us", "start and end of the kernel, behind a quantizer")                                         \
  X(wgmma_split_us, "us", "clusters that split K")                                                                    \
  X(wgmma_multicast_us, "us", "multicast where L2 needs no relief")                                                   \
  X(wgmma_group_clocks_16, "clocks", "128 rows x 16 tokens x 128 k in scheme group, tensor cores and what they wait") \
  X(wgmma_group_clocks_32, "clocks", "the same of 32 tokens")                                                         \
  X(wgmma_group_clocks_64, "clocks", "the same of 64 tokens")                                                         \
  X(wgmma_group_clocks_128, "clocks", "the same of 128 tokens")                                                       \
  X(wgmma_channel_clocks_16, "clocks", "128 rows x 16 tokens x 128 k in scheme channel")                              \
  X(wgmma_channel_clocks_32, "clocks", "the same of 32 tokens")                                                       \
  X(wgmma_channel_clocks_64, "clocks", "the same of 64 tokens")                                                       \
  X(wgmma_channel_clocks_128, "clocks", "the same of 128 tokens")                                                     \
  X(wgmma_channel_clocks_256, "clocks", "the same of 256 tokens")                                                     \
  X(wgmma_misfit, "factor", "on those clocks: multicast without need, or none where L2 needs relief")                 \
  X(wgmma_stream_reread, "factor", "on those clocks: stream-K where weights are read more than once")                 \
  X(wgmma_stream_relief, "factor", "the same where L2 would need relief")                                             \
  X(wgmma_output_clocks, "clocks", "the epilogue of a tile")                                                          \
  X(wgmma_output_token_clocks, "clocks a token", "the epilogue of a tile")                                            \
  X(wgmma_parts_clocks, "clocks", "sums of parts of K that meet in a cluster")                                        \
  X(wgmma_parts_token_clocks, "clocks a token", "the same")                                                           \
  X(wgmma_stream_clocks, "clocks", "stream-K: ranges of unequal tiles")                                               \
  X(wgmma_stream_fixup_clocks, "clocks", "stream-K: each part whose sums are added")                                  \
  X(wgmma_quantize_group_us, "us a million inputs", "quantizers that find no room beside the GEMM, scheme group")     \
  X(wgmma_quantize_channel_us, "us a million inputs", "the same in scheme channel")                                   \
  X(wgmma_quantize_most_us, "us", "the most that is")                                                                 \
  X(wgmma_weights, "of memory's time", "to read the weights once")                                                    \
  X(wgmma_idle, "of that", "more, for each share of the SMs without a CTA")                                           \
  X(wgmma_l2, "of memory's time", "for all bytes that tiles bring in")                                                \
  X(wgmma_l2_bytes, "bytes a clock and SM", "that L2 delivers at most")                                               \
  X(wgmma_output, "of memory's time", "to write y in 16 bits")

// For one regime of tokens.
struct MmaCosts {
#define FLEXQ_FIELD(name, unit, meaning) double name;
  FLEXQ_MMA_COSTS(FLEXQ_FIELD)
};

struct CostTable {
  FLEXQ_COSTS(FLEXQ_FIELD)
#undef FLEXQ_FIELD
  MmaCosts mma_8;      // one tile of 8 tokens
  MmaCosts mma_tile;   // one tile of more
  MmaCosts mma_tiles;  // several tiles of tokens
};

// What a table is chosen by, or derived from.
struct DeviceTraits {
  int sm;  // 10 * major + minor
  int num_sms;
  double memory_bytes_per_us;  // theoretical
  double clocks_per_us;
};

struct NamedCostTable {
  std::string name;  // "sm_90" (L2 in proportion to memory), "sm_89 derived", or "FLEXQ_COSTS"
  CostTable table;
};

// Throws FLEXQ_INVALID_ARGUMENT if FLEXQ_COSTS names a file that is no cost table.
NamedCostTable cost_table_for(const DeviceTraits& device);

// One line `name = value` for each field, with comments; parse_cost_table() takes nothing less and nothing more.
std::string cost_table_text(const CostTable& table);
// `source` is for messages.
CostTable parse_cost_table(const std::string& text, const std::string& source);

}  // namespace flexq::cuda
