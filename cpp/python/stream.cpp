// Devices, threads and streams.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <atomic>

#include "conversions.h"

namespace flexq::python {
namespace {

// A forked child inherits the state of OpenMP's threads without the threads, and would wait for them forever.
const pid_t process_with_threads = getpid();

}  // namespace

Executor::Executor(int32_t num_threads, uintptr_t gomp_parallel)
    : gomp_parallel_(reinterpret_cast<GompParallel>(gomp_parallel)) {
  if (gomp_parallel_ == nullptr) {
    flexq_thread_pool* pool = nullptr;
    check(flexq_thread_pool_create(num_threads, &pool));
    pool_.reset(pool);
    executor_ = flexq_thread_pool_executor(pool);
    return;
  }
  own_ = {sizeof own_, this, num_threads, 0, &Executor::parallel_for};
  executor_ = &own_;
}

void Executor::parallel_for(void* context, int64_t count, flexq_task task, void* arg) {
  const auto* self = static_cast<const Executor*>(context);
  struct Team {
    flexq_task task;
    void* arg;
    int64_t count;
    std::atomic<int64_t> next{0};
  } team{task, arg, count};
  const auto member = [](void* data) {
    auto& t = *static_cast<Team*>(data);
    for (int64_t i = t.next.fetch_add(1); i < t.count; i = t.next.fetch_add(1)) t.task(t.arg, i);
  };
  if (getpid() != process_with_threads) return member(&team);
  self->gomp_parallel_(member, &team, static_cast<unsigned>(self->own_.num_threads), 0);
}

void bind_stream(nb::module_& m) {
  nb::class_<Executor>(m, "Executor")
      .def(nb::init<int32_t, uintptr_t>(), nb::arg("num_threads"), nb::arg("gomp_parallel") = 0);

  nb::class_<Stream>(m, "Stream")
      .def_static(
          "cpu",
          [](std::shared_ptr<Executor> executor) {
            const flexq_executor* threads = executor ? executor->get() : nullptr;
            return Stream{{sizeof(flexq_stream), FLEXQ_CPU, 0, nullptr, threads, nullptr}, std::move(executor)};
          },
          nb::arg("executor").none())
      .def_static(
          "cuda",
          [](int32_t device_index, uintptr_t handle) {
            return Stream{
                {sizeof(flexq_stream), FLEXQ_CUDA, device_index, reinterpret_cast<void*>(handle), nullptr, nullptr},
                nullptr};
          },
          nb::arg("device_index"), nb::arg("handle"))
      .def(
          "with_kernel",
          [](const Stream& self, std::string kernel) {
            Stream stream = self;
            stream.kernel = std::make_shared<const std::string>(std::move(kernel));
            stream.stream.kernel = stream.kernel->c_str();
            return stream;
          },
          nb::arg("kernel"), "The same stream, its GEMMs run by a kernel that `gemm_kernels` names.");

  const auto device_of = [](std::string_view name) { return name == "cuda" ? FLEXQ_CUDA : FLEXQ_CPU; };
  m.def(
      "check_device",
      [=](std::string_view device, int32_t index) { check(flexq_device_available(device_of(device), index)); },
      nb::arg("device"), nb::arg("index") = 0, "Raises RuntimeError with the reason if the device cannot be used.");
  m.def(
      "device_isa",
      [=](std::string_view device, int32_t index) {
        const char* isa = nullptr;
        check(flexq_device_isa(device_of(device), index, &isa));
        return isa;
      },
      nb::arg("device"), nb::arg("index") = 0);
}

}  // namespace flexq::python
