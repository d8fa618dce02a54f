#include "checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

Json read_json(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(path + " cannot be read");
  std::stringstream text;
  text << in.rdbuf();
  try {
    return Json::parse(text.str());
  } catch (const std::runtime_error& error) {
    fail(path + ": " + error.what());
  }
}

size_t element_size(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes{{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"I16", 2}, {"F16", 2},
                                                   {"BF16", 2}, {"I32", 4}, {"F32", 4}, {"I64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) fail("dtype " + dtype + " is not known");
  return found->second;
}

float half_to_float(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return sign * (fraction != 0 ? NAN : INFINITY);
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction | 1024), exponent - 25);
}

}  // namespace

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::vector<float> Tensor::to_float() const {
  std::vector<float> out(static_cast<size_t>(elements()));
  if (dtype == "F32") {
    std::memcpy(out.data(), data, bytes);
  } else if (dtype == "F16" || dtype == "BF16") {
    for (size_t i = 0; i < out.size(); ++i) {
      uint16_t bits;
      std::memcpy(&bits, data + 2 * i, 2);
      out[i] = dtype == "F16" ? half_to_float(bits) : std::bit_cast<float>(uint32_t{bits} << 16);
    }
  } else {
    fail("a tensor of floating point numbers was expected, not of " + dtype);
  }
  return out;
}

// A file in memory, read-only.
class Checkpoint::Mapping {
 public:
  explicit Mapping(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file < 0 || fstat(file, &status) != 0) fail(path + " cannot be opened");
    size_ = static_cast<size_t>(status.st_size);
    void* at = size_ == 0 ? MAP_FAILED : mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    ::close(file);
    if (at == MAP_FAILED) fail(path + " cannot be mapped");
    data_ = static_cast<const std::byte*>(at);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(const_cast<std::byte*>(data_), size_); }

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const std::byte* data_;
  size_t size_;
};

Checkpoint::Checkpoint(const std::string& folder) : config_(read_json(folder + "/config.json")) {
  const std::string index = folder + "/model.safetensors.index.json";
  if (access(index.c_str(), R_OK) != 0) {
    open(folder + "/model.safetensors");
    return;
  }
  std::set<std::string> files;
  const Json listed = read_json(index);
  for (const auto& [name, file] : listed.at("weight_map").object()) files.insert(file.string());
  for (const auto& file : files) {
    if (file.find('/') != std::string::npos) fail(index + " names a file elsewhere: " + file);
    open(folder + "/" + file);
  }
}

// A safetensors file: 8 bytes with the header's length, the header, a JSON object, and the tensors' bytes.
void Checkpoint::open(const std::string& path) {
  const auto& file = *files_.emplace_back(std::make_shared<Mapping>(path));
  uint64_t header = 0;
  if (file.size() >= 8) std::memcpy(&header, file.data(), 8);
  if (file.size() < 8 || header > file.size() - 8) fail(path + " is no safetensors file, or cut off");
  const std::byte* begin = file.data() + 8 + header;
  const auto room = static_cast<int64_t>(file.size() - 8 - header);
  const Json listed = Json::parse({reinterpret_cast<const char*>(file.data() + 8), header});
  for (const auto& [name, entry] : listed.object()) {
    if (name == "__metadata__") continue;
    Tensor tensor;
    tensor.dtype = entry.at("dtype").string();
    for (const Json& size : entry.at("shape").array()) {
      tensor.shape.push_back(size.integer());
      if (tensor.shape.back() < 0 || tensor.shape.back() > room) fail(path + ": " + name + " has an impossible shape");
    }
    const auto& offsets = entry.at("data_offsets").array();
    if (offsets.size() != 2) fail(path + ": " + name + " must have two offsets");
    const int64_t from = offsets[0].integer(), to = offsets[1].integer();
    const auto size = element_size(tensor.dtype);
    // As doubles, which do not overflow.
    double wanted = static_cast<double>(size);
    for (const int64_t s : tensor.shape) wanted *= static_cast<double>(s);
    if (from < 0 || to < from || to > room || static_cast<double>(to - from) != wanted) {
      fail(path + ": " + name + " does not fit its place in the file");
    }
    tensor.data = begin + from;
    tensor.bytes = static_cast<size_t>(to - from);
    if (reinterpret_cast<uintptr_t>(tensor.data) % size != 0) fail(path + ": " + name + " is not aligned");
    tensors_[name] = std::move(tensor);
  }
}

const Tensor* Checkpoint::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const Tensor& Checkpoint::at(const std::string& name, const std::vector<int64_t>& shape) const {
  const Tensor* tensor = find(name);
  if (tensor == nullptr) fail("the checkpoint has no tensor " + name);
  if (tensor->shape == shape) return *tensor;
  const auto text = [](const std::vector<int64_t>& sizes) {
    std::string out;
    for (const int64_t size : sizes) out += (out.empty() ? "" : " x ") + std::to_string(size);
    return out;
  };
  fail(name + " must be " + text(shape) + ", and is " + text(tensor->shape));
}
