// Loops over a flexq_executor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/format.h"
#include "flexq/flexq.h"

namespace flexq {

// Calls body(begin, end) over [0, count) in pieces of about `grain`, on the executor's threads if there is one.
template <typename Body>
void parallel_ranges(const flexq_executor* executor, int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (executor == nullptr || executor->num_threads <= 1 || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  struct Context {
    const Body& body;
    int64_t count;
    int64_t grain;
  } context{body, count, std::max<int64_t>(grain, 1)};
  const auto task = [](void* arg, int64_t index) {
    const auto& c = *static_cast<const Context*>(arg);
    c.body(index * c.grain, std::min(c.count, (index + 1) * c.grain));
  };
  executor->parallel_for(executor->context, ceil_div(count, context.grain), task, &context);
}

// A grain that gives every thread a few pieces, so that an unlucky thread does not hold up the rest.
inline int64_t balanced_grain(const flexq_executor* executor, int64_t count, int64_t at_least = 1) {
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t threads = executor == nullptr ? 1 : std::max<int64_t>(executor->num_threads, 1);
  return std::max(at_least, ceil_div(count, threads * kPiecesPerThread));
}

}  // namespace flexq
