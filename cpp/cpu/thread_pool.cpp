#include "cpu/thread_pool.h"

#include <unistd.h>

#include <new>

flexq_thread_pool::flexq_thread_pool(int32_t num_threads) : process_(getpid()) {
  executor_.struct_size = sizeof executor_;
  executor_.context = this;
  executor_.num_threads = num_threads;
  executor_.parallel_for = [](void* context, int64_t count, flexq_task task, void* arg) {
    static_cast<flexq_thread_pool*>(context)->run(count, task, arg);
  };
  try {
    for (int32_t i = 1; i < num_threads; ++i) workers_.emplace_back([this] { worker(); });
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

bool flexq_thread_pool::forked() const { return getpid() != process_; }

void flexq_thread_pool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    announced_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& thread : workers_) thread.join();
}

void flexq_thread_pool::work() {
  for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) task_(arg_, i);
}

void flexq_thread_pool::run(int64_t count, flexq_task task, void* arg) {
  const auto alone = [&] {
    for (int64_t i = 0; i < count; ++i) task(arg, i);
  };
  if (workers_.empty() || count <= 1 || forked()) return alone();
  const std::unique_lock caller(caller_, std::try_to_lock);
  if (!caller.owns_lock()) return alone();
  {
    const std::lock_guard lock(mutex_);
    task_ = task;
    arg_ = arg;
    count_ = count;
    next_.store(0);
    running_ = workers_.size();
    ++round_;
    announced_.store(round_);
  }
  wake_.notify_all();
  work();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return running_ == 0; });
}

void flexq_thread_pool::worker() {
  uint64_t seen = 0;
  for (;;) {
    // Linears come in quick succession: look around for a few microseconds before going to sleep.
    constexpr int kSpins = 2000;
    for (int i = 0; i < kSpins && announced_.load(std::memory_order_acquire) == seen; ++i) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) return;
      seen = round_;
    }
    work();
    const std::lock_guard lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}
