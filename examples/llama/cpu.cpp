// What a Llama needs beside linear layers, on the CPU, in the compiler's own vectors (GCC and Clang).
//
// Keys are kept in blocks of kLanes positions, [kv head][block][head_dim][kLanes], so that scores of neighbouring
// positions are neighbours and a block is one stretch of memory. Values are [kv head][position][head_dim], rows padded
// to kLanes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "model.h"

namespace {

using Floats = float __attribute__((vector_size(64)));
using Integers = int32_t __attribute__((vector_size(64)));
constexpr int kWidth = 16;   // floats in a vector
constexpr int kVectors = 2;  // vectors that loops do at once, so that enough sums are under way
constexpr int kLanes = kVectors * kWidth;
constexpr int kRows = 4;  // rows of a matrix that share what is loaded

Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

Floats load(const uint16_t* bf16) {
  uint16_t __attribute__((vector_size(32))) v;
  std::memcpy(&v, bf16, sizeof v);
  return reinterpret_cast<Floats>(__builtin_convertvector(v, Integers) << 16);
}

void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

float scalar(float x) { return x; }
float scalar(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float sum_of(Floats v) {
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

// e^x to some units in the last place, for x <= 0.
Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // its last bits are round(x / ln 2)
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * r + c;
  }
  return (p * r * r + r + 1.0f) * reinterpret_cast<Floats>((__builtin_convertvector(n, Integers) + 127) << 23);
}

// Products of kRows rows of w, ldw apart, with x.
template <typename T>
void dot_rows(const T* w, int64_t ldw, const float* x, int64_t count, float* y) {
  Floats sums[kRows][kVectors] = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats other = load(x + k + v * kWidth);
      for (int r = 0; r < kRows; ++r) sums[r][v] += load(w + r * ldw + k + v * kWidth) * other;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    y[r] = sum_of(sums[r][0] + sums[r][1]);
    for (int64_t i = k; i < count; ++i) y[r] += scalar(w[r * ldw + i]) * x[i];
  }
}

class Cpu : public Device {
 public:
  explicit Cpu(int threads) : pool_(threads), stream_(flexq::Stream::cpu(pool_)) {}
  ~Cpu() override {
    while (!memory_.empty()) release_last();
  }
  const flexq_stream* stream() const override { return &stream_; }

  void* allocate(size_t bytes, const void* from) override {
    memory_.push_back(::operator new(bytes + FLEXQ_ALIGNMENT, std::align_val_t{FLEXQ_ALIGNMENT}));
    if (from == nullptr) {
      std::memset(memory_.back(), 0, bytes);
    } else {
      std::memcpy(memory_.back(), from, bytes);
    }
    return memory_.back();
  }
  void release_last() override {
    ::operator delete(memory_.back(), std::align_val_t{FLEXQ_ALIGNMENT});
    memory_.pop_back();
  }

  int64_t cache_floats(const Config& c, int64_t positions) const override {
    return c.kv_heads * padded(positions) * padded(c.head_dim);
  }

  void prepare(const Config& config, int64_t positions) override {
    config_ = &config;
    capacity_ = padded(positions);
    value_row_ = padded(config.head_dim);
    for (int64_t p = 0; p < positions; ++p) {
      for (const float frequency : config.frequencies) {
        cosines_.push_back(std::cos(static_cast<float>(p) * frequency));
        sines_.push_back(std::sin(static_cast<float>(p) * frequency));
      }
    }
  }

  void embed(const Matrix& embeddings, const int32_t* tokens, int64_t m, float* x) override {
    const int64_t h = embeddings.cols;
    for (int64_t t = 0; t < m; ++t) {
      const int64_t at = tokens[t] * h;
      with_type(embeddings, [&](const auto* w) {
        for (int64_t k = 0; k < h; ++k) x[t * h + k] = scalar(w[at + k]);
      });
    }
  }

  void attend(const Cache& cache, float* qkv, int64_t m, int64_t begin, float* y) override {
    const int64_t d = config_->head_dim, heads = config_->heads, kv = config_->kv_heads, group = heads / kv;
    parallel(m, 8, [&](int64_t t) { rotate_and_keep(cache, qkv + t * (heads + 2 * kv) * d, begin + t); });
    // Queries that share what is loaded: few heads of one token, or many of a prompt.
    m* group <= 4 ? attend_rows<4>(cache, qkv, m, begin, y) : attend_rows<8>(cache, qkv, m, begin, y);
  }

  void norm(const float* x, const float* residual, const float* weight, float eps, float* y) override {
    const int64_t h = config_->hidden;
    double squares = 0;
    for (int64_t k = 0; k < h; ++k) {
      const double sum = x[k] + residual[k];
      squares += sum * sum;
    }
    const auto factor = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(h) + double{eps}));
    for (int64_t k = 0; k < h; ++k) y[k] = (x[k] + residual[k]) * factor * weight[k];
  }

  void head(const Matrix& head, const float* x, float* logits) override {
    with_type(head, [&](const auto* w) {
      parallel((head.rows + kRows - 1) / kRows, 128, [&](int64_t tile) {
        const int64_t row = std::min(tile * kRows, std::max<int64_t>(head.rows - kRows, 0));
        if (head.rows < kRows) throw std::runtime_error("a vocabulary has 4 tokens or more");
        dot_rows(w + row * head.cols, head.cols, x, head.cols, logits + row);
      });
    });
  }

  int32_t argmax(const float* logits, int64_t count) override {
    float largest = -std::numeric_limits<float>::infinity();
    int nans = 0;
    for (int64_t i = 0; i < count; ++i) {
      largest = largest < logits[i] ? logits[i] : largest;
      nans |= logits[i] != logits[i];
    }
    if (nans != 0) throw std::runtime_error("the model's output is not finite");
    return static_cast<int32_t>(std::find(logits, logits + count, largest) - logits);
  }

 private:
  // body(i) for each i of [0, count), `grain` at a time, on the pool's threads where there is more than one piece.
  template <typename Body>
  void parallel(int64_t count, int64_t grain, const Body& body) {
    struct Context {
      const Body& body;
      int64_t count, grain;
    } context{body, count, grain};
    const auto piece = [](void* arg, int64_t index) {
      const auto& c = *static_cast<const Context*>(arg);
      for (int64_t i = index * c.grain; i < std::min(c.count, (index + 1) * c.grain); ++i) c.body(i);
    };
    const flexq_executor* executor = pool_.executor();
    executor->parallel_for(executor->context, (count + grain - 1) / grain, piece, &context);
  }

  template <typename Body>
  static void with_type(const Matrix& matrix, const Body& body) {
    if (matrix.dtype == "BF16") return body(static_cast<const uint16_t*>(matrix.data));
    body(static_cast<const float*>(matrix.data));
  }

  // Of one token: rotates queries and keys, whose two halves are the parts of complex numbers, and fills the cache.
  void rotate_and_keep(const Cache& cache, float* token, int64_t position) {
    const int64_t d = config_->head_dim, half = d / 2, heads = config_->heads, kv = config_->kv_heads;
    const float *cosines = cosines_.data() + position * half, *sines = sines_.data() + position * half;
    for (int64_t head = 0; head < heads + kv; ++head) {
      float *low = token + head * d, *high = low + half;
      for (int64_t i = 0; i < half; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a * cosines[i] - b * sines[i];
        high[i] = b * cosines[i] + a * sines[i];
      }
    }
    const float *keys = token + heads * d, *values = keys + kv * d;
    for (int64_t head = 0; head < kv; ++head) {
      float* block = cache.keys + head * capacity_ * d + position / kLanes * kLanes * d + position % kLanes;
      for (int64_t i = 0; i < d; ++i) block[i * kLanes] = keys[head * d + i];
      std::copy_n(values + head * d, d, cache.values + (head * capacity_ + position) * value_row_);
    }
  }

  // A row is a query of a token; those of a key-value head take turns: all heads of a token, then the next token.
  template <int kQueries>
  void attend_rows(const Cache& cache, const float* qkv, int64_t m, int64_t begin, float* y) {
    const int64_t kv = config_->kv_heads, tiles = (m * config_->heads / kv + kQueries - 1) / kQueries;
    const int64_t work = (begin + m) * kQueries * config_->head_dim;  // of a tile
    parallel(kv * tiles, std::max<int64_t>(1, 65536 / work), [&](int64_t task) {
      attend_tile<kQueries>(cache, qkv, m, begin, task / tiles, task % tiles * kQueries, y);
    });
  }

  // Attention of kQueries queries of key-value head `kv`, from row `row` on.
  template <int kQueries>
  void attend_tile(const Cache& cache, const float* qkv, int64_t m, int64_t begin, int64_t kv, int64_t row, float* y) {
    const int64_t d = config_->head_dim, heads = config_->heads, group = heads / config_->kv_heads;
    const int64_t stride = (heads + 2 * config_->kv_heads) * d;
    const float *keys = cache.keys + kv * capacity_ * d, *values = cache.values + kv * capacity_ * value_row_;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    thread_local std::vector<float> queries, scores;
    queries.resize(static_cast<size_t>(d * kQueries));
    scores.resize(static_cast<size_t>(kQueries * capacity_));
    float* score[kQueries];

    int64_t token[kQueries], head[kQueries];
    for (int r = 0; r < kQueries; ++r) {
      const int64_t at = std::min(row + r, m * group - 1);  // the last one again where there are no more
      token[r] = at / group;
      head[r] = kv * group + at % group;
      score[r] = scores.data() + r * capacity_;
      const float* q = qkv + token[r] * stride + head[r] * d;
      for (int64_t i = 0; i < d; ++i) queries[static_cast<size_t>(i * kQueries + r)] = q[i] * scale;
    }
    const int64_t seen = begin + token[kQueries - 1] + 1;  // positions that the last of them may look at
    for (int64_t p = 0; p < seen; p += kLanes) {
      Floats sums[kQueries][kVectors] = {};
      for (int64_t i = 0; i < d; ++i) {
        const float *q = queries.data() + i * kQueries, *k = keys + p * d + i * kLanes;
        for (int v = 0; v < kVectors; ++v) {
          const Floats key = load(k + v * kWidth);
          for (int r = 0; r < kQueries; ++r) sums[r][v] += q[r] * key;
        }
      }
      for (int r = 0; r < kQueries; ++r) {
        for (int v = 0; v < kVectors; ++v) store(score[r] + p + v * kWidth, sums[r][v]);
      }
    }
    float total[kQueries];
    for (int r = 0; r < kQueries; ++r) total[r] = softmax(score[r], begin + token[r] + 1, padded(seen));
    for (int64_t i = 0; i < d; i += kLanes) {
      Floats sums[kQueries][kVectors] = {};
      for (int64_t p = 0; p < seen; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          const Floats part = load(values + p * value_row_ + i + v * kWidth);
          for (int r = 0; r < kQueries; ++r) sums[r][v] += score[r][p] * part;
        }
      }
      for (int r = 0; r < kQueries && row + r < m * group; ++r) {
        float* out = y + (token[r] * heads + head[r]) * d;
        for (int64_t l = i; l < std::min<int64_t>(i + kLanes, d); ++l) {
          out[l] = sums[r][(l - i) / kWidth][(l - i) % kWidth] / total[r];
        }
      }
    }
  }

  // e^(s - max) of the first `count` scores, and zeros up to `end`, a multiple of kLanes; returns their sum.
  static float softmax(float* s, int64_t count, int64_t end) {
    const float largest = *std::max_element(s, s + count);
    Floats sums{};
    for (int64_t p = 0; p < end; p += kWidth) {
      Floats e = exponential(load(s + p) - largest);
      if (p + kWidth > count) {
        for (int64_t l = std::max<int64_t>(count - p, 0); l < kWidth; ++l) e[l] = 0;
      }
      store(s + p, e);
      sums += e;
    }
    return sum_of(sums);
  }

  static int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

  flexq::ThreadPool pool_;
  flexq::Stream stream_;
  std::vector<void*> memory_;
  const Config* config_ = nullptr;
  int64_t capacity_ = 0;                // positions
  int64_t value_row_ = 0;               // floats
  std::vector<float> cosines_, sines_;  // [position][head_dim / 2]
};

}  // namespace

std::unique_ptr<Device> cpu_device(int threads) { return std::make_unique<Cpu>(threads); }

#ifdef LLAMA_WITHOUT_CUDA
std::unique_ptr<Device> cuda_device(int) { throw std::runtime_error("this program was built without CUDA"); }
#endif
