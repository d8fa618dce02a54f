// Keeps all but one SM of a GPU busy, as other processes and kernels may.
#pragma once

#include <cuda_runtime.h>

namespace test {

class Occupied {
 public:
  // Returns once all but `free_sms` SMs are taken.
  explicit Occupied(int free_sms);
  ~Occupied();
  Occupied(const Occupied&) = delete;
  Occupied& operator=(const Occupied&) = delete;

 private:
  cudaStream_t stream_;
  volatile int* started_;  // in host memory: CTAs that have started, and whether they may end
};

}  // namespace test
