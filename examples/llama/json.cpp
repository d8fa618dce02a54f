#include "json.h"

#include <charconv>
#include <cmath>

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = this->value(0);
    space();
    if (at_ != text_.size()) fail("the end");
    return value;
  }

 private:
  static constexpr int kDepth = 64;

  [[noreturn]] void fail(const char* expected) const {
    throw std::runtime_error("JSON: expected " + std::string(expected) + " at byte " + std::to_string(at_));
  }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool take(std::string_view token) {
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }
  void need(std::string_view token, const char* expected) {
    space();
    if (!take(token)) fail(expected);
  }

  Json value(int depth) {
    if (depth > kDepth) fail("less nesting");
    space();
    Json out;
    if (take("{")) {
      out.kind_ = Json::Kind::kObject;
      list("}", [&] {
        space();
        std::string name = string();
        need(":", "a colon");
        out.members_.emplace_back(std::move(name), value(depth + 1));
      });
    } else if (take("[")) {
      out.kind_ = Json::Kind::kArray;
      list("]", [&] { out.items_.push_back(value(depth + 1)); });
    } else if (at_ < text_.size() && text_[at_] == '"') {
      out.kind_ = Json::Kind::kString;
      out.string_ = string();
    } else if (take("true") || take("false")) {
      out.kind_ = Json::Kind::kBool;
      out.number_ = text_[at_ - 2] == 'u';  // tr-u-e
    } else if (!take("null")) {
      out.kind_ = Json::Kind::kNumber;
      const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), out.number_);
      if (error != std::errc()) fail("a value");
      at_ = static_cast<size_t>(end - text_.data());
    }
    return out;
  }

  template <typename Item>
  void list(std::string_view close, const Item& item) {
    space();
    if (take(close)) return;
    do item();
    while (space(), take(","));
    need(close, "a comma or the end of a list");
  }

  std::string string() {
    if (!take("\"")) fail("a string");
    std::string out;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (c == '\\') {
        if (at_ == text_.size()) fail("an escape");
        c = text_[at_++];
        const size_t simple = std::string_view("bfnrt").find(c);
        if (c == 'u') {
          append_utf8(out);
          continue;
        }
        if (simple != std::string_view::npos) c = "\b\f\n\r\t"[simple];
      }
      out += c;
    }
    if (!take("\"")) fail("the end of a string");
    return out;
  }

  // Names of tensors and models are ASCII; pairs of surrogates are kept as two characters.
  void append_utf8(std::string& out) {
    unsigned code = 0;
    const char* digits = text_.data() + at_;
    if (text_.size() - at_ < 4 || std::from_chars(digits, digits + 4, code, 16).ptr != digits + 4) fail("four digits");
    at_ += 4;
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xc0 | code >> 6);
      out += static_cast<char>(0x80 | (code & 0x3f));
    } else {
      out += static_cast<char>(0xe0 | code >> 12);
      out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
      out += static_cast<char>(0x80 | (code & 0x3f));
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

int64_t Json::integer() const {
  const double value = number();
  if (value != std::floor(value) || std::fabs(value) > 9e15) throw std::runtime_error("JSON: expected an integer");
  return static_cast<int64_t>(value);
}

const Json* Json::find(std::string_view name) const {
  for (const auto& [key, value] : object()) {
    if (key == name) return value.is_null() ? nullptr : &value;
  }
  return nullptr;
}

const Json& Json::at(std::string_view name) const {
  if (const Json* found = find(name)) return *found;
  throw std::runtime_error("JSON: there is no \"" + std::string(name) + "\"");
}
