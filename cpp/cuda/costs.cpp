#include "cuda/costs.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include "core/error.h"

namespace flexq::cuda {
namespace {

// Fitted on an H100 80GB HBM3 to whole linear layers, in which GEMMs overlap with quantizers (`cuda_linear --kernels`).
constexpr CostTable kSm90 = {
    .bandwidth_share = 0.94,
    .mma_only_tokens = 8,
    .wgmma_only_tokens = 256,
    .mma_wave_us = 0.3,
    .mma_bits_clocks = 110,
    .mma_bit_product_clocks = 2,
    .wgmma_launch_us = 2.25,
    .wgmma_split_us = 0.6029,
    .wgmma_multicast_us = 1.184,
    .wgmma_group_clocks_16 = 385.2,
    .wgmma_group_clocks_32 = 478.3,
    .wgmma_group_clocks_64 = 632.3,
    .wgmma_group_clocks_128 = 1029,
    .wgmma_channel_clocks_16 = 265.6,
    .wgmma_channel_clocks_32 = 509.7,
    .wgmma_channel_clocks_64 = 614.7,
    .wgmma_channel_clocks_128 = 667.7,
    .wgmma_channel_clocks_256 = 1161,
    .wgmma_misfit = 1.125,
    .wgmma_stream_reread = 1.02,
    .wgmma_stream_relief = 1.06,
    .wgmma_output_clocks = 282.4,
    .wgmma_output_token_clocks = 21.95,
    .wgmma_parts_clocks = 2600,
    .wgmma_parts_token_clocks = 10.83,
    .wgmma_stream_clocks = 8000,
    .wgmma_stream_fixup_clocks = 4000,
    .wgmma_quantize_group_us = 1.961,
    .wgmma_quantize_channel_us = 0.8672,
    .wgmma_quantize_most_us = 5,
    .wgmma_weights = 0.7072,
    .wgmma_idle = 0.1925,
    .wgmma_l2 = 0.2536,
    .wgmma_l2_bytes = 29.69,
    .wgmma_output = 0.25,
    .mma_8 = {.launch_us = 1.328,
              .group_ops = 898.2,
              .channel_ops = 1365,
              .idle_wave = 0.1635,
              .idle_sms = 0.5566,
              .wide = 0.1012,
              .again = 0,
              .l2 = 0.126,
              .l1_misses = 0.5952,
              .shared_act = 0.4608,
              .row_us = 0.009818,
              .split_us = 3.316},
    .mma_tile = {.launch_us = 1.967,
                 .group_ops = 834.8,
                 .channel_ops = 948.7,
                 .idle_wave = 0.3065,
                 .idle_sms = 0.4339,
                 .wide = 0.1284,
                 .again = 0,
                 .l2 = 0.1004,
                 .l1_misses = 0.2538,
                 .shared_act = 0.4936,
                 .row_us = 0.01118,
                 .split_us = 2.848},
    .mma_tiles = {.launch_us = 1.681,
                  .group_ops = 804.5,
                  .channel_ops = 984.3,
                  .idle_wave = 1.287,
                  .idle_sms = 0,
                  .wide = 0.3449,
                  .again = 0.1551,
                  .l2 = 0.3014,
                  .l1_misses = 0.1786,
                  .shared_act = 0.7523,
                  .row_us = 0.009714,
                  .split_us = 2.748},
};
// Of memory, theoretical, a clock and SM of that H100.
constexpr double kSm90BytesPerClock = 3.35232e6 / (1980.0 * 132);

// int8 operations a clock and SM by mma.sync. Measured on sm_90; vendors' figures for full-rate architectures; guesses,
// on the safe side, where mma.sync is slow (sm_100) or int8 nearly gone (sm_103).
double mma_ops(int sm) {
  switch (sm) {
    case 80:
    case 87:
      return 4096;
    case 86:
    case 89:
    case 120:
    case 121:
      return 2048;
    case 90:
      return 5300;
    case 103:
      return 256;
    default:
      return 1024;
  }
}

// The H100's table, with tensor cores that take longer by the difference of rates, and with L2 and memory in the
// device's own proportion: L2 moves about the same bytes a clock and SM everywhere.
CostTable derived(const DeviceTraits& device) {
  CostTable table = kSm90;
  const double slower = std::max(0.0, 1 / mma_ops(device.sm) - 1 / mma_ops(90));  // clocks an operation
  const double memory = device.memory_bytes_per_us / (device.clocks_per_us * device.num_sms) / kSm90BytesPerClock;
  for (MmaCosts* mma : {&table.mma_8, &table.mma_tile, &table.mma_tiles}) {
    for (double* ops : {&mma->group_ops, &mma->channel_ops}) *ops = 1 / (1 / *ops + slower);
    mma->l2 *= memory;
    mma->shared_act *= memory;
  }
  table.wgmma_l2 *= memory;
  return table;
}

// use(name, unit, meaning, value) for every field.
template <typename Table, typename Use>
void for_each_field(Table& table, const Use& use) {
#define FLEXQ_FIELD(name, unit, meaning) use(#name, unit, meaning, table.name);
  FLEXQ_COSTS(FLEXQ_FIELD)
#undef FLEXQ_FIELD
#define FLEXQ_FIELD(name, unit, meaning) use("mma_8." #name, unit, meaning, table.mma_8.name);
  FLEXQ_MMA_COSTS(FLEXQ_FIELD)
#undef FLEXQ_FIELD
#define FLEXQ_FIELD(name, unit, meaning) use("mma_tile." #name, unit, meaning, table.mma_tile.name);
  FLEXQ_MMA_COSTS(FLEXQ_FIELD)
#undef FLEXQ_FIELD
#define FLEXQ_FIELD(name, unit, meaning) use("mma_tiles." #name, unit, meaning, table.mma_tiles.name);
  FLEXQ_MMA_COSTS(FLEXQ_FIELD)
#undef FLEXQ_FIELD
}

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

// False unless all of `text` is a finite number of at least 0. Whatever the process's locale is, 0.5 is a half.
bool parse_number(std::string_view text, double& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size() && std::isfinite(value) && value >= 0;
}

std::optional<CostTable> table_of_environment() {
  const char* path = std::getenv("FLEXQ_COSTS");
  if (path == nullptr || *path == '\0') return std::nullopt;
  const std::string source = cat("FLEXQ_COSTS=", path);
  std::FILE* file = std::fopen(path, "rb");
  require(file != nullptr, source, ": the file cannot be read");
  std::string text;
  char block[4096];
  while (const size_t count = std::fread(block, 1, sizeof block, file)) text.append(block, count);
  const bool failed = std::ferror(file) != 0;
  std::fclose(file);
  require(!failed, source, ": the file cannot be read");
  return parse_cost_table(text, source);
}

// Read once, and the same answer every time: a table, none, or the error.
struct Override {
  std::optional<CostTable> table;
  std::optional<Error> error;
};
const Override& override_table() {
  static const Override once = [] {
    Override o;
    try {
      o.table = table_of_environment();
    } catch (const Error& e) {
      o.error = e;
    }
    return o;
  }();
  return once;
}

}  // namespace

NamedCostTable cost_table_for(const DeviceTraits& device) {
  const Override& o = override_table();
  if (o.error) throw *o.error;
  if (o.table) return {"FLEXQ_COSTS", *o.table};
  return {cat("sm_", device.sm, device.sm == 90 ? "" : " derived"), derived(device)};
}

std::string cost_table_text(const CostTable& table) {
  std::string out;
  for_each_field(table, [&](const char* name, const char* unit, const char* meaning, double value) {
    char digits[32];
    const auto [end, error] = std::to_chars(digits, digits + sizeof digits, value, std::chars_format::general, 10);
    out += cat("# ", unit, ": ", meaning, "\n", name, " = ",
               std::string_view(digits, static_cast<size_t>(end - digits)), "\n");
  });
  return out;
}

CostTable parse_cost_table(const std::string& text, const std::string& source) {
  CostTable table;
  for_each_field(table, [](const char*, const char*, const char*, double& value) { value = -1; });
  std::string_view rest = text;
  for (int number = 1; !rest.empty(); ++number) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    const std::string_view whole = trimmed(line.substr(0, line.find('#')));
    if (whole.empty()) continue;
    const size_t equals = whole.find('=');
    require(equals != std::string_view::npos, source, ", line ", number, ": must be `name = value`, got: ", whole);
    const std::string_view name = trimmed(whole.substr(0, equals)), given = trimmed(whole.substr(equals + 1));
    double value = 0;
    require(parse_number(given, value), source, ", line ", number, ": ", name, " must be a number of 0 or more, got ",
            given);
    bool known = false;
    for_each_field(table, [&](const char* field, const char*, const char*, double& to) {
      if (name != field) return;
      require(to < 0, source, ", line ", number, ": ", name, " is given twice");
      known = true;
      to = value;
    });
    require(known, source, ", line ", number, ": no cost is named ", name);
  }
  for_each_field(table, [&](const char* name, const char*, const char*, double value) {
    require(value >= 0, source, ": ", name, " is missing; a table gives all fields");
  });
  const auto positive = [&](const char* name, double value) {
    require(value > 0, source, ": ", name, " must be more than 0");
  };
  positive("bandwidth_share", table.bandwidth_share);
  positive("wgmma_l2_bytes", table.wgmma_l2_bytes);
  for (const MmaCosts* mma : {&table.mma_8, &table.mma_tile, &table.mma_tiles}) {
    positive("mma_*.group_ops", mma->group_ops);
    positive("mma_*.channel_ops", mma->channel_ops);
  }
  return table;
}

}  // namespace flexq::cuda
