// 1-bit tensor core products of weights and 6- or 8-bit activations.
#pragma once

#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace flexq::cuda::mma {

// Bit c of byte i of plane p := bit p of byte i of word c: an 8x8 bit transpose in each byte.
__device__ inline void transpose_bits(uint32_t (&w)[8]) {
#pragma unroll
  for (int s = 4; s > 0; s /= 2) {
    const uint32_t low = s == 4 ? 0x0f0f0f0fu : s == 2 ? 0x33333333u : 0x55555555u;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (c & s) continue;
      const uint32_t a = w[c], b = w[c + s];
      w[c] = (a & low) | (b << s & ~low);
      w[c + s] = (a >> s & low) | (b & ~low);
    }
  }
}

// Dot products of 16 rows and 8 tokens over 128 k from bit planes, the weights' being the top ones of bytes:
// sum_pq c_p d_q popcount(w_p & x_q), where c and d are powers of two and the top ones negative. Products of equal
// weight, diagonals p + q, are summed from the largest down and doubled on the way.
template <int kBits, int kActBits>
__device__ inline void b1_products(int32_t (&dots)[4], const uint32_t (&low)[8], const uint32_t (&high)[8],
                                   const uint32_t (&act)[8]) {
  constexpr int kTop = kBits - 1, kActTop = kActBits - 1;
  int32_t plus[4] = {}, minus[4] = {};
#pragma unroll
  for (int diagonal = kTop + kActTop; diagonal >= 0; --diagonal) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      plus[i] *= 2;
      minus[i] *= 2;
    }
#pragma unroll
    for (int p = 0; p <= kTop; ++p) {
      const int q = diagonal - p;
      if (q < 0 || q > kActTop) continue;
      ptx::mma_m16n8k128_b1((p == kTop) != (q == kActTop) ? minus : plus, low[p + 8 - kBits], high[p + 8 - kBits],
                            act[q]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) dots[i] += code_factor(kBits) * (plus[i] - minus[i]);
}

}  // namespace flexq::cuda::mma
