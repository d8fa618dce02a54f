// A checkpoint folder as transformers and FlexQ write it: config.json, and safetensors files that are memory-mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "json.h"

// A tensor in a mapped file. Valid as long as its Checkpoint.
struct Tensor {
  std::string dtype;  // as safetensors names it: "U8", "F16", "BF16", "F32", ...
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;
  size_t bytes = 0;

  int64_t elements() const;
  std::vector<float> to_float() const;  // of F32, F16 and BF16
};

class Checkpoint {
 public:
  // Reads config.json and the headers of model.safetensors, or of the files of model.safetensors.index.json.
  // std::runtime_error says what is missing or damaged.
  explicit Checkpoint(const std::string& folder);

  const Json& config() const { return config_; }
  const Tensor* find(const std::string& name) const;
  // Throws if there is no tensor of that name or its shape is another.
  const Tensor& at(const std::string& name, const std::vector<int64_t>& shape) const;

 private:
  class Mapping;
  void open(const std::string& file);

  Json config_;
  std::vector<std::shared_ptr<Mapping>> files_;
  std::map<std::string, Tensor> tensors_;
};
