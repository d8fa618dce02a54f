// A Llama-like model of 6-bit weights: its configuration, its weights on a device, and the forward pass.
//
// The linear layers are libflexq's. What is between them (embeddings, rotary positions, attention, the choice of a
// token) is a Device's: plain C++ in cpu.cpp, plain CUDA in cuda.cu. Hidden states are fp32 on both.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "flexq/flexq.hpp"

struct Config {
  explicit Config(const Json& config);  // a transformers config.json; refuses what the forward pass does not do

  int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, positions;
  float norm_eps;
  bool tied_head;
  std::vector<float> frequencies;  // of the rotary embedding, [head_dim / 2]
};

// Keys and values of one layer, in the device's order.
struct Cache {
  float* keys = nullptr;
  float* values = nullptr;
};

// The embedding matrix, or an LM head in floating point: [rows][cols], in the checkpoint's dtype.
struct Matrix {
  const void* data = nullptr;
  std::string dtype;  // BF16 or F32
  int64_t rows = 0, cols = 0;
};

// Memory and the operations that libflexq does not have. All matrices are row-major and on the device.
class Device {
 public:
  virtual ~Device() = default;
  virtual const flexq_stream* stream() const = 0;
  // Memory of the device, aligned for libflexq, freed with the device. With `from`, a copy of host memory.
  virtual void* allocate(size_t bytes, const void* from = nullptr) = 0;
  // Frees the last allocation, once everything that uses it is done.
  virtual void release_last() = 0;

  // Before all that follows. `config` outlives the device's use.
  virtual void prepare(const Config& config, int64_t positions) = 0;
  // Floats of the keys, and of the values, of one layer.
  virtual int64_t cache_floats(const Config& config, int64_t positions) const = 0;
  // x[m][hidden] = the rows of `embeddings` that `tokens`, in host memory, name.
  virtual void embed(const Matrix& embeddings, const int32_t* tokens, int64_t m, float* x) = 0;
  // qkv [m][(heads + 2 kv_heads) head_dim] are the queries, keys and values of positions `begin`, ... They are rotated,
  // keys and values join the cache, and y[m][heads * head_dim] is each token's attention to all up to itself.
  virtual void attend(const Cache& cache, float* qkv, int64_t m, int64_t begin, float* y) = 0;
  // y[hidden] = RMS norm of x + residual, times weight.
  virtual void norm(const float* x, const float* residual, const float* weight, float eps, float* y) = 0;
  // logits[rows] = head * x.
  virtual void head(const Matrix& head, const float* x, float* logits) = 0;
  // The first of the largest logits. Waits for it.
  virtual int32_t argmax(const float* logits, int64_t count) = 0;
};

std::unique_ptr<Device> cpu_device(int threads);
std::unique_ptr<Device> cuda_device(int index);

// Linear layers with one input, whose outputs lie side by side: q, k and v, or gate and up. Neighbours with the same
// settings are one weight.
class Linears {
 public:
  struct Part {
    flexq_weight_desc desc = FLEXQ_WEIGHT_DESC_INIT;
    int32_t act_bits = 8;
    int64_t column = 0;  // of the output, where this part begins
    void* packed = nullptr;
    size_t bytes = 0;
  };

  // `names` are those of the layers, each with `rows` and what the plan says of it.
  Linears(Device& device, const Checkpoint& checkpoint, const Json& plan, const std::vector<std::string>& names,
          const std::vector<int64_t>& rows, int64_t cols);

  int64_t rows() const { return rows_; }
  const std::vector<Part>& parts() const { return parts_; }
  const float* bias() const { return bias_; }

 private:
  std::vector<Part> parts_;
  int64_t rows_ = 0;
  float* bias_ = nullptr;
};

class Model {
 public:
  // Room for `positions` tokens. Prompts are read `tokens_at_once` at a time.
  Model(Device& device, const Checkpoint& checkpoint, int64_t positions, int64_t tokens_at_once = 512);

  // Appends tokens to what the model has read, and returns the likeliest next one.
  int32_t forward(const std::vector<int32_t>& tokens);
  void forget() { position_ = 0; }
  const Config& config() const { return config_; }

 private:
  struct Layer {
    float *input_norm, *post_norm;
    Linears qkv, out, gate_up, down;
    Cache cache;
  };

  void read(const int32_t* tokens, int64_t m);
  int32_t next_token(int64_t m);
  template <typename Quantize>
  void linears(const Linears& weights, int64_t m, float* y, const Quantize& quantize);

  Device& device_;
  Config config_;
  int64_t positions_, tokens_at_once_, position_ = 0;
  Matrix embeddings_, head_;
  std::unique_ptr<Linears> packed_head_;  // instead of head_, where the plan names the LM head
  float* final_norm_;
  std::vector<Layer> layers_;
  // [tokens at once][...]
  float *x_, *delta_, *qkv_, *attended_, *gate_up_, *logits_;
  void *quantized_, *workspace_;
  size_t quantized_bytes_ = 0, workspace_bytes_ = 0;
};
