// The library's own implementation of flexq_executor.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "flexq/flexq.h"

struct flexq_thread_pool {
 public:
  explicit flexq_thread_pool(int32_t num_threads);
  ~flexq_thread_pool();
  // Instead of `delete`: in a forked child there are no threads to join.
  static void destroy(flexq_thread_pool* pool);
  flexq_thread_pool(const flexq_thread_pool&) = delete;
  flexq_thread_pool& operator=(const flexq_thread_pool&) = delete;

  const flexq_executor* executor() const { return &executor_; }

 private:
  bool forked() const;
  void run(int64_t count, flexq_task task, void* arg);
  void work();
  void worker();
  bool has_work(uint64_t state, uint64_t seen) const;
  void stop();

  flexq_executor executor_{};
  int64_t process_;    // that has the threads
  std::mutex caller_;  // held by the call that uses the workers

  // Of the current round; written while it is closed and no worker is in it.
  flexq_task task_ = nullptr;
  void* arg_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};

  // The round's number, whether it is open, and how many workers are in it. A caller waits for those that joined, so
  // one that is asleep, or that the system does not let run, holds up nobody.
  static constexpr uint64_t kWorkers = 0xffff, kOpen = 0x10000, kRound = 0x20000;
  std::atomic<uint64_t> state_{0};

  // For those that have looked around long enough.
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::atomic<size_t> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};

  std::vector<std::thread> workers_;
};
