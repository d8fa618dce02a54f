// A pool in a forked child, which has none of its threads: work is done, and destroying it returns.
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "check.h"

namespace {

// Runs `body` in a forked child and says whether it exits by itself within 20 seconds, without an error.
template <typename Body>
bool child_succeeds(const Body& body) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    body();
    _exit(0);
  }
  for (int i = 0; i < 2000; ++i) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    usleep(10'000);
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return false;
}

struct Layer {
  Layer() {
    std::mt19937 rng(7);
    w = test::random_values(160 * 640, rng);
    x = test::random_values(20 * 640, rng);
  }
  std::vector<float> run(const flexq::Stream& stream) const {
    flexq::Linear linear(stream, flexq::Weight::quantize(stream, {160, 640}, w.data()));
    std::vector<float> y(20 * 160);
    linear(stream, x.data(), 20, y.data());
    return y;
  }
  std::vector<float> w, x;
};

void test_idle_pool(const Layer& layer) {
  flexq_thread_pool* pool = nullptr;
  flexq::check(flexq_thread_pool_create(4, &pool));
  const flexq::Stream stream = flexq::Stream::cpu(flexq_thread_pool_executor(pool));
  const std::vector<float> expected = layer.run(stream);
  CHECK(child_succeeds([&] {
    CHECK(layer.run(stream) == expected);
    flexq_thread_pool_destroy(pool);
  }));
  CHECK(child_succeeds([&] { CHECK(child_succeeds([&] { CHECK(layer.run(stream) == expected); })); }));
  CHECK(layer.run(stream) == expected);  // the parent still has its threads
  flexq_thread_pool_destroy(pool);
}

// Its locks may be held by a thread that the child does not have.
void test_busy_pool() {
  flexq_thread_pool* pool = nullptr;
  flexq::check(flexq_thread_pool_create(3, &pool));
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    const flexq_executor* executor = flexq_thread_pool_executor(pool);
    while (!stop) executor->parallel_for(executor->context, 64, [](void*, int64_t) {}, nullptr);
  });
  for (int round = 0; round < 20; ++round) {
    CHECK(child_succeeds([&] {
      const flexq_executor* executor = flexq_thread_pool_executor(pool);
      std::atomic<int> runs{0};
      const auto task = [](void* arg, int64_t) { static_cast<std::atomic<int>*>(arg)->fetch_add(1); };
      executor->parallel_for(executor->context, 100, task, &runs);
      CHECK(runs.load() == 100);
      flexq_thread_pool_destroy(pool);
    }));
  }
  stop = true;
  busy.join();
  flexq_thread_pool_destroy(pool);
}

#if defined(__has_feature)
#define TEST_HAS_FEATURE(x) __has_feature(x)
#else
#define TEST_HAS_FEATURE(x) 0
#endif

// The stacks of 1,024 threads do not fit in the memory that this child may map. Sanitizers map more than any limit.
void test_too_few_threads() {
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && \
    !TEST_HAS_FEATURE(address_sanitizer) && !TEST_HAS_FEATURE(thread_sanitizer)
  CHECK(child_succeeds([] {
    pthread_attr_t stacks;
    CHECK(pthread_attr_init(&stacks) == 0 && pthread_attr_setstacksize(&stacks, 8u << 20) == 0);
    CHECK(pthread_setattr_default_np(&stacks) == 0);
    const rlimit limit{400u << 20, 400u << 20};
    rlimit taken{};
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0 && getrlimit(RLIMIT_AS, &taken) == 0);
    if (taken.rlim_cur != limit.rlim_cur) return;  // qemu's user mode takes no such limit
    flexq_thread_pool* pool = nullptr;
    CHECK(flexq_thread_pool_create(1024, &pool) == FLEXQ_OUT_OF_MEMORY && pool == nullptr);
    CHECK(std::strstr(flexq_last_error(), "num_threads is 1024, and the system started only ") != nullptr);
  }));
#endif
}

}  // namespace

int main() {
  const Layer layer;
  test_too_few_threads();
  test_idle_pool(layer);
  test_busy_pool();
  return 0;
}
