// Exceptions -> status codes and the thread's last error.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "core/error.h"

namespace flexq::api {

flexq_status remember(flexq_status status, const char* message) noexcept;

// Runs `body`; nothing it throws gets past here.
template <typename Body>
flexq_status guarded(Body&& body) noexcept {
  try {
    body();
    return FLEXQ_OK;
  } catch (const Error& e) {
    return remember(e.status, e.message.c_str());
  } catch (const std::bad_alloc&) {
    return remember(FLEXQ_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return remember(FLEXQ_INTERNAL, e.what());
  } catch (...) {
    return remember(FLEXQ_INTERNAL, "unknown exception");
  }
}

}  // namespace flexq::api
