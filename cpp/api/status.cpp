#include "api/status.h"

#include <cstdio>

namespace flexq::api {
namespace {

// A plain array: no constructor to run and no allocation to fail while reporting a failure.
thread_local char last_error[1024] = "";

}  // namespace

flexq_status remember(flexq_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

}  // namespace flexq::api

#define FLEXQ_TEXT_(x) #x
#define FLEXQ_TEXT(x) FLEXQ_TEXT_(x)

extern "C" {

const char* flexq_status_name(flexq_status status) {
  switch (status) {
    case FLEXQ_OK:
      return "ok";
    case FLEXQ_INVALID_ARGUMENT:
      return "invalid argument";
    case FLEXQ_UNSUPPORTED:
      return "unsupported";
    case FLEXQ_BAD_VALUE:
      return "bad value";
    case FLEXQ_UNAVAILABLE:
      return "unavailable";
    case FLEXQ_OUT_OF_MEMORY:
      return "out of memory";
    case FLEXQ_DEVICE_ERROR:
      return "device error";
    case FLEXQ_INTERNAL:
      return "internal error";
    default:
      return "unknown status";
  }
}

const char* flexq_last_error(void) { return flexq::api::last_error; }

const char* flexq_version(void) {
  return FLEXQ_TEXT(FLEXQ_VERSION_MAJOR) "." FLEXQ_TEXT(FLEXQ_VERSION_MINOR) "." FLEXQ_TEXT(FLEXQ_VERSION_PATCH);
}

int32_t flexq_version_number(void) {
  return FLEXQ_VERSION_MAJOR * 10000 + FLEXQ_VERSION_MINOR * 100 + FLEXQ_VERSION_PATCH;
}

}  // extern "C"
