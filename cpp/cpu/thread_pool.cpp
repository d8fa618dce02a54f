#include "cpu/thread_pool.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include <new>
#include <system_error>

#include "core/error.h"

// Changes where fork() is: there a child has none of the threads.
static int64_t process_id() {
#if defined(_WIN32)
  return 0;
#else
  return getpid();
#endif
}

flexq_thread_pool::flexq_thread_pool(int32_t num_threads) : process_(process_id()) {
  executor_.struct_size = sizeof executor_;
  executor_.context = this;
  executor_.num_threads = num_threads;
  executor_.parallel_for = [](void* context, int64_t count, flexq_task task, void* arg) {
    static_cast<flexq_thread_pool*>(context)->run(count, task, arg);
  };
  try {
    for (int32_t i = 1; i < num_threads; ++i) workers_.emplace_back([this] { worker(); });
  } catch (const std::system_error& e) {
    const size_t started = workers_.size();
    stop();
    flexq::fail(FLEXQ_OUT_OF_MEMORY, "num_threads is ", num_threads, ", and the system started only ", started,
                " threads beside this one: ", e.what());
  } catch (...) {
    stop();  // those that did start
    throw;
  }
}

flexq_thread_pool::~flexq_thread_pool() { stop(); }

void flexq_thread_pool::destroy(flexq_thread_pool* pool) {
  if (pool != nullptr && pool->forked()) {
    // No destructors: a std::thread wants to be joined, and a condition variable waits for those asleep on it.
    ::operator delete(pool);
    return;
  }
  delete pool;
}

bool flexq_thread_pool::forked() const { return process_id() != process_; }

void flexq_thread_pool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (auto& thread : workers_) thread.join();
}

void flexq_thread_pool::work() {
  for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) task_(arg_, i);
}

// Linears come in quick succession: look around for some microseconds before going to sleep.
template <typename Done>
static bool spin_until(const Done& done) {
  constexpr int kSpins = 2000;
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return false;
}

void flexq_thread_pool::run(int64_t count, flexq_task task, void* arg) {
  const auto alone = [&] {
    for (int64_t i = 0; i < count; ++i) task(arg, i);
  };
  if (workers_.empty() || count <= 1 || forked()) return alone();
  const std::unique_lock caller(caller_, std::try_to_lock);
  if (!caller.owns_lock()) return alone();
  task_ = task;
  arg_ = arg;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  state_.store(((state_.load(std::memory_order_relaxed) & ~(kRound - 1)) + kRound) | kOpen);
  if (sleepers_.load() > 0) {
    // Whoever counts itself a sleeper holds the mutex until it waits.
    {
      const std::lock_guard lock(mutex_);
    }
    const auto helpers = static_cast<size_t>(count - 1);
    if (helpers >= workers_.size()) {
      wake_.notify_all();
    } else {
      for (size_t i = 0; i < helpers; ++i) wake_.notify_one();
    }
  }
  work();
  state_.fetch_and(~kOpen);
  const auto nobody_inside = [this] { return (state_.load() & kWorkers) == 0; };
  if (spin_until(nobody_inside)) return;
  std::unique_lock lock(mutex_);
  caller_sleeps_.store(true);
  done_.wait(lock, nobody_inside);
  caller_sleeps_.store(false);
}

bool flexq_thread_pool::has_work(uint64_t state, uint64_t seen) const {
  return (state & kOpen) != 0 && state / kRound != seen;
}

void flexq_thread_pool::worker() {
  uint64_t seen = 0;
  for (;;) {
    const auto called = [&] { return stopping_.load() || has_work(state_.load(), seen); };
    if (!spin_until(called)) {
      std::unique_lock lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, called);
      sleepers_.fetch_sub(1);
    }
    if (stopping_.load()) return;
    uint64_t state = state_.load();
    while (has_work(state, seen) && !state_.compare_exchange_weak(state, state + 1)) {
    }
    if (!has_work(state, seen)) continue;  // over before this worker came
    seen = state / kRound;
    work();
    if ((state_.fetch_sub(1) & (kOpen | kWorkers)) == 1 && caller_sleeps_.load()) {  // the last of a closed round
      {
        const std::lock_guard lock(mutex_);
      }
      done_.notify_one();
    }
  }
}
