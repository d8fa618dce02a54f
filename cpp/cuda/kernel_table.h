// The kernels of a family of GEMMs, for each width of weights.
//
// A family has Function, the kernels' type, kCount, how many there are in a scheme, and kernel<config, per group,
// bits>(), one of them or null. Every family and width is compiled by itself: CMake makes a source of each explicit
// instantiation of kernel_table, which includes kernel_table.cuh and the family's kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/format.h"

namespace flexq::cuda {

template <typename Family>
struct KernelTable {
  typename Family::Function group[Family::kCount], channel[Family::kCount];
};

template <typename Family, int kBits>
const KernelTable<Family>& kernel_table();

template <typename Family>
typename Family::Function kernel_of(int32_t weight_bits, bool per_group, int config) {
  return dispatch_weight_bits(weight_bits, [&](auto bits) {
    const KernelTable<Family>& table = kernel_table<Family, decltype(bits)::value>();
    return (per_group ? table.group : table.channel)[config];
  });
}

}  // namespace flexq::cuda
