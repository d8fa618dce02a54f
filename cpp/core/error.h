// The one exception type inside the library; cpp/api turns it into a status and a message.
#pragma once

#include <sstream>
#include <string>
#include <utility>

#include "flexq/flexq.h"

namespace flexq {

struct Error {
  flexq_status status;
  std::string message;
};

template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
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
