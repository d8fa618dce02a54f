// The 128-point Hadamard transform, natural order, without its 1 / sqrt(128).
#pragma once

#include "core/float_types.h"
#include "core/format.h"

namespace flexq {

// Strides 64, 32, ... 1. Every backend adds in this order, so that all of them round alike, bit for bit.
template <typename Float>
FLEXQ_INLINE void hadamard128(Float* x) {
  for (int stride = kGroup / 2; stride > 0; stride /= 2) {
    for (int base = 0; base < kGroup; base += 2 * stride) {
      for (int i = base; i < base + stride; ++i) {
        const Float a = x[i];
        const Float b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
    }
  }
}

}  // namespace flexq
