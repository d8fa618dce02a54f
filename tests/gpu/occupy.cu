#include "occupy.h"

#include <cstdio>
#include <cstdlib>

namespace test {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void occupy(volatile int* started) {
  if (threadIdx.x == 0) atomicAdd_system(const_cast<int*>(started), 1);
  while (started[1] == 0) {
  }
}

}  // namespace

Occupied::Occupied(int free_sms) {
  int device = 0, sms = 0, shared = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  void* flags = nullptr;
  check(cudaHostAlloc(&flags, 2 * sizeof(int), cudaHostAllocMapped));
  started_ = static_cast<volatile int*>(flags);
  started_[0] = 0;
  started_[1] = 0;
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  check(cudaFuncSetAttribute(occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const int ctas = sms - free_sms;  // one to an SM, whose shared memory it takes
  occupy<<<static_cast<unsigned>(ctas), 32, static_cast<size_t>(shared), stream_>>>(started_);
  check(cudaGetLastError());
  while (started_[0] < ctas) {
  }
}

Occupied::~Occupied() {
  started_[1] = 1;
  check(cudaStreamSynchronize(stream_));
  check(cudaStreamDestroy(stream_));
  check(cudaFreeHost(const_cast<int*>(started_)));
}

}  // namespace test
