// Devices and threads.
#include <utility>

#include "api/checks.h"
#include "api/status.h"
#include "core/backend.h"
#include "cpu/thread_pool.h"

#if !defined(FLEXQ_HAS_CUDA)
namespace flexq {
const Backend* cuda_backend() { return nullptr; }
}  // namespace flexq
#endif

using flexq::api::guarded;

extern "C" {

flexq_status flexq_device_available(flexq_device device, int32_t device_index) {
  return guarded([&] {
    const flexq_stream stream{sizeof(flexq_stream), device, device_index, nullptr, nullptr, nullptr};
    flexq::api::target_of(&stream);
  });
}

flexq_status flexq_device_isa(flexq_device device, int32_t device_index, const char** isa) {
  return guarded([&] {
    flexq::api::check_result(isa, "isa");
    const flexq_stream stream{sizeof(flexq_stream), device, device_index, nullptr, nullptr, nullptr};
    *isa = flexq::api::target_of(&stream).backend.isa(device_index);
  });
}

flexq_status flexq_thread_pool_create(int32_t num_threads, flexq_thread_pool** pool) {
  return guarded([&] {
    flexq::api::check_result(pool, "pool");
    flexq::require(num_threads >= 1 && num_threads <= 1024, "num_threads must be 1 to 1024, got ", num_threads);
    *pool = new flexq_thread_pool(num_threads);
  });
}

void flexq_thread_pool_destroy(flexq_thread_pool* pool) { flexq_thread_pool::destroy(pool); }

const flexq_executor* flexq_thread_pool_executor(const flexq_thread_pool* pool) {
  return pool == nullptr ? nullptr : pool->executor();
}

}  // extern "C"
