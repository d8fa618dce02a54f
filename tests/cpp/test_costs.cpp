// Cost tables and the choice of kernels, without a GPU. Uses the library's insides: for static builds with CUDA.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "check.h"
#include "core/error.h"
#include "cuda/dispatch.h"
#include "flexq/flexq.hpp"

namespace {

using namespace flexq::cuda;

constexpr DeviceTraits kH100{90, 132, 3.352e6, 1980}, kH200{90, 132, 4.8e6, 1980};

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  CHECK(at != std::string::npos);
  return text.replace(at, text.find('\n', at) - at, to);
}

void refuses(const std::string& text, const char* message) {
  try {
    parse_cost_table(text, "costs.txt");
  } catch (const flexq::Error& e) {
    if (e.status == FLEXQ_INVALID_ARGUMENT && e.message.find(message) != std::string::npos) return;
    std::fprintf(stderr, "expected '%s', got '%s'\n", message, e.message.c_str());
  }
  CHECK(!"refused");
}

void test_text() {
  const std::string text = cost_table_text(cost_table_for(kH100).table);
  CHECK(cost_table_text(parse_cost_table(text, "costs.txt")) == text);
  refuses(text + "\nwhat = 1\n", "no cost is named what");
  refuses(text + "\nmma_8.l2 = 1\n", "mma_8.l2 is given twice");
  refuses(replaced(text, "mma_8.l2 =", ""), "mma_8.l2 is missing");
  refuses(replaced(text, "mma_8.l2 =", "mma_8.l2 = fast"), "mma_8.l2 must be a number of 0 or more, got fast");
  refuses(replaced(text, "mma_8.l2 =", "mma_8.l2 = -1"), "must be a number of 0 or more, got -1");
  refuses(replaced(text, "mma_8.l2 =", "mma_8.l2"), "must be `name = value`");
  refuses(replaced(text, "mma_8.group_ops =", "mma_8.group_ops = 0"), "must be more than 0");
}

Device device_of(const DeviceTraits& traits, const CostTable& table) {
  Device device{};
  device.num_sms = traits.num_sms;
  device.has_sm90 = traits.sm >= 90;
  device.has_wgmma = traits.sm == 90;
  device.dram_bytes_per_us = table.bandwidth_share * traits.memory_bytes_per_us;
  device.clocks_per_us = traits.clocks_per_us;
  device.costs = table;
  return device;
}

void test_choices() {
  for (const int sm : {80, 86, 87, 89, 90, 100, 103, 110, 120, 121}) {
    const DeviceTraits traits{sm, 100, 1e6, 2000};
    const NamedCostTable named = cost_table_for(traits);
    CHECK((named.name.find("derived") == std::string::npos) == (sm == 90));
    Device device = device_of(traits, named.table);
    device.clusters = {0, 100, 50, 30, 22};
    for (const flexq_scheme scheme : {FLEXQ_SCHEME_GROUP, FLEXQ_SCHEME_CHANNEL}) {
      for (const int64_t m : {1, 8, 9, 100, 5000}) {
        const flexq::WeightDesc desc(4096, 4096, scheme, FLEXQ_ROTATION_NONE);
        for (const Candidate& candidate : Candidates(device, desc, 8, m)) {
          CHECK(std::isfinite(candidate.microseconds) && candidate.microseconds > 0);
        }
      }
    }
  }
}

// An H200's memory is faster, its L2 is not: reading weights from there again, for further tokens, weighs more.
void test_l2_in_proportion_to_memory() {
  const CostTable h100 = cost_table_for(kH100).table, h200 = cost_table_for(kH200).table;
  CHECK(std::abs(h200.wgmma_l2 / h100.wgmma_l2 - kH200.memory_bytes_per_us / kH100.memory_bytes_per_us) < 1e-9);
  CHECK(h200.wgmma_channel_clocks_16 == h100.wgmma_channel_clocks_16 && h200.mma_8.group_ops == h100.mma_8.group_ops);
  Device device = device_of(kH200, h200);
  device.shared_per_cta = 227 * 1024;
  device.clusters = {0, 132, 66, 42, 30};
  const flexq::WeightDesc desc(4096, 14336, FLEXQ_SCHEME_CHANNEL, FLEXQ_ROTATION_HADAMARD128, 5);
  // Measured on an H200: 16.4 us; by tiles of 16 tokens 20.4.
  CHECK(std::strcmp(name_of(Candidates(device, desc, 8, 32).begin()->plan).text, "wgmma-s8 128x32 split3 cast1") == 0);
}

}  // namespace

// `file`: what FLEXQ_COSTS is to name, written here first, since it is read once in a process.
int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "file") == 0) {
    const char* path = std::getenv("FLEXQ_COSTS");
    CHECK(path != nullptr);
    const CostTable other{};
    std::ofstream(path) << cost_table_text(other);
    for (int i = 0; i < 2; ++i) {
      try {
        cost_table_for(kH100);
        CHECK(!"refused");
      } catch (const flexq::Error& e) {
        CHECK(e.message.find(path) != std::string::npos);
      }
    }
    std::printf("ok\n");
    return 0;
  }
  test_text();
  test_choices();
  test_l2_in_proportion_to_memory();
  std::printf("ok\n");
  return 0;
}
