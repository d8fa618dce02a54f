// Canonical planes and scales <-> records (layout.h), once at load: written for clarity, not speed.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"

namespace flexq::cuda {
namespace {

constexpr int kWarpsPerCta = 8;

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
    return records + record_offset(row_block, group, row_blocks, groups, per_group);
  }
  __device__ uint16_t* record_scales(int64_t row_block, int64_t group) const {
    return reinterpret_cast<uint16_t*>(per_group ? records + scales_offset(row_block, group, row_blocks, groups)
                                                 : channel_scales + row_block * kRecordScaleBytes);
  }
};

// Byte and bit of code k in a plane of 16 bytes; rows past the last one are zeros.
__device__ unsigned plane_bits(const Args& a, int64_t row, int64_t group, int plane, int k) {
  if (row >= a.n) return 0;
  const uint8_t byte = a.planes[((row * a.groups + group) * kPlanes + plane) * kPlaneBytes + k / 8];
  return byte >> (k % 8) & 0xfu;  // k is a multiple of 4
}

// Four codes of a row from k on (a multiple of 4), as bytes code * 4.
__device__ uint32_t load_codes(const Args& a, int64_t row, int64_t group, int k) {
  uint32_t word = 0;
  for (int plane = 0; plane < kPlanes; ++plane) {
    const unsigned bits = plane_bits(a, row, group, plane, k);
    for (int i = 0; i < 4; ++i) word |= (bits >> i & 1u) << (8 * i + 2 + plane);
  }
  return word;
}

__global__ void prepack_kernel(Args a) {
  const int lane = threadIdx.x % 32;
  const int64_t record = static_cast<int64_t>(blockIdx.x) * kWarpsPerCta + threadIdx.x / 32;
  if (record >= a.row_blocks * a.groups) return;
  const int64_t row_block = record / a.groups;
  const int64_t group = record % a.groups;
  const int64_t row = row_block * kRecordRows + lane / 4;
  uint8_t* out = a.record(row_block, group);
  for (int s = 0; s < 4; ++s) {
    const int k = 32 * s + 4 * (lane % 4);
    const uint32_t a0 = load_codes(a, row, group, k);
    const uint32_t a1 = load_codes(a, row + 8, group, k);
    const uint32_t a2 = load_codes(a, row, group, k + 16);
    const uint32_t a3 = load_codes(a, row + 8, group, k + 16);
    const uint32_t words[3] = {a0 | (a3 >> 6 & 0x03030303u), a1 | (a3 >> 4 & 0x03030303u),
                               a2 | (a3 >> 2 & 0x03030303u)};
    for (int j = 0; j < 3; ++j) reinterpret_cast<uint32_t*>(out)[(j * 32 + lane) * 4 + s] = words[j];
  }
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
__global__ void unprepack_kernel(Args a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= a.n * a.groups * kPlaneBytes) return;
  const int byte = static_cast<int>(index % kPlaneBytes);
  const int64_t group = index / kPlaneBytes % a.groups;
  const int64_t row = index / kPlaneBytes / a.groups;
  const int row_in_block = static_cast<int>(row % kRecordRows);
  const auto* words = reinterpret_cast<const uint32_t*>(a.record(row / kRecordRows, group));
  unsigned planes[kPlanes] = {};
  for (int quad = 0; quad < 2; ++quad) {
    const int k = 8 * byte + 4 * quad;
    const int s = k / 32;
    const int lane = row_in_block % 8 * 4 + k % 16 / 4;
    const int fragment = k % 32 / 16 * 2 + row_in_block / 8;
    uint32_t b[3];
    for (int j = 0; j < 3; ++j) b[j] = words[(j * 32 + lane) * 4 + s];
    const uint32_t codes =
        fragment < 3 ? b[fragment] : (b[0] << 6 & 0xc0c0c0c0u) | (b[1] << 4 & 0x30303030u) | (b[2] << 2 & 0x0c0c0c0cu);
    for (int i = 0; i < 4; ++i) {
      for (int p = 0; p < kPlanes; ++p) planes[p] |= (codes >> (8 * i + 2 + p) & 1u) << (4 * quad + i);
    }
  }
  for (int p = 0; p < kPlanes; ++p) {
    a.planes[((row * a.groups + group) * kPlanes + p) * kPlaneBytes + byte] = static_cast<uint8_t>(planes[p]);
  }
  if (byte != 0 || (!a.per_group && group != 0)) return;
  const int64_t at = a.per_group ? group : 0;
  a.scales[row * a.row_scales + at] = a.record_scales(row / kRecordRows, group)[row_in_block];
}

Args args_of(const flexq_weight_desc& desc, const uint8_t* planes, const uint16_t* scales, const void* prepacked) {
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
  const Args args = args_of(desc, planes, scales, prepacked);
  const int64_t ctas = ceil_div(args.row_blocks * args.groups, kWarpsPerCta);
  launch(stream, "prepack", prepack_kernel, {.grid = checked_grid("prepack", ctas), .block = dim3(kWarpsPerCta * 32)},
         args);
}

void unprepack(cudaStream_t stream, const flexq_weight_desc& desc, const void* prepacked, uint8_t* planes,
               uint16_t* scales) {
  const Args args = args_of(desc, planes, scales, prepacked);
  constexpr int kThreads = 256;
  const int64_t ctas = ceil_div(args.n * args.groups * kPlaneBytes, kThreads);
  launch(stream, "unprepack", unprepack_kernel, {.grid = checked_grid("unprepack", ctas), .block = dim3(kThreads)},
         args);
}

}  // namespace flexq::cuda
