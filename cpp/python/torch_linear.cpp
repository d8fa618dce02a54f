// Operators on activations and linear layers.
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "conversions.h"
#include "torch_arguments.h"
#include "torch_ops.h"

namespace flexq::python {
namespace {

struct Bias {
  Bias(const Tensor& t, int64_t n, const Device& device) {
    if (!t.defined()) return;
    if (!t.is_vector(n) || t.device != device) {
      refuse("bias must be contiguous [" + std::to_string(n) + "] on " + device.name() + ", got " + t.shape() + " on " +
             t.device.name());
    }
    data = t.data;
    dtype = dtype_of(t.dtype, "bias");
  }
  const void* data = nullptr;
  flexq_dtype dtype = FLEXQ_F32;
};

// How an operator's activation is quantized.
struct Format {
  explicit Format(Arguments& arguments)
      : act_bits(arguments.integer()), scheme(arguments.string()), rotation(arguments.string()) {}
  int64_t act_bits;
  std::string scheme, rotation;
};

// A prepacked weight, and how it is multiplied: what an operator that ends in a linear layer is given last.
struct Weight {
  explicit Weight(Arguments& arguments)
      : packed(arguments.tensor()),
        bias(arguments.optional_tensor()),
        n(arguments.integer()),
        format(arguments),
        weight_bits(arguments.integer()) {}
  Tensor packed, bias;
  int64_t n;
  Format format;
  int64_t weight_bits;
};

flexq_activation_desc activation_desc(int64_t m, int64_t k, const Format& format) {
  return {sizeof(flexq_activation_desc), m, k, act_bits_of(format.act_bits), scheme_of(format.scheme),
          rotation_of(format.rotation),  0};
}

flexq_weight_desc weight_desc(int64_t n, int64_t k, const Format& format, int64_t weight_bits) {
  return {sizeof(flexq_weight_desc),    n, k, weight_bits_of(weight_bits), scheme_of(format.scheme),
          rotation_of(format.rotation), 0};
}

// Room for a quantized activation.
Tensor activation_like(const flexq_stream& stream, const flexq_activation_desc& desc, const Device& device) {
  size_t bytes = 0;
  check(flexq_activation_size(&stream, &desc, &bytes));
  return Tensor::bytes(bytes, device);
}

// (Tensor x, int act_bits, str scheme, str rotation) -> Tensor
void quantize_activation(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const Format format(arguments);

  const Rows rows(x);
  const flexq_stream stream = stream_on(x.device);
  const flexq_activation_desc desc = activation_desc(rows.rows, rows.k, format);
  Tensor out = activation_like(stream, desc, x.device);
  check(flexq_quantize_activation(&stream, &desc, rows.data, rows.dtype, rows.ld, out.data,
                                  static_cast<size_t>(out.numel())));
  stack[0] = result(std::move(out));
}

// The quantized RMS norm of x + residual, and that sum.
std::pair<Tensor, Tensor> quantize_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps,
                                        const Format& format) {
  const Rows rows(x);
  if (residual.defined() && (!residual.same_shape(x) || residual.dtype != x.dtype || residual.device != x.device)) {
    refuse("residual must be like x, " + dtype_name(x.dtype) + " " + x.shape() + ", got " + dtype_name(residual.dtype) +
           " " + residual.shape());
  }
  if (!weight.is_vector(rows.k) || weight.dtype != x.dtype || weight.device != x.device) {
    refuse("weight must be contiguous " + dtype_name(x.dtype) + " [" + std::to_string(rows.k) + "] on " +
           x.device.name() + ", got " + dtype_name(weight.dtype) + " " + weight.shape());
  }
  std::optional<Rows> other;
  if (residual.defined()) other.emplace(residual, "residual");
  const flexq_stream stream = stream_on(x.device);
  const flexq_activation_desc desc = activation_desc(rows.rows, rows.k, format);
  Tensor out = activation_like(stream, desc, x.device);
  Tensor sum = Tensor::empty(x.sizes, x.dim, x.dtype, x.device);
  check(flexq_rms_norm_quantize(&stream, &desc, rows.data, rows.ld, other ? other->data : nullptr,
                                other ? other->ld : 0, weight.data, eps, rows.dtype, sum.data, rows.k, out.data,
                                static_cast<size_t>(out.numel())));
  return {std::move(out), std::move(sum)};
}

// The quantized silu(gate) * up, both `rows` rows of k elements.
Tensor quantize_product(const void* gate, int64_t ld_gate, const void* up, int64_t ld_up, flexq_dtype dtype,
                        int64_t rows, int64_t k, const Device& device, const Format& format) {
  const flexq_stream stream = stream_on(device);
  const flexq_activation_desc desc = activation_desc(rows, k, format);
  Tensor out = activation_like(stream, desc, device);
  check(flexq_silu_mul_quantize(&stream, &desc, gate, ld_gate, up, ld_up, dtype, out.data,
                                static_cast<size_t>(out.numel())));
  return out;
}

// quantized [M, K] x packed [N, K]^T + bias, of a dtype and of a shape [..., N] of M rows.
Tensor multiply(const Tensor& quantized, const Tensor& packed, const Tensor& bias, int64_t m, int64_t n, int64_t k,
                const Format& format, int32_t dtype, int64_t weight_bits, const std::vector<int64_t>& shape) {
  if (quantized.device != packed.device) {
    refuse("the activation is on " + quantized.device.name() + ", the weight on " + packed.device.name());
  }
  const flexq_dtype y_dtype = dtype_of(dtype, "dtype");
  const size_t packed_bytes = buffer_size(packed, "packed"), quantized_bytes = buffer_size(quantized, "quantized");
  const Bias b(bias, n, packed.device);
  const flexq_stream stream = stream_on(packed.device);
  const flexq_weight_desc desc = weight_desc(n, k, format, weight_bits);
  const flexq_activation_desc act_desc = activation_desc(m, k, format);
  size_t bytes = 0;
  check(flexq_gemm_workspace_size(&stream, &desc, act_desc.act_bits, m, &bytes));
  const Tensor workspace = bytes > 0 ? Tensor::bytes(bytes, packed.device) : Tensor();
  Tensor y = Tensor::empty(shape.data(), static_cast<int64_t>(shape.size()), dtype, packed.device);
  check(flexq_gemm(&stream, &desc, packed.data, packed_bytes, &act_desc, quantized.data, quantized_bytes, b.data,
                   b.dtype, y.data, y_dtype, n, workspace.data, bytes));
  return y;
}

// x's shape with n features.
std::vector<int64_t> with_features(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
  sizes.back() = n;
  return sizes;
}

// (Tensor x, Tensor? residual, Tensor weight, float eps, int act_bits, str scheme, str rotation) -> (Tensor, Tensor)
void rms_norm_quantize(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), residual = arguments.optional_tensor(), weight = arguments.tensor();
  const auto eps = static_cast<float>(arguments.number());
  const Format format(arguments);

  auto [quantized, sum] = quantize_norm(x, residual, weight, eps, format);
  stack[0] = result(std::move(quantized));
  stack[1] = result(std::move(sum));
}

// (Tensor x, Tensor? residual, Tensor norm_weight, float eps, Tensor packed, Tensor? bias, int n, int act_bits,
//  str scheme, str rotation, int weight_bits) -> (Tensor, Tensor)
void rms_norm_linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor(), residual = arguments.optional_tensor(), norm_weight = arguments.tensor();
  const auto eps = static_cast<float>(arguments.number());
  const Weight w(arguments);

  auto [quantized, sum] = quantize_norm(x, residual, norm_weight, eps, w.format);
  const int64_t k = x.sizes[x.dim - 1];
  stack[0] = result(multiply(quantized, w.packed, w.bias, x.numel() / k, w.n, k, w.format, x.dtype, w.weight_bits,
                             with_features(x, w.n)));
  stack[1] = result(std::move(sum));
}

// (Tensor gate, Tensor up, int act_bits, str scheme, str rotation) -> Tensor
void silu_mul_quantize(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor gate = arguments.tensor(), up = arguments.tensor();
  const Format format(arguments);

  if (!up.same_shape(gate) || up.dtype != gate.dtype || up.device != gate.device) {
    refuse("up must be like gate, " + dtype_name(gate.dtype) + " " + gate.shape() + ", got " + dtype_name(up.dtype) +
           " " + up.shape());
  }
  const Rows rows(gate, "gate"), other(up, "up");
  stack[0] = result(
      quantize_product(rows.data, rows.ld, other.data, other.ld, rows.dtype, rows.rows, rows.k, gate.device, format));
}

// (Tensor gate_up, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation, int weight_bits)
//  -> Tensor
void silu_mul_linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor gate_up = arguments.tensor();
  const Weight w(arguments);

  const int64_t features = gate_up.dim == 0 ? 0 : gate_up.sizes[gate_up.dim - 1];
  if (features == 0 || features % 2 != 0) {
    refuse("gate_up must be [..., 2K] with K at least 1, got " + gate_up.shape());
  }
  const Rows rows(gate_up, "gate_up");
  const int64_t k = features / 2;
  const auto* up = static_cast<const char*>(rows.data) + k * (rows.dtype == FLEXQ_F32 ? 4 : 2);
  const Tensor quantized =
      quantize_product(rows.data, rows.ld, up, rows.ld, rows.dtype, rows.rows, k, gate_up.device, w.format);
  stack[0] = result(multiply(quantized, w.packed, w.bias, rows.rows, w.n, k, w.format, gate_up.dtype, w.weight_bits,
                             with_features(gate_up, w.n)));
}

// (Tensor quantized, Tensor packed, Tensor? bias, SymInt m, int n, int k, int act_bits, str scheme, str rotation,
//  ScalarType dtype, int weight_bits) -> Tensor
void gemm(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor quantized = arguments.tensor(), packed = arguments.tensor(), bias = arguments.optional_tensor();
  const int64_t m = arguments.integer(), n = arguments.integer(), k = arguments.integer();
  const Format format(arguments);
  const int32_t dtype = arguments.dtype();
  const int64_t weight_bits = arguments.integer();

  stack[0] = result(multiply(quantized, packed, bias, m, n, k, format, dtype, weight_bits, {m, n}));
}

// (Tensor x, Tensor packed, Tensor? bias, int n, int act_bits, str scheme, str rotation, int weight_bits) -> Tensor
void linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor x = arguments.tensor();
  const Weight w(arguments);

  if (x.device != w.packed.device) {
    refuse("x is on " + x.device.name() + ", the weight on " + w.packed.device.name());
  }
  const Rows rows(x);
  const size_t packed_bytes = buffer_size(w.packed, "packed");
  const Bias b(w.bias, w.n, x.device);
  const flexq_stream stream = stream_on(x.device);
  const flexq_weight_desc desc = weight_desc(w.n, rows.k, w.format, w.weight_bits);
  const int32_t act_bits = act_bits_of(w.format.act_bits);
  size_t bytes = 0;
  check(flexq_linear_workspace_size(&stream, &desc, act_bits, rows.rows, &bytes));
  const Tensor workspace = bytes > 0 ? Tensor::bytes(bytes, x.device) : Tensor();
  const std::vector<int64_t> shape = with_features(x, w.n);
  Tensor y = Tensor::empty(shape.data(), x.dim, x.dtype, x.device);
  check(flexq_linear(&stream, &desc, w.packed.data, packed_bytes, act_bits, rows.rows, rows.data, rows.dtype, rows.ld,
                     b.data, b.dtype, y.data, rows.dtype, w.n, workspace.data, bytes));
  stack[0] = result(std::move(y));
}

constexpr Operator kOperators[] = {{"quantize_activation", quantize_activation},
                                   {"rms_norm_quantize", rms_norm_quantize},
                                   {"silu_mul_quantize", silu_mul_quantize},
                                   {"rms_norm_linear", rms_norm_linear},
                                   {"silu_mul_linear", silu_mul_linear},
                                   {"gemm", gemm},
                                   {"linear", linear}};

}  // namespace

std::span<const Operator> linear_operators() { return kOperators; }

}  // namespace flexq::python
