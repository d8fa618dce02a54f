#include "model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

int64_t positive(const Json& config, const char* name, int64_t otherwise = 0) {
  const Json* found = config.find(name);
  const int64_t value = found == nullptr ? otherwise : found->integer();
  if (value < 1 || value > int64_t{1} << 31) fail(std::string("config.json: ") + name + " is missing or impossible");
  return value;
}

std::string text(const Json& config, const char* name, const char* otherwise) {
  const Json* found = config.find(name);
  return found == nullptr ? otherwise : found->string();
}

float* upload(Device& device, const Tensor& tensor) {
  const std::vector<float> values = tensor.to_float();
  return static_cast<float*>(device.allocate(values.size() * sizeof(float), values.data()));
}

Matrix matrix(Device& device, const Checkpoint& checkpoint, const std::string& name, int64_t rows, int64_t cols) {
  const Tensor& tensor = checkpoint.at(name, {rows, cols});
  if (tensor.dtype == "BF16" || tensor.dtype == "F32") {
    return {device.allocate(tensor.bytes, tensor.data), tensor.dtype, rows, cols};
  }
  return {upload(device, tensor), "F32", rows, cols};
}

// What the plan of a FlexQ checkpoint says of a layer.
Linears::Part part_of(const Json& plan, const std::string& name, int64_t rows, int64_t cols) {
  const Json* own = nullptr;
  for (const auto& [layer, settings] : plan.at("layers").object()) {
    if (layer == name) own = &settings;
  }
  if (own == nullptr || own->is_null()) fail(name + " is not quantized; this program runs models whose layers all are");
  const auto setting = [&](const char* key) -> const Json& {
    const Json* found = own->find(key);
    return found != nullptr ? *found : plan.at("defaults").at(key);
  };
  const std::string scheme = setting("scheme").string(), rotation = setting("rotation").string();
  if (scheme != "group" && scheme != "channel") fail(name + ": scheme " + scheme + " is not known");
  if (rotation != "none" && rotation != "hadamard128") fail(name + ": rotation " + rotation + " is not known");
  Linears::Part part;
  part.desc.n = rows;
  part.desc.k = cols;
  part.desc.weight_bits = static_cast<int32_t>(setting("weight_bits").integer());
  part.desc.scheme = scheme == "group" ? FLEXQ_SCHEME_GROUP : FLEXQ_SCHEME_CHANNEL;
  part.desc.rotation = rotation == "none" ? FLEXQ_ROTATION_NONE : FLEXQ_ROTATION_HADAMARD128;
  part.act_bits = static_cast<int32_t>(setting("act_bits").integer());
  return part;
}

struct Canonical {
  std::vector<std::byte> planes, scales;

  void append(const Checkpoint& checkpoint, const std::string& name, const flexq_weight_desc& desc) {
    const int64_t groups = (desc.k + FLEXQ_GROUP_SIZE - 1) / FLEXQ_GROUP_SIZE;
    const int64_t row_scales = desc.scheme == FLEXQ_SCHEME_GROUP ? groups : 1;
    const Tensor& of_planes = checkpoint.at(name + ".qweight", {desc.n, groups, desc.weight_bits, 16});
    const Tensor& of_scales = checkpoint.at(name + ".scales", {desc.n, row_scales});
    planes.insert(planes.end(), of_planes.data, of_planes.data + of_planes.bytes);
    scales.insert(scales.end(), of_scales.data, of_scales.data + of_scales.bytes);
  }
};

// The token embedding, which may be quantized: this program then looks its rows up in floating point all the same.
Matrix embedding(Device& device, const Checkpoint& checkpoint, const Json& plan, const std::string& name, int64_t rows,
                 int64_t cols) {
  if (checkpoint.find(name + ".qweight") == nullptr) return matrix(device, checkpoint, name + ".weight", rows, cols);
  const flexq_weight_desc desc = part_of(plan, name, rows, cols).desc;
  Canonical canonical;
  canonical.append(checkpoint, name, desc);
  const flexq_stream cpu = FLEXQ_STREAM_INIT;
  std::vector<float> values(static_cast<size_t>(rows * cols));
  flexq::check(flexq_dequantize_weight(&cpu, &desc, reinterpret_cast<const uint8_t*>(canonical.planes.data()),
                                       reinterpret_cast<const uint16_t*>(canonical.scales.data()), values.data(),
                                       FLEXQ_F32, cols));
  return {device.allocate(values.size() * sizeof(float), values.data()), "F32", rows, cols};
}

bool alike(const Linears::Part& a, const Linears::Part& b) {
  return a.desc.weight_bits == b.desc.weight_bits && a.desc.scheme == b.desc.scheme &&
         a.desc.rotation == b.desc.rotation && a.act_bits == b.act_bits;
}

flexq_activation_desc activation_of(const Linears::Part& part, int64_t m) {
  flexq_activation_desc desc = FLEXQ_ACTIVATION_DESC_INIT;
  desc.m = m;
  desc.k = part.desc.k;
  desc.act_bits = part.act_bits;
  desc.scheme = part.desc.scheme;
  desc.rotation = part.desc.rotation;
  return desc;
}

}  // namespace

Config::Config(const Json& config)
    : hidden(positive(config, "hidden_size")),
      intermediate(positive(config, "intermediate_size")),
      layers(positive(config, "num_hidden_layers")),
      heads(positive(config, "num_attention_heads")),
      kv_heads(positive(config, "num_key_value_heads", heads)),
      head_dim(positive(config, "head_dim", hidden / heads)),
      vocabulary(positive(config, "vocab_size")),
      positions(positive(config, "max_position_embeddings")),
      norm_eps(static_cast<float>(config.at("rms_norm_eps").number())),
      tied_head(config.find("tie_word_embeddings") != nullptr && config.at("tie_word_embeddings").boolean()) {
  const std::string type = text(config, "model_type", "none");
  if (type != "llama" && type != "qwen2" && type != "mistral") {
    fail("model_type must be llama, qwen2 or mistral, got " + type);
  }
  if (text(config, "hidden_act", "silu") != "silu") fail("hidden_act must be silu");
  const Json* window = config.find("sliding_window");
  const Json* use_window = config.find("use_sliding_window");
  if (window != nullptr && (use_window == nullptr ? type == "mistral" : use_window->boolean())) {
    fail("attention in a sliding window is not done here");
  }
  if (heads % kv_heads != 0 || head_dim % 2 != 0) fail("config.json: heads must be a multiple of key-value heads");

  // Newer configs have an object of rotary parameters, older ones rope_theta beside an object of changes to it.
  const Json* rope = config.find("rope_parameters");
  const Json* scaling = rope != nullptr ? rope : config.find("rope_scaling");
  const std::string rope_type = scaling == nullptr ? "default" : text(*scaling, "rope_type", "default");
  if (rope_type != "default") fail("rotary embeddings must be the default ones, got " + rope_type);
  const Json* theta = rope != nullptr ? rope->find("rope_theta") : config.find("rope_theta");
  const double base = theta == nullptr ? 10000.0 : theta->number();
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(head_dim);
    frequencies.push_back(static_cast<float>(1.0 / std::pow(base, exponent)));
  }
}

Linears::Linears(Device& device, const Checkpoint& checkpoint, const Json& plan, const std::vector<std::string>& names,
                 const std::vector<int64_t>& rows, int64_t cols) {
  std::vector<float> biases;
  bool any_bias = false;
  for (size_t i = 0; i < names.size();) {
    Part part = part_of(plan, names[i], rows[i], cols);
    part.column = rows_;
    part.desc.n = 0;
    Canonical canonical;
    for (; i < names.size() && alike(part, part_of(plan, names[i], rows[i], cols)); ++i) {
      canonical.append(checkpoint, names[i], part_of(plan, names[i], rows[i], cols).desc);
      const Tensor* bias = checkpoint.find(names[i] + ".bias");
      any_bias |= bias != nullptr;
      const auto values = bias == nullptr ? std::vector<float>(static_cast<size_t>(rows[i]))
                                          : checkpoint.at(names[i] + ".bias", {rows[i]}).to_float();
      biases.insert(biases.end(), values.begin(), values.end());
      part.desc.n += rows[i];
    }
    flexq::check(flexq_prepack_size(device.stream(), &part.desc, &part.bytes));
    part.packed = device.allocate(part.bytes);
    const auto& [planes, scales] = canonical;
    const auto* on_planes = static_cast<const uint8_t*>(device.allocate(planes.size(), planes.data()));
    const auto* on_scales = static_cast<const uint16_t*>(device.allocate(scales.size(), scales.data()));
    flexq::check(flexq_prepack(device.stream(), &part.desc, on_planes, on_scales, part.packed, part.bytes));
    device.release_last();
    device.release_last();
    rows_ += part.desc.n;
    parts_.push_back(part);
  }
  if (any_bias) bias_ = static_cast<float*>(device.allocate(biases.size() * sizeof(float), biases.data()));
}

Model::Model(Device& device, const Checkpoint& checkpoint, int64_t positions, int64_t tokens_at_once)
    : device_(device), config_(checkpoint.config()), positions_(positions), tokens_at_once_(tokens_at_once) {
  const Config& c = config_;
  const Json* quantization = checkpoint.config().find("quantization_config");
  if (quantization == nullptr || text(*quantization, "quant_method", "none") != "flexq") {
    fail("this is no FlexQ checkpoint; `flexq quantize MODEL -o DIR` makes one");
  }
  const int64_t version = quantization->at("format_version").integer();
  if (version != 1 && version != 2) fail("format_version must be 1 or 2, got " + std::to_string(version));
  if (positions > c.positions) fail("the model has " + std::to_string(c.positions) + " positions, too few");
  const Json& plan = quantization->at("plan");
  device.prepare(c, positions);

  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  embeddings_ = embedding(device, checkpoint, plan, "model.embed_tokens", c.vocabulary, c.hidden);
  final_norm_ = upload(device, checkpoint.at("model.norm.weight", {c.hidden}));
  if (checkpoint.find("lm_head.qweight") != nullptr) {
    packed_head_ = std::make_unique<Linears>(device, checkpoint, plan, std::vector<std::string>{"lm_head"},
                                             std::vector<int64_t>{c.vocabulary}, c.hidden);
  } else {
    head_ = c.tied_head ? embeddings_ : matrix(device, checkpoint, "lm_head.weight", c.vocabulary, c.hidden);
  }
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".", attention = layer + "self_attn.";
    const auto linears = [&](std::vector<std::string> names, std::vector<int64_t> rows, int64_t cols) {
      return Linears(device, checkpoint, plan, names, rows, cols);
    };
    layers_.push_back(
        {upload(device, checkpoint.at(layer + "input_layernorm.weight", {c.hidden})),
         upload(device, checkpoint.at(layer + "post_attention_layernorm.weight", {c.hidden})),
         linears({attention + "q_proj", attention + "k_proj", attention + "v_proj"}, {q, kv, kv}, c.hidden),
         linears({attention + "o_proj"}, {c.hidden}, q),
         linears({layer + "mlp.gate_proj", layer + "mlp.up_proj"}, {c.intermediate, c.intermediate}, c.hidden),
         linears({layer + "mlp.down_proj"}, {c.hidden}, c.intermediate),
         {}});
    const size_t cached = static_cast<size_t>(device.cache_floats(c, positions)) * sizeof(float);
    layers_.back().cache = {static_cast<float*>(device.allocate(cached)), static_cast<float*>(device.allocate(cached))};
  }

  const auto floats = [&](int64_t count) {
    return static_cast<float*>(device.allocate(static_cast<size_t>(count) * sizeof(float)));
  };
  x_ = floats(tokens_at_once * c.hidden);
  delta_ = floats(tokens_at_once * c.hidden);
  qkv_ = floats(tokens_at_once * (q + 2 * kv));
  attended_ = floats(tokens_at_once * q);
  gate_up_ = floats(tokens_at_once * 2 * c.intermediate);
  logits_ = floats(c.vocabulary);
  std::vector<Linears::Part> seen;
  const auto room_for = [&](const Linears& weights, int64_t tokens) {
    for (const Linears::Part& part : weights.parts()) {
      const auto same = [&](const Linears::Part& other) {
        return alike(part, other) && part.desc.n == other.desc.n && part.desc.k == other.desc.k;
      };
      if (std::any_of(seen.begin(), seen.end(), same)) continue;
      seen.push_back(part);
      const flexq_activation_desc act = activation_of(part, tokens);
      size_t quantized = 0, workspace = 0;
      flexq::check(flexq_activation_size(device.stream(), &act, &quantized));
      quantized_bytes_ = std::max(quantized_bytes_, quantized);
      for (int64_t m = 1; m <= tokens; ++m) {  // fewer tokens can take more
        flexq::check(flexq_gemm_workspace_size(device.stream(), &part.desc, part.act_bits, m, &workspace));
        workspace_bytes_ = std::max(workspace_bytes_, workspace);
      }
    }
  };
  for (const Layer& layer : layers_) {
    for (const Linears* l : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down}) room_for(*l, tokens_at_once);
  }
  if (packed_head_) room_for(*packed_head_, 1);
  quantized_ = device.allocate(quantized_bytes_);
  workspace_ = device.allocate(workspace_bytes_);
}

// y = (input quantized by `quantize`) * weights^T + bias. The input is quantized once for parts that agree on how.
template <typename Quantize>
void Model::linears(const Linears& weights, int64_t m, float* y, const Quantize& quantize) {
  const Linears::Part* before = nullptr;
  for (const Linears::Part& part : weights.parts()) {
    const flexq_activation_desc act = activation_of(part, m);
    if (before == nullptr || !alike(*before, part)) quantize(act, before == nullptr);
    flexq::check(flexq_gemm(device_.stream(), &part.desc, part.packed, part.bytes, &act, quantized_, quantized_bytes_,
                            weights.bias() == nullptr ? nullptr : weights.bias() + part.column, FLEXQ_F32,
                            y + part.column, FLEXQ_F32, weights.rows(), workspace_, workspace_bytes_));
    before = &part;
  }
}

// x becomes the residual stream before the last MLP's output, which is left in delta.
void Model::read(const int32_t* tokens, int64_t m) {
  const flexq_stream* stream = device_.stream();
  const int64_t h = config_.hidden, i = config_.intermediate, q = config_.heads * config_.head_dim;
  device_.embed(embeddings_, tokens, m, x_);
  const float* delta = nullptr;
  const auto norm = [&](const float* weight) {
    return [this, stream, h, weight, residual = delta](const flexq_activation_desc& act, bool first) {
      const float* added = first ? residual : nullptr;  // x has it already the second time
      flexq::check(flexq_rms_norm_quantize(stream, &act, x_, h, added, h, weight, config_.norm_eps, FLEXQ_F32, x_, h,
                                           quantized_, quantized_bytes_));
    };
  };
  for (const Layer& layer : layers_) {
    linears(layer.qkv, m, qkv_, norm(layer.input_norm));
    device_.attend(layer.cache, qkv_, m, position_, attended_);
    linears(layer.out, m, delta_, [&](const flexq_activation_desc& act, bool) {
      flexq::check(flexq_quantize_activation(stream, &act, attended_, FLEXQ_F32, q, quantized_, quantized_bytes_));
    });
    delta = delta_;
    linears(layer.gate_up, m, gate_up_, norm(layer.post_norm));
    linears(layer.down, m, delta_, [&](const flexq_activation_desc& act, bool) {
      flexq::check(flexq_silu_mul_quantize(stream, &act, gate_up_, 2 * i, gate_up_ + i, 2 * i, FLEXQ_F32, quantized_,
                                           quantized_bytes_));
    });
  }
  position_ += m;
}

// The likeliest token after the last of the m that were read.
int32_t Model::next_token(int64_t m) {
  const int64_t h = config_.hidden;
  float *x = x_ + (m - 1) * h, *delta = delta_ + (m - 1) * h;
  if (packed_head_) {
    linears(*packed_head_, 1, logits_, [&](const flexq_activation_desc& act, bool) {
      flexq::check(flexq_rms_norm_quantize(device_.stream(), &act, x, h, delta, h, final_norm_, config_.norm_eps,
                                           FLEXQ_F32, nullptr, 0, quantized_, quantized_bytes_));
    });
  } else {
    device_.norm(x, delta, final_norm_, config_.norm_eps, x);
    device_.head(head_, x, logits_);
  }
  return device_.argmax(logits_, config_.vocabulary);
}

int32_t Model::forward(const std::vector<int32_t>& tokens) {
  const auto count = static_cast<int64_t>(tokens.size());
  if (count < 1) fail("there must be a token to begin with");
  if (position_ + count > positions_) fail("no room for more than " + std::to_string(positions_) + " tokens");
  for (const int32_t token : tokens) {
    if (token < 0 || token >= config_.vocabulary) {
      fail("token ids are 0 to " + std::to_string(config_.vocabulary - 1) + ", got " + std::to_string(token));
    }
  }
  int64_t m = 0;
  for (int64_t begin = 0; begin < count; begin += m) {
    m = std::min(tokens_at_once_, count - begin);
    read(tokens.data() + begin, m);
  }
  return next_token(m);
}
