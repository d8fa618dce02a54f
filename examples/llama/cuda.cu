// What a Llama needs beside linear layers, on a GPU. Written to be read: each kernel is one loop nest. Keys and values
// are [kv head][position][head_dim].
#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "model.h"

namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

__device__ float value(const float* p) { return *p; }
__device__ float value(const uint16_t* bf16) { return __uint_as_float(uint32_t{*bf16} << 16); }

template <typename T>
__global__ void embed_kernel(const T* embeddings, const int32_t* tokens, int64_t hidden, float* x) {
  const int64_t from = tokens[blockIdx.x] * hidden, to = blockIdx.x * hidden;
  for (int64_t k = threadIdx.x; k < hidden; k += blockDim.x) x[to + k] = value(embeddings + from + k);
}

// A block is a token and one of its heads: queries and keys are rotated, keys and values put into the cache.
__global__ void rotate_kernel(float* qkv, Cache cache, const float* frequencies, int64_t begin, int64_t heads,
                              int64_t kv_heads, int64_t d, int64_t capacity) {
  const int64_t token = blockIdx.x, head = blockIdx.y, position = begin + token;
  float* x = qkv + (token * (heads + 2 * kv_heads) + head) * d;
  const bool is_value = head >= heads + kv_heads;
  const int64_t kv = is_value ? head - heads - kv_heads : head - heads;
  float* kept = head < heads ? nullptr : (is_value ? cache.values : cache.keys) + (kv * capacity + position) * d;
  for (int64_t i = threadIdx.x; i < d / 2; i += blockDim.x) {
    float a = x[i], b = x[i + d / 2];
    if (!is_value) {
      float sine, cosine;
      sincosf(static_cast<float>(position) * frequencies[i], &sine, &cosine);
      const float turned = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = turned;
    }
    x[i] = a;
    x[i + d / 2] = b;
    if (kept != nullptr) kept[i] = a, kept[i + d / 2] = b;
  }
}

template <typename Combine>
__device__ float reduce_block(float x, float* shared, Combine combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(~0u, x, offset));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
  for (unsigned i = 1; i < blockDim.x / kWarp; ++i) x = combine(x, shared[i]);
  return x;
}

__device__ float largest_of(float a, float b) { return fmaxf(a, b); }
__device__ float sum_of(float a, float b) { return a + b; }

// A block is a query: kThreads positions at a time, with a running maximum, and a thread for some of the output's
// dimensions. Shared memory: the query and the sums of the output, [d] each.
__global__ void attend_kernel(const float* qkv, Cache cache, int64_t begin, int64_t heads, int64_t kv_heads, int64_t d,
                              int64_t capacity, float scale, float* y) {
  extern __shared__ float memory[];
  __shared__ float weights[kThreads], reduced[kThreads / kWarp];
  float *query = memory, *sums = memory + d;
  const int64_t token = blockIdx.x, head = blockIdx.y, kv = head / (heads / kv_heads);
  const float* q = qkv + (token * (heads + 2 * kv_heads) + head) * d;
  const float *keys = cache.keys + kv * capacity * d, *values = cache.values + kv * capacity * d;
  for (int64_t i = threadIdx.x; i < d; i += kThreads) query[i] = q[i] * scale, sums[i] = 0;
  __syncthreads();

  float largest = -FLT_MAX, total = 0;
  const int64_t seen = begin + token + 1;
  for (int64_t p = 0; p < seen; p += kThreads) {
    const int64_t position = p + threadIdx.x;
    float score = -FLT_MAX;
    if (position < seen) {
      score = 0;
      for (int64_t i = 0; i < d; ++i) score += query[i] * keys[position * d + i];
    }
    const float before = largest;
    largest = fmaxf(largest, reduce_block(score, reduced, largest_of));
    const float weight = position < seen ? expf(score - largest) : 0.0f, rescale = expf(before - largest);
    total = total * rescale + reduce_block(weight, reduced, sum_of);
    weights[threadIdx.x] = weight;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < d; i += kThreads) {
      float sum = sums[i] * rescale;
      for (int64_t j = 0; j < min(seen - p, int64_t{kThreads}); ++j) sum += weights[j] * values[(p + j) * d + i];
      sums[i] = sum;
    }
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < d; i += kThreads) y[(token * heads + head) * d + i] = sums[i] / total;
}

__global__ void norm_kernel(const float* x, const float* residual, const float* weight, float eps, int64_t hidden,
                            float* y) {
  __shared__ float reduced[kThreads / kWarp];
  float squares = 0;
  for (int64_t k = threadIdx.x; k < hidden; k += kThreads) squares += (x[k] + residual[k]) * (x[k] + residual[k]);
  squares = reduce_block(squares, reduced, sum_of);
  const float factor = rsqrtf(squares / static_cast<float>(hidden) + eps);
  for (int64_t k = threadIdx.x; k < hidden; k += kThreads) y[k] = (x[k] + residual[k]) * factor * weight[k];
}

// A warp is a row.
template <typename T>
__global__ void head_kernel(const T* w, const float* x, int64_t rows, int64_t cols, float* logits) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (row >= rows) return;
  float sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < cols; k += kWarp) sum += value(w + row * cols + k) * x[k];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % kWarp == 0) logits[row] = sum;
}

// The first of the largest logits, or -1 if one is not a number. One block.
__global__ void argmax_kernel(const float* logits, int64_t count, int32_t* result) {
  __shared__ float reduced[kThreads / kWarp];
  float largest = -INFINITY, bad = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    largest = fmaxf(largest, logits[i]);
    if (isnan(logits[i])) bad = 1;
  }
  largest = reduce_block(largest, reduced, largest_of);
  bad = reduce_block(bad, reduced, largest_of);
  if (threadIdx.x == 0) *result = INT32_MAX;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (logits[i] == largest) atomicMin(result, static_cast<int32_t>(i));
  }
  __syncthreads();
  if (threadIdx.x == 0 && bad != 0) *result = -1;
}

class Gpu : public Device {
 public:
  explicit Gpu(int index) {
    flexq::check(flexq_device_available(FLEXQ_CUDA, index));
    check(cudaSetDevice(index));
    check(cudaStreamCreate(&cuda_));
    stream_ = flexq::Stream::cuda(index, cuda_);
  }
  ~Gpu() override {
    cudaStreamSynchronize(cuda_);
    for (void* memory : memory_) cudaFree(memory);
    cudaStreamDestroy(cuda_);
  }
  const flexq_stream* stream() const override { return &stream_; }

  void* allocate(size_t bytes, const void* from) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes + 1));
    memory_.push_back(memory);
    // On the stream, so that it is done before what follows there; host memory is pageable, so the copy has read it.
    if (from == nullptr) {
      check(cudaMemsetAsync(memory, 0, bytes, cuda_));
    } else {
      check(cudaMemcpyAsync(memory, from, bytes, cudaMemcpyHostToDevice, cuda_));
    }
    return memory;
  }
  void release_last() override {
    check(cudaStreamSynchronize(cuda_));
    check(cudaFree(memory_.back()));
    memory_.pop_back();
  }

  int64_t cache_floats(const Config& c, int64_t positions) const override {
    return c.kv_heads * positions * c.head_dim;
  }
  void prepare(const Config& config, int64_t positions) override {
    config_ = &config;
    capacity_ = positions;
    const size_t bytes = config.frequencies.size() * sizeof(float);
    frequencies_ = static_cast<float*>(allocate(bytes, config.frequencies.data()));
    tokens_ = static_cast<int32_t*>(allocate(static_cast<size_t>(positions) * sizeof(int32_t), nullptr));
    result_ = static_cast<int32_t*>(allocate(sizeof(int32_t), nullptr));
  }

  void embed(const Matrix& embeddings, const int32_t* tokens, int64_t m, float* x) override {
    const auto bytes = static_cast<size_t>(m) * sizeof(int32_t);
    check(cudaMemcpyAsync(tokens_, tokens, bytes, cudaMemcpyHostToDevice, cuda_));
    with_type(embeddings,
              [&](const auto* w) { embed_kernel<<<blocks(m), kThreads, 0, cuda_>>>(w, tokens_, embeddings.cols, x); });
    check(cudaGetLastError());
  }

  void attend(const Cache& cache, float* qkv, int64_t m, int64_t begin, float* y) override {
    const int64_t d = config_->head_dim, heads = config_->heads, kv = config_->kv_heads;
    rotate_kernel<<<dim3(blocks(m), blocks(heads + 2 * kv)), kWarp, 0, cuda_>>>(qkv, cache, frequencies_, begin, heads,
                                                                                kv, d, capacity_);
    const auto shared = static_cast<size_t>(2 * d) * sizeof(float);
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    attend_kernel<<<dim3(blocks(m), blocks(heads)), kThreads, shared, cuda_>>>(qkv, cache, begin, heads, kv, d,
                                                                               capacity_, scale, y);
    check(cudaGetLastError());
  }

  void norm(const float* x, const float* residual, const float* weight, float eps, float* y) override {
    norm_kernel<<<1, kThreads, 0, cuda_>>>(x, residual, weight, eps, config_->hidden, y);
    check(cudaGetLastError());
  }

  void head(const Matrix& head, const float* x, float* logits) override {
    constexpr int64_t kRows = kThreads / kWarp;
    with_type(head, [&](const auto* w) {
      head_kernel<<<blocks((head.rows + kRows - 1) / kRows), kThreads, 0, cuda_>>>(w, x, head.rows, head.cols, logits);
    });
    check(cudaGetLastError());
  }

  int32_t argmax(const float* logits, int64_t count) override {
    argmax_kernel<<<1, kThreads, 0, cuda_>>>(logits, count, result_);
    check(cudaGetLastError());
    int32_t token = 0;
    check(cudaMemcpyAsync(&token, result_, sizeof token, cudaMemcpyDeviceToHost, cuda_));
    check(cudaStreamSynchronize(cuda_));
    if (token < 0 || token >= count) throw std::runtime_error("the model's output is not finite");
    return token;
  }

 private:
  static unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

  template <typename Body>
  static void with_type(const Matrix& matrix, const Body& body) {
    if (matrix.dtype == "BF16") return body(static_cast<const uint16_t*>(matrix.data));
    body(static_cast<const float*>(matrix.data));
  }

  cudaStream_t cuda_ = nullptr;
  flexq::Stream stream_{};
  std::vector<void*> memory_;
  const Config* config_ = nullptr;
  int64_t capacity_ = 0;
  float* frequencies_ = nullptr;
  int32_t *tokens_ = nullptr, *result_ = nullptr;
};

}  // namespace

std::unique_ptr<Device> cuda_device(int index) { return std::make_unique<Gpu>(index); }
