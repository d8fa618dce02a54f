// Canonical planes and scales <-> records (layout.h), once at load: written for clarity, not speed.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/records.cuh"

namespace flexq::cuda {
namespace {

constexpr int kWarpsPerCta = 8;

template <int kBits>
struct Args {
  int64_t n;
  int64_t groups;
  int64_t row_blocks;
  int64_t row_scales;  // per row: groups, or 1
  bool per_group;
  uint8_t* planes;
  uint16_t* scales;
  uint8_t* records;
  uint8_t* channel_scales;  // in scheme channel

  __device__ uint8_t* record(int64_t row_block, int64_t group) const {
    return records + record_offset(row_block, group, row_blocks, groups, kBits, per_group);
  }
  __device__ uint16_t* record_scales(int64_t row_block, int64_t group) const {
    return reinterpret_cast<uint16_t*>(per_group ? records + scales_offset(row_block, group, row_blocks, groups, kBits)
                                                 : channel_scales + row_block * kRecordScaleBytes);
  }
};

// Byte and bit of code k in a plane of 16 bytes; rows past the last one are zeros.
template <int kBits>
__device__ unsigned plane_bits(const Args<kBits>& a, int64_t row, int64_t group, int plane, int k) {
  if (row >= a.n) return 0;
  const uint8_t byte = a.planes[((row * a.groups + group) * kBits + plane) * kPlaneBytes + k / 8];
  return byte >> (k % 8) & 0xfu;  // k is a multiple of 4
}

// Four codes of a row from k on (a multiple of 4), in the top bits of bytes.
template <int kBits>
__device__ uint32_t load_codes(const Args<kBits>& a, int64_t row, int64_t group, int k) {
  uint32_t word = 0;
  for (int plane = 0; plane < kBits; ++plane) {
    const unsigned bits = plane_bits(a, row, group, plane, k);
    for (int i = 0; i < 4; ++i) word |= (bits >> i & 1u) << (8 * i + 8 - kBits + plane);
  }
  return word;
}

template <int kBits>
__global__ void prepack_kernel(Args<kBits> a) {
  const int lane = threadIdx.x % 32;
  const int64_t record = static_cast<int64_t>(blockIdx.x) * kWarpsPerCta + threadIdx.x / 32;
  if (record >= a.row_blocks * a.groups) return;
  const int64_t row_block = record / a.groups;
  const int64_t group = record % a.groups;
  const int64_t row = row_block * kRecordRows + lane / 4;
  uint8_t* out = a.record(row_block, group);
  uint32_t fragments[4][4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int k = 32 * s + 4 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) fragments[s][i] = load_codes(a, row + i % 2 * 8, group, k + i / 2 * 16);
  }
  Record<kBits>::pack(fragments, out, lane);
  if (lane < kRecordRows && (a.per_group || group == 0)) {
    const int64_t scale_row = row_block * kRecordRows + lane;
    const uint16_t scale =
        scale_row < a.n ? a.scales[scale_row * a.row_scales + (a.per_group ? group : 0)] : uint16_t{0};
    a.record_scales(row_block, group)[lane] = scale;
  }
  // The GEMM behind reads weights as soon as the last thread here has exited (launch.h), before the kernel's end makes
  // its writes visible.
  __threadfence();
}

// One thread builds a byte of each plane: 8 codes of a row.
template <int kBits>
__global__ void unprepack_kernel(Args<kBits> a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= a.n * a.groups * kPlaneBytes) return;
  const int byte = static_cast<int>(index % kPlaneBytes);
  const int64_t group = index / kPlaneBytes % a.groups;
  const int64_t row = index / kPlaneBytes / a.groups;
  const int row_in_block = static_cast<int>(row % kRecordRows);
  const uint8_t* record = a.record(row / kRecordRows, group);
  unsigned planes[kBits] = {};
  for (int quad = 0; quad < 2; ++quad) {
    const int k = 8 * byte + 4 * quad;
    uint32_t fragments[4];
    Record<kBits>(record, row_in_block % 8 * 4 + k % 16 / 4).unpack(k / 32, fragments);
    const uint32_t codes = fragments[k % 32 / 16 * 2 + row_in_block / 8];
    for (int i = 0; i < 4; ++i) {
      for (int p = 0; p < kBits; ++p) planes[p] |= (codes >> (8 * i + 8 - kBits + p) & 1u) << (4 * quad + i);
    }
  }
  for (int p = 0; p < kBits; ++p) {
    a.planes[((row * a.groups + group) * kBits + p) * kPlaneBytes + byte] = static_cast<uint8_t>(planes[p]);
  }
  if (byte != 0 || (!a.per_group && group != 0)) return;
  const int64_t at = a.per_group ? group : 0;
  a.scales[row * a.row_scales + at] = a.record_scales(row / kRecordRows, group)[row_in_block];
}

template <int kBits>
Args<kBits> args_of(const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
                    const void* prepacked) {
  auto* records = static_cast<uint8_t*>(const_cast<void*>(prepacked));
  return {desc.n,
          num_groups(desc.k),
          num_row_blocks(desc),
          scales_per_row(desc),
          desc.scheme == FLEXQ_SCHEME_GROUP,
          const_cast<uint8_t*>(planes),
          const_cast<uint16_t*>(scales),
          records,
          records + WeightLayout(desc).scales};
}

}  // namespace

void prepack(cudaStream_t stream, const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales,
             void* prepacked) {
  dispatch_weight_bits(desc.weight_bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    const auto args = args_of<kBits>(desc, planes, scales, prepacked);
    const int64_t ctas = ceil_div(args.row_blocks * args.groups, kWarpsPerCta);
    launch(stream, "prepack", prepack_kernel<kBits>,
           {.grid = checked_grid("prepack", ctas), .block = dim3(kWarpsPerCta * 32)}, args);
  });
}

void unprepack(cudaStream_t stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales) {
  dispatch_weight_bits(desc.weight_bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    const auto args = args_of<kBits>(desc, planes, scales, prepacked);
    constexpr int kThreads = 256;
    const int64_t ctas = ceil_div(args.n * args.groups * kPlaneBytes, kThreads);
    launch(stream, "unprepack", unprepack_kernel<kBits>,
           {.grid = checked_grid("unprepack", ctas), .block = dim3(kThreads)}, args);
  });
}

}  // namespace flexq::cuda
