// The one exception type inside the library; cpp/api turns it into a status and a message.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>
#include <type_traits>

#include "flexq/flexq.h"

namespace flexq {

struct Error {
  flexq_status status;
  std::string message;
};

// Without streams: their facets may come from another C++ runtime in the process, one that does not fit.
template <typename Part>
void append(std::string& out, const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(part));
    out += text;
  } else if constexpr (std::is_same_v<Part, char>) {
    out += part;
  } else if constexpr (std::is_arithmetic_v<Part>) {
    out += std::to_string(part);
  } else if constexpr (std::is_same_v<Part, const void*>) {
    char text[32];
    std::snprintf(text, sizeof text, "%p", part);
    out += text;
  } else {
    out += std::string_view(part);
  }
}

template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

template <typename... Parts>
[[noreturn]] void fail(flexq_status status, const Parts&... parts) {
  throw Error{status, cat(parts...)};
}

template <typename... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) fail(FLEXQ_INVALID_ARGUMENT, parts...);
}

}  // namespace flexq
