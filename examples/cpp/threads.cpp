// FlexQ on an engine's own threads: a flexq_executor is one function, parallel_for. Here it hands the pieces of a call
// to std::async; an engine would hand them to its pool. Results are the same bits whatever runs them.
#include <atomic>
#include <cstdio>
#include <flexq/flexq.hpp>
#include <future>
#include <random>
#include <vector>

namespace {

struct Engine {
  int threads;
  std::atomic<int> calls{0};

  // Runs task(arg, 0) ... task(arg, count - 1), each once, and returns when all are done.
  static void parallel_for(void* context, int64_t count, flexq_task task, void* arg) {
    auto& engine = *static_cast<Engine*>(context);
    engine.calls.fetch_add(1);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(arg, i);
    };
    std::vector<std::future<void>> helpers;
    for (int i = 1; i < engine.threads; ++i) helpers.push_back(std::async(std::launch::async, work));
    work();
    for (auto& helper : helpers) helper.wait();
  }
};

}  // namespace

int main() {
  const int64_t m = 16, n = 512, k = 768;
  std::vector<float> w(static_cast<size_t>(n * k)), x(static_cast<size_t>(m * k));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : w) value = normal(random);
  for (float& value : x) value = normal(random);

  Engine engine{2};
  flexq_executor executor = FLEXQ_EXECUTOR_INIT;
  executor.context = &engine;
  executor.num_threads = engine.threads;
  executor.parallel_for = Engine::parallel_for;

  const flexq::Stream ours = flexq::Stream::cpu(&executor), alone = flexq::Stream::cpu();
  const flexq::Weight weight = flexq::Weight::quantize(ours, {n, k}, w.data());
  flexq::Linear linear(ours, weight);
  std::vector<float> y(static_cast<size_t>(m * n)), expected(y.size());
  linear(ours, x.data(), m, y.data());
  linear(alone, x.data(), m, expected.data());
  std::printf("%d parallel loops on threads of our own, results %s\n", engine.calls.load(),
              y == expected ? "as on one thread" : "differ");
  return y == expected && engine.calls.load() > 0 ? 0 : 1;
}
