// The library's own implementation of flexq_executor.
#pragma once

#include <sys/types.h>

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
  void stop();

  flexq_executor executor_{};
  pid_t process_;      // that has the threads
  std::mutex caller_;  // held by the call that uses the workers

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  uint64_t round_ = 0;
  size_t running_ = 0;
  bool stopping_ = false;

  flexq_task task_ = nullptr;
  void* arg_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> announced_{0};  // round_, for workers that still spin

  std::vector<std::thread> workers_;
};
