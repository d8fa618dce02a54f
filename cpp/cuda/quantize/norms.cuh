// The quantizer with a fused RMS norm, of many tokens that pairs.cuh does not take.
#pragma once

#include "cuda/quantize/group_part.cuh"
#include "cuda/quantize/token_reduce.cuh"

namespace flexq::cuda::quantize {

constexpr int kNormThreads = 32 * kTokenTile;  // of a CTA: a warp for each token of its tile
constexpr int kNormCtas = 3;                   // that an SM has registers for

// Shared memory of a CTA that has so many groups of a tile, in vectors of 16 bytes: what is copied ahead, each thread's
// vectors apart; the rows that are to be quantized, two of which side by side lie in different banks where values have
// 16 bits; the norm's weight.
template <typename T>
struct NormLayout {
  static constexpr int kBankVectors = 8;  // of all banks
  int row;                                // of a token
  int slots;                              // of a thread, for each input
  int inputs;                             // that are copied ahead

  __host__ __device__ NormLayout(int64_t groups, bool prefetch, bool two)
      : row(static_cast<int>(groups * kGroup * static_cast<int64_t>(sizeof(T)) / 16)),
        slots((row + 31) / 32),
        inputs((prefetch ? 1 : 0) + (prefetch && two ? 1 : 0)) {}
  __host__ __device__ int stride() const { return row + kBankVectors / 2; }
  __host__ __device__ int rows() const { return inputs * slots * kNormThreads; }
  __host__ __device__ int weight() const { return rows() + kTokenTile * stride(); }
  size_t bytes() const { return 16 * static_cast<size_t>(weight() + row); }
};

// A cluster of CTAs has a tile of 8 tokens, each CTA some neighbouring groups of it. First each warp adds up a token's
// squares, and keeps the token in shared memory; then warps have a group of all 8 tokens each. The next tile is copied
// ahead meanwhile (p.prefetch), and while one CTA of an SM waits for its cluster others work. Nothing is read twice
// from global memory. In scheme channel values are rotated again, once a token's scale is known. k must be a multiple
// of a vector, and all rows aligned to vectors.
template <typename T>
__global__ void __launch_bounds__(kNormThreads, kNormCtas) quantize_norms(const __grid_constant__ Params p) {
  using Values = float[Part<4>::kValues];
  using Words = Packed<T>;
  using ReduceSquares = TokenReduce<4, 32>;
  using ReduceLargest = TokenReduce<4, kNormThreads>;
  constexpr int kWarps = kNormThreads / 32;
  static_assert(kWarps == kTokenTile);                      // as each warp has the squares of a token
  constexpr int kCount = 16 / static_cast<int>(sizeof(T));  // values of a vector
  extern __shared__ uint4 shared[];
  __shared__ typename ReduceSquares::Table for_norm[2];
  __shared__ typename ReduceLargest::Table for_scale[2];
  ptx::launch_dependents();
  const int rank = join_cluster(p.cluster, for_norm, for_scale);
  const ActivationSource& s = p.source;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const Part<4> part(lane);
  const int within = lane / 4;  // of the tile's tokens, where a warp has a group of all
  const ReduceSquares reduce_squares(p.cluster, rank, within == warp);
  const ReduceLargest reduce_largest(p.cluster, rank);
  const int64_t slice = ceil_div(p.groups, static_cast<int64_t>(p.cluster));
  const NormLayout<T> layout(slice, p.prefetch, s.other != nullptr);
  const int64_t first_group = rank * slice, first_k = first_group * kGroup;
  const auto groups = static_cast<int>(max(int64_t{0}, min(slice, p.groups - first_group)));
  const auto vectors = static_cast<int>(max(int64_t{0}, min(p.k - first_k, slice * kGroup))) / kCount;
  uint4* const own = shared + threadIdx.x;  // what this thread copies and reads
  uint4* const own_other = own + layout.slots * kNormThreads;
  uint4* const rows = shared + layout.rows();
  uint4* const weights = shared + layout.weight();

  // What comes after the end of a row is read, and never written again.
  for (int i = vectors + lane; i < layout.row; i += 32) {
    rows[warp * layout.stride() + i] = uint4{};
    if (warp == 0) weights[i] = uint4{};
  }

  const auto vectors_of = [&](const void* matrix, int64_t ld, int64_t token) {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(matrix) + token * ld + first_k);
  };
  const auto prefetch = [&](int64_t token) {
    if (p.prefetch && token < p.m) {
      const uint4 *x = vectors_of(s.x, s.ldx, token), *other = vectors_of(s.other, s.ld_other, token);
#pragma unroll 4
      for (int i = lane, n = 0; i < vectors; i += 32, n += kNormThreads) {
        ptx::cp_async_16(ptx::shared_address(own + n), x + i);
        if (s.other != nullptr) ptx::cp_async_16(ptx::shared_address(own_other + n), other + i);
      }
    }
    ptx::cp_async_commit();
  };

  ptx::wait_for_previous_kernel();
  const uint4* weight = vectors_of(s.weight, 0, 0);
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kNormThreads) {
    ptx::cp_async_16(ptx::shared_address(weights + i), weight + i);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x / p.cluster) * kTokenTile;
  int64_t first = static_cast<int64_t>(blockIdx.x / p.cluster) * kTokenTile;
  prefetch(first + warp);
  for (int iteration = 0; first < p.m; first += stride, ++iteration) {
    if (iteration > 0) __syncthreads();  // the rows of the tile before have been read
    ptx::cp_async_wait<0>();
    float squares = 0.0f;
    if (first + warp < p.m) {
      const uint4 *x = vectors_of(s.x, s.ldx, first + warp), *other = vectors_of(s.other, s.ld_other, first + warp);
      auto* sum = const_cast<uint4*>(vectors_of(s.sum, s.ld_sum, first + warp));
      uint4* kept = rows + warp * layout.stride();
#pragma unroll 2
      for (int i = lane, n = 0; i < vectors; i += 32, n += kNormThreads) {
        uint4 h = p.prefetch ? own[n] : x[i];
        if (s.other != nullptr) {
          const uint4 b = p.prefetch ? own_other[n] : other[i];
          h = {Words::add(h.x, b.x), Words::add(h.y, b.y), Words::add(h.z, b.z), Words::add(h.w, b.w)};
        }
#pragma unroll
        for (const uint32_t word : {h.x, h.y, h.z, h.w}) {
          float v[Words::kCount];
          Words::unpack(word, v);
#pragma unroll
          for (const float value : v) squares += value * value;
        }
        if (s.sum != nullptr) sum[i] = h;
        kept[i] = h;
      }
    }
    prefetch(first + stride + warp);
    squares = sum_of_lanes<32>(squares);
    if (p.cluster > 1) __syncthreads();  // an mbarrier does not order the rows
    squares = reduce_squares.sum(part.lane == 0 ? squares : 0.0f, for_norm, iteration);
    const float norm = rsqrtf(squares / static_cast<float>(p.k) + s.eps);

    const int64_t token = first + within;
    const bool valid = token < p.m;
    // This lane's words of one of the CTA's groups, in which use() may change each, and their values.
    const auto read = [&](int group, Values& v, const auto& use) {
      constexpr int kVectorWords = Part<4>::kCount / Words::kCount;
      using Vector = Vector<uint32_t, kVectorWords>;
#pragma unroll
      for (int i = 0; i < Part<4>::kVectors; ++i) {
        const int at = (group * kGroup + part.k(i)) / kCount;
        Vector& row = *reinterpret_cast<Vector*>(rows + within * layout.stride() + at);
        Vector words = row;
        use(words, row, at, *reinterpret_cast<const Vector*>(weights + at));
#pragma unroll
        for (int j = 0; j < kVectorWords; ++j) {
          float values[Words::kCount];
          Words::unpack(words.value[j], values);
#pragma unroll
          for (int n = 0; n < Words::kCount; ++n) v[i * Part<4>::kCount + j * Words::kCount + n] = values[n];
        }
      }
    };
    // Normed, which is kept where it is read again; rotated; the lane's largest.
    const auto read_normed = [&](int group, Values& v) {
      read(group, v, [&](auto& words, auto& row, int at, const auto& of_weight) {
#pragma unroll
        for (int j = 0; j < static_cast<int>(sizeof(words) / 4); ++j) {
          float values[Words::kCount];
          Words::unpack(words.value[j], values);
#pragma unroll
          for (float& value : values) value *= norm;
          words.value[j] = Words::multiply(Words::pack(values), of_weight.value[j]);
        }
        // A norm that is not finite makes NaN of the zeros past the end, which are of later tokens too.
        if (!p.per_group && at < vectors) row = words;
      });
      return part.rotate_and_max(p, v);
    };
    if (p.per_group) {
#pragma unroll 1
      for (int group = warp; group < groups; group += kWarps) {
        Values v;
        const int of_group = largest_of_lanes<4>(read_normed(group, v));
        if (valid) store_group(p, part, token, first_group + group, v, of_group);
      }
      continue;
    }
    int largest = 0;
#pragma unroll 1
    for (int group = warp; group < groups; group += kWarps) {
      Values v;
      largest = max(largest, read_normed(group, v));
    }
    largest = reduce_largest.largest(largest, for_scale, iteration);
    const Scale scale = scale_of(largest, p.rotate, p.qmax);
#pragma unroll 1
    for (int group = warp; group < groups; group += kWarps) {
      Values v;
      read(group, v, [](auto&, auto&, int, const auto&) {});
      if (p.rotate) part.hadamard(v);
      if (valid) part.store_codes(p, token, first_group + group, v, scale.inverse);
    }
    if (valid && rank == 0 && warp == 0 && part.lane == 0) p.scales[token] = scale.scale;
  }
}

}  // namespace flexq::cuda::quantize
