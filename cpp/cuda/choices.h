// What was chosen last for a key, as choosing takes long beside a launch. Without a lock: for a thread of its own. Keys
// whose hashes meet take turns.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace flexq::cuda {

template <size_t kParts, typename Value>
class Choices {
 public:
  using Key = std::array<int64_t, kParts>;

  template <typename Choose>
  const Value& get(const Key& key, const Choose& choose) {
    Entry& entry = entries_[hash(key) % entries_.size()];
    if (!entry.value || entry.key != key) {
      entry.value = choose();
      entry.key = key;
    }
    return *entry.value;
  }

 private:
  struct Entry {
    Key key;
    std::optional<Value> value;
  };
  static size_t hash(const Key& key) {
    uint64_t h = 0;
    for (const int64_t part : key) {
      h = (h ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
      h ^= h >> 29;
    }
    return static_cast<size_t>(h >> 32);
  }
  std::array<Entry, 256> entries_{};
};

}  // namespace flexq::cuda
