// A group of 128 values spread over lanes: loads, the fused operations, rotation, codes.
#pragma once

#include "cuda/layout.h"
#include "cuda/ptx.cuh"
#include "cuda/quantize/params.h"
#include "cuda/quantize/values.cuh"

namespace flexq::cuda::quantize {

// A lane's part of a group of 128: kVectors vectors of kCount neighbouring values. 32 lanes have one vector of four
// each; 4 lanes have every fourth vector of eight, so that five of the rotation's seven stages stay in registers.
template <int kLanes>
struct Part {
  static constexpr int kCount = kLanes == 32 ? 4 : 8;
  static constexpr int kVectors = kGroup / kLanes / kCount;
  static constexpr int kValues = kCount * kVectors;

  int lane;  // among those of the group

  __device__ explicit Part(int of_warp) : lane(of_warp % kLanes) {}
  __device__ int k(int vector) const { return kCount * (vector * kLanes + lane); }

  // Values as they are stored.
  template <typename T>
  struct Stored {
    Vector<T, kCount> vectors[kVectors];

    __device__ float value(int i) const { return to_float(vectors[i / kCount].value[i % kCount]); }
  };

  // Zeros past the end of the row.
  template <typename T>
  __device__ Stored<T> load_stored(const Params& p, const void* rows, int64_t ld, int64_t token, int64_t group) const {
    const T* row = static_cast<const T*>(rows) + token * ld;
    Stored<T> stored;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = group * kGroup + k(i);
      if (p.vectors && at + kCount <= p.k) {
        stored.vectors[i] = *reinterpret_cast<const Vector<T, kCount>*>(row + at);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) stored.vectors[i].value[j] = at + j < p.k ? row[at + j] : from_float<T>(0.0f);
      }
    }
    return stored;
  }

  template <typename T>
  __device__ void load(const Params& p, const void* rows, int64_t ld, int64_t token, int64_t group,
                       float (&v)[kValues]) const {
    const Stored<T> stored = load_stored<T>(p, rows, ld, token, group);
#pragma unroll
    for (int i = 0; i < kValues; ++i) v[i] = stored.value(i);
  }

  template <typename T>
  __device__ void save(const Params& p, void* rows, int64_t ld, int64_t token, int64_t group,
                       const float (&v)[kValues]) const {
    T* row = static_cast<T*>(rows) + token * ld;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = group * kGroup + k(i);
      if (p.vectors && at + kCount <= p.k) {
        Vector<T, kCount> vector;
#pragma unroll
        for (int j = 0; j < kCount; ++j) vector.value[j] = from_float<T>(v[i * kCount + j]);
        *reinterpret_cast<Vector<T, kCount>*>(row + at) = vector;
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (at + j < p.k) row[at + j] = from_float<T>(v[i * kCount + j]);
        }
      }
    }
  }

  // The values to quantize, before rotation and norm.
  template <typename T, ActivationSource::Kind kKind>
  __device__ void load_source(const Params& p, int64_t token, int64_t group, float (&v)[kValues]) const {
    const ActivationSource& s = p.source;
    load<T>(p, s.x, s.ldx, token, group, v);
    if (kKind == ActivationSource::kPlain || s.other == nullptr) return;
    float other[kValues];
    load<T>(p, s.other, s.ld_other, token, group, other);
    fuse<T, kKind>(v, other);
  }

  template <typename T, ActivationSource::Kind kKind>
  static __device__ void fuse(float (&v)[kValues], const float (&other)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if constexpr (kKind == ActivationSource::kSiluMul) {
        v[i] = rounded<T>(rounded<T>(silu<T>(v[i])) * other[i]);
      } else {
        v[i] = rounded<T>(v[i] + other[i]);
      }
    }
  }

  // The same in two steps: copy_source() starts asynchronous copies to this thread's own slots in shared memory, the
  // CTA's vectors side by side, and read_source() has the values once they have arrived.
  template <typename T>
  static constexpr int kCopies = kValues * static_cast<int>(sizeof(T)) / 16;

  template <typename T, ActivationSource::Kind kKind>
  __device__ void copy_source(const Params& p, int64_t token, int64_t group, uint4* slots) const {
    const ActivationSource& s = p.source;
    copy<T>(p, s.x, s.ldx, token, group, slots);
    if (kKind == ActivationSource::kPlain || s.other == nullptr) return;
    copy<T>(p, s.other, s.ld_other, token, group, slots + kCopies<T> * blockDim.x);
  }

  template <typename T, ActivationSource::Kind kKind>
  __device__ void read_source(const Params& p, const uint4* slots, float (&v)[kValues]) const {
    read_copied<T>(slots, v);
    if (kKind == ActivationSource::kPlain || p.source.other == nullptr) return;
    float other[kValues];
    read_copied<T>(slots + kCopies<T> * blockDim.x, other);
    fuse<T, kKind>(v, other);
  }

  // Zeros past the end of the row, and of all rows.
  template <typename T>
  __device__ void copy(const Params& p, const void* rows, int64_t ld, int64_t token, int64_t group,
                       uint4* slots) const {
    constexpr int kCopyValues = 16 / static_cast<int>(sizeof(T));
    constexpr int kVectorCopies = kCopies<T> / kVectors;
    const T* row = static_cast<const T*>(rows) + (token < p.m ? token * ld : 0);
    const auto left = static_cast<int>(token < p.m ? min(p.k - group * kGroup, int64_t{kGroup}) : 0);
#pragma unroll
    for (int i = 0; i < kCopies<T>; ++i) {
      const int at = k(i / kVectorCopies) + i % kVectorCopies * kCopyValues;
      const int valid = min(max(left - at, 0), kCopyValues);
      ptx::cp_async_16_zfill(ptx::shared_address(slots + i * blockDim.x), row + (valid > 0 ? group * kGroup + at : 0),
                             valid * static_cast<int>(sizeof(T)));
    }
  }

  template <typename T>
  __device__ void read_copied(const uint4* slots, float (&v)[kValues]) const {
    constexpr int kCopyValues = 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCopies<T>; ++i) {
      const auto piece = *reinterpret_cast<const Vector<T, kCopyValues>*>(slots + i * blockDim.x);
#pragma unroll
      for (int j = 0; j < kCopyValues; ++j) v[i * kCopyValues + j] = to_float(piece.value[j]);
    }
  }

  template <int kStride>
  static __device__ void butterflies(float (&v)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i & kStride) continue;
      const float x = v[i], y = v[i + kStride];
      v[i] = x + y;
      v[i + kStride] = x - y;
    }
  }

  // Strides 64 down to 1: the CPU's order, so the same bits.
  __device__ void hadamard(float (&v)[kValues]) const {
    if constexpr (kLanes == 4) {
      butterflies<16>(v);
      butterflies<8>(v);
    }
#pragma unroll
    for (int stride = kLanes / 2; stride > 0; stride /= 2) {
      const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
      for (float& value : v) value = __fmaf_rn(value, sign, __shfl_xor_sync(~0u, value, stride));
    }
    if constexpr (kLanes == 4) butterflies<4>(v);
    butterflies<2>(v);
    butterflies<1>(v);
  }

  // Rotates if asked, and returns the bits of this lane's largest magnitude: without their sign, floats order like
  // integers, NaN above all.
  __device__ int rotate_and_max(const Params& p, float (&v)[kValues]) const {
    if (p.rotate) hadamard(v);
    float largest[4] = {};
#pragma unroll
    for (int i = 0; i < kValues; ++i) largest[i % 4] = ptx::max_magnitude(largest[i % 4], v[i]);
    return __float_as_int(
        ptx::max_magnitude(ptx::max_magnitude(largest[0], largest[1]), ptx::max_magnitude(largest[2], largest[3])));
  }

  // The codes of vector i: rint(v * inverse), which no rounding takes past the largest code.
  using Codes = Vector<uint32_t, kCount / 4>;
  __device__ Codes codes_of(const float (&v)[kValues], float inverse, int i) const {
    // 1.5 * 2^23: adding it leaves the nearest integer, two's complement, in the low bits.
    constexpr float kMagic = 12582912.0f;
    const uint32_t any = inverse == 0.0f ? 0u : ~0u;
    Codes words;
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
      uint32_t bits[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bits[j] = __float_as_uint(__fadd_rn(__fmul_rn(v[i * kCount + w * 4 + j], inverse), kMagic));
      }
      words.value[w] =
          any & __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
    }
    return words;
  }

  __device__ void store_codes(const Params& p, int64_t token, int64_t group, const float (&v)[kValues],
                              float inverse) const {
    uint8_t* tile = p.codes + (group * p.tiles + token / kTokenTile) * kTileGroupBytes;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      uint8_t* to = tile + chunk_offset(static_cast<int>(token % kTokenTile), k(i) / kChunkBytes) + k(i) % kChunkBytes;
      *reinterpret_cast<Codes*>(to) = codes_of(v, inverse, i);
    }
  }
};

// Codes of a group with a scale of its own. `largest`: of the whole group.
template <int kLanes>
__device__ void store_group(const Params& p, const Part<kLanes>& part, int64_t token, int64_t group,
                            const float (&v)[Part<kLanes>::kValues], int largest) {
  const Scale scale = scale_of(largest, p.rotate, p.qmax);
  part.store_codes(p, token, group, v, scale.inverse);
  if (part.lane == 0) p.scales[group * p.tiles * kTokenTile + token] = scale.scale;
}

}  // namespace flexq::cuda::quantize
