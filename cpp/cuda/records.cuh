// What is in a record of 16 rows x 128 k of weights, for each width: how it is read and unpacked.
//
// The A fragment of a k step of 8-bit MMAs (m16n8k32, and a warp's part of wgmma's m64nNk32) is four words a lane (g =
// lane / 4, t = lane % 4): bytes code_factor(bits) * code, signed, of rows g (a0, a2) and g + 8 (a1, a3) and k = 32 * s
// + 4 * t + i (a0, a1) or 16 more (a2, a3), i = 0..3. A code takes a byte's top bits, so that what is left of some
// bytes holds the codes of others: six bits unpack in nine instructions of sixteen codes, where bit planes would take
// twenty-four (docs/how-it-works/kernels/format.md).
//
// Vectors of 16 bytes for each of 32 lanes, vector-major, so that a warp reads whole lines. Word s of vector j is Bj:
//   8 bits: B0..B3 are a0..a3
//   6 bits: B0..B2 are a0..a2, their low two bits bits 7-6, 5-4 and 3-2 of a3
//   5 bits: B0 and B1 are a0 and a1; B0's low bits are a3's bits 7-5, B1's a2's bit 3 and a3's bits 4-3; a last vector
//   of
//           8 bytes a lane has in word s / 2 the top four bits of a2, of even s in low half bytes
//   4 bits: B0 and B1 are a0 and a1, their low half bytes a2 and a3
#pragma once

#include <cstdint>

#include "cuda/layout.h"

namespace flexq::cuda {

__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int kBits>
struct Record {
  static constexpr int kBytes = record_bytes(kBits);
  static constexpr int kVectors = kBits / 2;
  static constexpr bool kHalf = kBits % 2 != 0;
  static constexpr int kHalfAt = kVectors * 512;

  uint4 v[kVectors];
  uint2 half;

  __device__ __forceinline__ Record(const uint8_t* record, int lane) {
    const auto* vectors = reinterpret_cast<const uint4*>(record) + lane;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) v[j] = vectors[32 * j];
    if constexpr (kHalf) half = reinterpret_cast<const uint2*>(record + kHalfAt)[lane];
  }

  // The A fragment of k step s.
  __device__ __forceinline__ void unpack(int s, uint32_t (&a)[4]) const {
    const uint32_t b0 = word(v[0], s), b1 = word(v[1], s);
    if constexpr (kBits == 8) {
      a[0] = b0;
      a[1] = b1;
      a[2] = word(v[2], s);
      a[3] = word(v[3], s);
    } else if constexpr (kBits == 6) {
      const uint32_t b2 = word(v[2], s);
      a[0] = b0 & 0xfcfcfcfcu;
      a[1] = b1 & 0xfcfcfcfcu;
      a[2] = b2 & 0xfcfcfcfcu;
      a[3] = (b0 << 6 & 0xc0c0c0c0u) | (b1 << 4 & 0x30303030u) | (b2 << 2 & 0x0c0c0c0cu);
    } else if constexpr (kBits == 5) {
      const uint32_t h = s < 2 ? half.x : half.y;
      a[0] = b0 & 0xf8f8f8f8u;
      a[1] = b1 & 0xf8f8f8f8u;
      a[2] = ((s % 2 == 0 ? h << 4 : h) & 0xf0f0f0f0u) | (b1 << 1 & 0x08080808u);
      a[3] = (b0 << 5 & 0xe0e0e0e0u) | (b1 << 3 & 0x18181818u);
    } else {
      static_assert(kBits == 4);
      a[0] = b0 & 0xf0f0f0f0u;
      a[1] = b1 & 0xf0f0f0f0u;
      a[2] = b0 << 4 & 0xf0f0f0f0u;
      a[3] = b1 << 4 & 0xf0f0f0f0u;
    }
  }

  // The inverse, all k steps of a lane: fragments[s] to words of the record.
  static __device__ void pack(const uint32_t (&fragments)[4][4], uint8_t* record, int lane) {
    auto* vectors = reinterpret_cast<uint32_t*>(record);
    uint32_t halves[2] = {};
    for (int s = 0; s < 4; ++s) {
      const auto& a = fragments[s];
      uint32_t b[4] = {a[0], a[1], a[2], a[3]};
      if constexpr (kBits == 6) {
        b[0] |= a[3] >> 6 & 0x03030303u;
        b[1] |= a[3] >> 4 & 0x03030303u;
        b[2] |= a[3] >> 2 & 0x03030303u;
      } else if constexpr (kBits == 5) {
        b[0] |= a[3] >> 5 & 0x07070707u;
        b[1] |= (a[2] >> 1 & 0x04040404u) | (a[3] >> 3 & 0x03030303u);
        halves[s / 2] |= (a[2] >> 4 & 0x0f0f0f0fu) << s % 2 * 4;
      } else if constexpr (kBits == 4) {
        b[0] |= a[2] >> 4 & 0x0f0f0f0fu;
        b[1] |= a[3] >> 4 & 0x0f0f0f0fu;
      }
      for (int j = 0; j < kVectors; ++j) vectors[(j * 32 + lane) * 4 + s] = b[j];
    }
    if constexpr (kHalf) {
      for (int i = 0; i < 2; ++i) reinterpret_cast<uint32_t*>(record + kHalfAt)[lane * 2 + i] = halves[i];
    }
  }

  // Asynchronous copies of a record by a warp.
  template <typename Copy>
  static __device__ __forceinline__ void for_each_copy(int lane, const Copy& copy) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) copy(j * 512 + lane * 16);
    if (kHalf && lane < 16) copy(kHalfAt + lane * 16);
  }
};

}  // namespace flexq::cuda
