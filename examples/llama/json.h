// A small JSON reader for configs and safetensors headers. Strict enough to refuse what is not JSON; errors say where.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::kNull; }

  // Each throws std::runtime_error where the value is of another kind.
  bool boolean() const { return want(Kind::kBool, "true or false"), number_ != 0; }
  double number() const { return want(Kind::kNumber, "a number"), number_; }
  int64_t integer() const;
  const std::string& string() const { return want(Kind::kString, "a string"), string_; }
  const std::vector<Json>& array() const { return want(Kind::kArray, "an array"), items_; }
  const std::vector<std::pair<std::string, Json>>& object() const { return want(Kind::kObject, "an object"), members_; }

  // A member of an object: null, or an error, if it has none of that name. JSON's null counts as absent.
  const Json* find(std::string_view name) const;
  const Json& at(std::string_view name) const;

 private:
  friend class JsonParser;
  void want(Kind kind, const char* what) const {
    if (kind_ != kind) throw std::runtime_error(std::string("JSON: expected ") + what);
  }

  Kind kind_ = Kind::kNull;
  double number_ = 0;
  std::string string_;
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};
