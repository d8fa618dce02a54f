// A thin C++17 face of flexq.h: exceptions for statuses, RAII for memory and threads. Header-only.
//
//   flexq::ThreadPool pool(8);
//   const flexq::Stream stream = flexq::Stream::cpu(pool);
//   const flexq::Weight weight = flexq::Weight::quantize(stream, {n, k}, w.data(), k);
//   flexq::Linear linear(stream, weight);
//   linear(stream, x.data(), m, y.data());
#ifndef FLEXQ_FLEXQ_HPP
#define FLEXQ_FLEXQ_HPP

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "flexq/flexq.h"

namespace flexq {

// A status other than FLEXQ_OK, with the library's message.
class Exception : public std::runtime_error {
 public:
  Exception(flexq_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  flexq_status status() const noexcept { return status_; }

 private:
  flexq_status status_;
};

inline void check(flexq_status status) {
  if (status != FLEXQ_OK) throw Exception(status, flexq_last_error());
}

// fp16 and bf16 values are passed as their bits in these.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

template <typename T>
constexpr flexq_dtype dtype_of() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>,
                "elements are float, flexq::half_t or flexq::bfloat16_t");
  return std::is_same_v<T, float>    ? flexq_dtype{FLEXQ_F32}
         : std::is_same_v<T, half_t> ? flexq_dtype{FLEXQ_F16}
                                     : flexq_dtype{FLEXQ_BF16};
}

// Host memory aligned as prepacked weights, activations and workspaces must be. Grows, never shrinks.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) { reserve(bytes); }
  void reserve(size_t bytes) {
    if (bytes <= size_) return;
    data_.reset(static_cast<uint8_t*>(::operator new(bytes, kAlignment)));
    size_ = bytes;
  }
  uint8_t* data() const noexcept { return data_.get(); }
  size_t size() const noexcept { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{FLEXQ_ALIGNMENT};
  struct Free {
    void operator()(uint8_t* p) const noexcept { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

class ThreadPool {
 public:
  explicit ThreadPool(int32_t num_threads) {
    flexq_thread_pool* pool = nullptr;
    check(flexq_thread_pool_create(num_threads, &pool));
    pool_.reset(pool);
  }
  const flexq_executor* executor() const noexcept { return flexq_thread_pool_executor(pool_.get()); }

 private:
  struct Destroy {
    void operator()(flexq_thread_pool* p) const noexcept { flexq_thread_pool_destroy(p); }
  };
  std::unique_ptr<flexq_thread_pool, Destroy> pool_;
};

// A flexq_stream; does not own what it names.
struct Stream : flexq_stream {
  static Stream cpu(const flexq_executor* executor = nullptr) {
    return Stream{{sizeof(flexq_stream), FLEXQ_CPU, 0, nullptr, executor, nullptr}};
  }
  static Stream cpu(const ThreadPool& pool) { return cpu(pool.executor()); }
  static Stream cuda(int32_t device_index, void* cuda_stream) {
    return Stream{{sizeof(flexq_stream), FLEXQ_CUDA, device_index, cuda_stream, nullptr, nullptr}};
  }
};

struct WeightDesc : flexq_weight_desc {
  WeightDesc(int64_t out_features, int64_t in_features, flexq_scheme scales = FLEXQ_SCHEME_GROUP,
             flexq_rotation rotated = FLEXQ_ROTATION_HADAMARD128, int32_t bits = FLEXQ_WEIGHT_BITS)
      : flexq_weight_desc{sizeof(flexq_weight_desc), out_features, in_features, bits, scales, rotated, 0} {}
};

struct ActivationDesc : flexq_activation_desc {
  ActivationDesc(int64_t tokens, int64_t in_features, int32_t bits = 8, flexq_scheme scales = FLEXQ_SCHEME_GROUP,
                 flexq_rotation rotated = FLEXQ_ROTATION_HADAMARD128)
      : flexq_activation_desc{sizeof(flexq_activation_desc), tokens, in_features, bits, scales, rotated, 0} {}
};

// A weight in canonical form, in host memory.
class Weight {
 public:
  explicit Weight(const WeightDesc& desc) : desc_(desc) {
    size_t planes = 0, scales = 0;
    check(flexq_weight_size(&desc_, &planes, &scales));
    planes_.resize(planes);
    scales_.resize(scales / sizeof(uint16_t));
  }

  // w: [n][k], rows ldw elements apart (0: k). `vanished`, unless null, gets the number of scales that did in fp16.
  template <typename T>
  static Weight quantize(const Stream& stream, const WeightDesc& desc, const T* w, int64_t ldw = 0,
                         int64_t* vanished = nullptr) {
    Weight weight(desc);
    check(flexq_quantize_weight(&stream, &weight.desc_, w, dtype_of<T>(), ldw == 0 ? desc.k : ldw,
                                weight.planes_.data(), weight.scales_.data(), vanished));
    return weight;
  }

  // w: [n][k], rows ldw elements apart (0: k), written.
  template <typename T>
  void dequantize(const Stream& stream, T* w, int64_t ldw = 0) const {
    check(flexq_dequantize_weight(&stream, &desc_, planes_.data(), scales_.data(), w, dtype_of<T>(),
                                  ldw == 0 ? desc_.k : ldw));
  }

  const WeightDesc& desc() const noexcept { return desc_; }
  std::vector<uint8_t>& planes() noexcept { return planes_; }
  const std::vector<uint8_t>& planes() const noexcept { return planes_; }
  std::vector<uint16_t>& scales() noexcept { return scales_; }
  const std::vector<uint16_t>& scales() const noexcept { return scales_; }

 private:
  WeightDesc desc_;
  std::vector<uint8_t> planes_;
  std::vector<uint16_t> scales_;
};

namespace detail {

// Throws for a stream of another device than the CPU, whose memory a class holds.
inline void require_cpu(const Stream& stream, const char* what) {
  if (stream.device != FLEXQ_CPU) {
    throw Exception(FLEXQ_INVALID_ARGUMENT, std::string(what) +
                                                " is for the CPU, stream.device must be FLEXQ_CPU (0), got " +
                                                std::to_string(stream.device) + "; use the C API for device memory");
  }
}

// For messages.
inline std::string text_of(const WeightDesc& desc) {
  return "n " + std::to_string(desc.n) + ", k " + std::to_string(desc.k) + ", scheme " + std::to_string(desc.scheme) +
         ", rotation " + std::to_string(desc.rotation) + ", weight_bits " + std::to_string(desc.weight_bits);
}

}  // namespace detail

// A prepacked weight for the CPU, with the workspace its calls need: one call at a time.
class Linear {
 public:
  Linear(const Stream& stream, const Weight& weight, int32_t act_bits = 8) : desc_(weight.desc()), act_bits_(act_bits) {
    detail::require_cpu(stream, "flexq::Linear");
    size_t bytes = 0;
    check(flexq_prepack_size(&stream, &desc_, &bytes));
    packed_.reserve(bytes);
    check(flexq_prepack(&stream, &desc_, weight.planes().data(), weight.scales().data(), packed_.data(), bytes));
  }

  // y[m][n] = x[m][k] * w^T + bias. ldx and ldy default to k and n.
  template <typename X, typename Y>
  void operator()(const Stream& stream, const X* x, int64_t m, Y* y, const Y* bias = nullptr, int64_t ldx = 0,
                  int64_t ldy = 0) {
    detail::require_cpu(stream, "flexq::Linear");
    size_t bytes = 0;
    check(flexq_linear_workspace_size(&stream, &desc_, act_bits_, m, &bytes));
    workspace_.reserve(bytes);
    check(flexq_linear(&stream, &desc_, packed_.data(), packed_.size(), act_bits_, m, x, dtype_of<X>(),
                       ldx == 0 ? desc_.k : ldx, bias, dtype_of<Y>(), y, dtype_of<Y>(), ldy == 0 ? desc_.n : ldy,
                       workspace_.data(), workspace_.size()));
  }

  const WeightDesc& desc() const noexcept { return desc_; }
  int32_t act_bits() const noexcept { return act_bits_; }

 private:
  WeightDesc desc_;
  int32_t act_bits_;
  Buffer packed_;
  Buffer workspace_;
};

struct ExpertsDesc : flexq_experts_desc {
  ExpertsDesc(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size)
      : flexq_experts_desc(FLEXQ_EXPERTS_DESC_INIT) {
    experts = num_experts;
    hidden = hidden_size;
    intermediate = intermediate_size;
  }
  // What one expert's weight of a projection is.
  WeightDesc weight(flexq_projection projection) const {
    const bool up = projection == FLEXQ_GATE_UP;
    const flexq_projection_format& format = up ? gate_up : down;
    return WeightDesc(up ? 2 * intermediate : hidden, up ? hidden : intermediate, format.scheme, format.rotation,
                      format.weight_bits);
  }
};

// What a router decided for `tokens` tokens; does not own what it names.
struct Routing : flexq_routing {
  Routing(int64_t tokens, int64_t experts_of_each, const int32_t* chosen, const float* router_weights)
      : flexq_routing(FLEXQ_ROUTING_INIT) {
    m = tokens;
    top_k = experts_of_each;
    ids = chosen;
    weights = router_weights;
  }
};

// Prepacked experts for the CPU, with the workspace their calls need: one call at a time. Fill in each expert's weights
// before the first.
class Experts {
 public:
  Experts(const Stream& stream, const ExpertsDesc& desc) : desc_(desc) {
    detail::require_cpu(stream, "flexq::Experts");
    for (const flexq_projection projection : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      size_t bytes = 0;
      check(flexq_experts_prepack_size(&stream, &desc_, projection, &bytes));
      packed_[projection].reserve(bytes);
    }
  }

  void set(const Stream& stream, int64_t expert, const Weight& gate_up, const Weight& down) {
    for (const flexq_projection projection : {FLEXQ_GATE_UP, FLEXQ_DOWN}) {
      const bool up = projection == FLEXQ_GATE_UP;
      const Weight& weight = up ? gate_up : down;
      const WeightDesc wanted = desc_.weight(projection);
      if (weight.desc().n != wanted.n || weight.desc().k != wanted.k || weight.desc().scheme != wanted.scheme ||
          weight.desc().rotation != wanted.rotation || weight.desc().weight_bits != wanted.weight_bits) {
        throw Exception(FLEXQ_INVALID_ARGUMENT, std::string(up ? "gate_up" : "down") + " of an expert must be " +
                                                    detail::text_of(wanted) + ", got " +
                                                    detail::text_of(weight.desc()));
      }
      check(flexq_experts_prepack(&stream, &desc_, projection, expert, 1, weight.planes().data(),
                                  weight.scales().data(), packed_[projection].data(), packed_[projection].size()));
    }
  }

  // y[m][hidden] of x[m][hidden]. Biases: [E][2I] and [E][H], or null. ldx and ldy default to hidden.
  template <typename X, typename Y>
  void operator()(const Stream& stream, const Routing& routing, const X* x, Y* y, const X* gate_up_bias = nullptr,
                  const X* down_bias = nullptr, int64_t ldx = 0, int64_t ldy = 0) {
    detail::require_cpu(stream, "flexq::Experts");
    size_t bytes = 0;
    check(flexq_experts_workspace_size(&stream, &desc_, routing.m, routing.top_k, dtype_of<X>(), &bytes));
    workspace_.reserve(bytes);
    check(flexq_experts_forward(&stream, &desc_, packed_[FLEXQ_GATE_UP].data(), packed_[FLEXQ_GATE_UP].size(),
                                packed_[FLEXQ_DOWN].data(), packed_[FLEXQ_DOWN].size(), &routing, x, dtype_of<X>(),
                                ldx == 0 ? desc_.hidden : ldx, gate_up_bias, down_bias, dtype_of<X>(), y, dtype_of<Y>(),
                                ldy == 0 ? desc_.hidden : ldy, workspace_.data(), workspace_.size()));
  }

  const ExpertsDesc& desc() const noexcept { return desc_; }

 private:
  ExpertsDesc desc_;
  Buffer packed_[2];
  Buffer workspace_;
};

}  // namespace flexq

#endif  // FLEXQ_FLEXQ_HPP
