// One pool used from several threads at once, several pools, and errors kept apart by thread.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "check.h"

namespace {

void test_every_task_once() {
  const flexq::ThreadPool pool(4);
  for (int64_t count : {0, 1, 2, 3, 1000}) {
    for (int round = 0; round < 50; ++round) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
      const auto task = [](void* arg, int64_t i) {
        (*static_cast<std::vector<std::atomic<int>>*>(arg))[static_cast<size_t>(i)].fetch_add(1);
      };
      const flexq_executor* executor = pool.executor();
      executor->parallel_for(executor->context, count, task, &runs);
      for (const auto& r : runs) CHECK(r.load() == 1);
    }
  }
}

// Rounds in quick succession, and after a pause in which workers went to sleep; fewer tasks than workers, and more.
void test_rounds_and_pauses() {
  const flexq::ThreadPool pool(5);
  const flexq_executor* executor = pool.executor();
  for (int round = 0; round < 3000; ++round) {
    const int64_t count = 1 + round % 9;
    std::atomic<int64_t> sum{0};
    const auto task = [](void* arg, int64_t i) { static_cast<std::atomic<int64_t>*>(arg)->fetch_add(i + 1); };
    executor->parallel_for(executor->context, count, task, &sum);
    CHECK(sum.load() == count * (count + 1) / 2);
    if (round % 300 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// The same layer from four threads over one pool gives the same bits as alone.
void test_shared_pool() {
  std::mt19937 rng(5);
  const flexq::WeightDesc desc(160, 640);
  const std::vector<float> w = test::random_values(160 * 640, rng);
  const std::vector<float> x = test::random_values(20 * 640, rng);
  const flexq::Weight weight = flexq::Weight::quantize(flexq::Stream::cpu(), desc, w.data());
  std::vector<float> expected(20 * 160);
  flexq::Linear(flexq::Stream::cpu(), weight)(flexq::Stream::cpu(), x.data(), 20, expected.data());

  const flexq::ThreadPool pool(3);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      const flexq::Stream stream = flexq::Stream::cpu(pool);
      flexq::Linear linear(stream, weight);
      std::vector<float> y(expected.size());
      for (int round = 0; round < 30; ++round) {
        linear(stream, x.data(), 20, y.data());
        if (y != expected) ++wrong;
      }
    });
  }
  for (auto& t : threads) t.join();
  CHECK(wrong.load() == 0);
}

void test_errors_by_thread() {
  size_t a = 0, b = 0;
  CHECK(flexq_weight_size(nullptr, &a, &b) == FLEXQ_INVALID_ARGUMENT);
  std::thread([] { CHECK(std::strcmp(flexq_last_error(), "") == 0); }).join();
  CHECK(std::strstr(flexq_last_error(), "desc must not be null") != nullptr);
  flexq_thread_pool* pool = nullptr;
  CHECK(flexq_thread_pool_create(0, &pool) == FLEXQ_INVALID_ARGUMENT && pool == nullptr);
}

}  // namespace

int main() {
  test_every_task_once();
  test_rounds_and_pauses();
  test_shared_pool();
  test_errors_by_thread();
  return 0;
}
