// What the tests of the CUDA backend share: arrays on the device, values of the three types.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "../cpp/check.h"

namespace test {

inline void cuda_check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    cuda_check(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)));
    cuda_check(cudaMemset(data_, 0x5a, std::max<size_t>(count, 1) * sizeof(T)));
    cuda_check(cudaDeviceSynchronize());  // the test's stream does not wait for the default one
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    cuda_check(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    cuda_check(cudaDeviceSynchronize());
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() const { return data_; }
  size_t size() const { return count_; }
  std::vector<T> host() const {
    std::vector<T> out(count_);
    cuda_check(cudaDeviceSynchronize());
    cuda_check(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

inline uint16_t to_16(float x, flexq_dtype dtype) {
  if (dtype == FLEXQ_F16) {
    const _Float16 h = static_cast<_Float16>(x);
    return std::bit_cast<uint16_t>(h);
  }
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_16(uint16_t bits, flexq_dtype dtype) {
  if (dtype == FLEXQ_F16) return half_to_float(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline std::vector<uint8_t> as_bytes(const std::vector<float>& values, flexq_dtype dtype) {
  std::vector<uint8_t> bytes(values.size() * (dtype == FLEXQ_F32 ? 4 : 2));
  if (dtype == FLEXQ_F32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t v = to_16(values[i], dtype);
      std::memcpy(bytes.data() + 2 * i, &v, 2);
    }
  }
  return bytes;
}
inline float value_at(const std::vector<uint8_t>& bytes, size_t i, flexq_dtype dtype) {
  if (dtype == FLEXQ_F32) {
    float v;
    std::memcpy(&v, bytes.data() + 4 * i, 4);
    return v;
  }
  uint16_t v;
  std::memcpy(&v, bytes.data() + 2 * i, 2);
  return from_16(v, dtype);
}

class Gpu {
 public:
  explicit Gpu(cudaStream_t handle) : cuda(flexq::Stream::cuda(0, handle)), pool_(8), cpu(flexq::Stream::cpu(pool_)) {}
  flexq::Stream cuda;

 private:
  flexq::ThreadPool pool_;

 public:
  flexq::Stream cpu;
};

}  // namespace test
