// What kernel_table.h declares.
#pragma once

#include <utility>

#include "cuda/kernel_table.h"

namespace flexq::cuda {

template <typename Family, int kBits>
const KernelTable<Family>& kernel_table() {
  static const KernelTable<Family> table = []<size_t... kConfig>(std::index_sequence<kConfig...>) {
    return KernelTable<Family>{{Family::template kernel<static_cast<int>(kConfig), true, kBits>()...},
                               {Family::template kernel<static_cast<int>(kConfig), false, kBits>()...}};
  }(std::make_index_sequence<Family::kCount>{});
  return table;
}

}  // namespace flexq::cuda
