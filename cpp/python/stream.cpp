// Devices, threads and streams.
#include <dlfcn.h>
#include <nanobind/stl/string.h>
#include <unistd.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "conversions.h"

namespace flexq::python {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Of the OpenMP runtime that PyTorch loaded, rather than of another one; null if it uses none of GNU's.
GompParallel find_gomp_parallel() {
#if defined(__linux__)
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const std::string_view name = info->dlpi_name;
        auto& best = *static_cast<std::string*>(found);
        if (name.find("libgomp") == name.npos) return 0;
        if (best.empty() || name.find("torch") != name.npos) best = name;
        return 0;
      },
      &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel gomp_parallel() {
  static const GompParallel function = find_gomp_parallel();
  return function;
}

// A forked child inherits the state of OpenMP's threads without the threads, and would wait for them forever.
const pid_t process_with_threads = getpid();

void parallel_for(void* context, int64_t count, flexq_task task, void* arg) {
  const auto* self = static_cast<const flexq_executor*>(context);
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
  gomp_parallel()(member, &team, static_cast<unsigned>(self->num_threads), 0);
}

const flexq_executor* make_executor(int32_t num_threads) {
  if (gomp_parallel() != nullptr) {
    auto* executor = new flexq_executor{sizeof(flexq_executor), nullptr, num_threads, 0, parallel_for};
    executor->context = executor;
    return executor;
  }
  flexq_thread_pool* pool = nullptr;
  check(flexq_thread_pool_create(num_threads, &pool));
  return flexq_thread_pool_executor(pool);
}

}  // namespace

const flexq_executor* executor_of(int32_t num_threads) {
  constexpr int32_t kMaxThreads = 1024;
  if (num_threads <= 1) return nullptr;
  static std::array<std::atomic<const flexq_executor*>, kMaxThreads + 1> known{};
  num_threads = std::min(num_threads, kMaxThreads);
  std::atomic<const flexq_executor*>& place = known[static_cast<size_t>(num_threads)];
  if (const flexq_executor* executor = place.load(std::memory_order_acquire)) return executor;
  static std::mutex making;
  const std::lock_guard lock(making);
  if (place.load() == nullptr) place.store(make_executor(num_threads), std::memory_order_release);
  return place.load();
}

void bind_stream(nb::module_& m) {
  nb::class_<Stream>(m, "Stream")
      .def_static(
          "cpu",
          [](int32_t num_threads) {
            return Stream{{sizeof(flexq_stream), FLEXQ_CPU, 0, nullptr, executor_of(num_threads), nullptr}};
          },
          nb::arg("num_threads"))
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
