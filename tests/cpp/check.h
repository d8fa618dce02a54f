// CHECK and a few helpers shared by the C++ tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "flexq/flexq.hpp"

#define CHECK(condition)                                                                                         \
  do {                                                                                                           \
    if (!(condition)) {                                                                                          \
      std::fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, flexq_last_error()); \
      std::exit(1);                                                                                              \
    }                                                                                                            \
  } while (0)

namespace test {

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25));
}

// Normal values with a few outliers, as activations have them.
inline std::vector<float> random_values(size_t count, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(rng) * (rng() % 97 == 0 ? 20.0f : 1.0f);
  return values;
}

// What ctest takes for a test that did not run.
inline constexpr int kSkipped = 77;

// Whether the environment names an instruction set that this machine or build has not.
inline bool isa_is_missing() {
  const char* isa = nullptr;
  const bool missing = flexq_device_isa(FLEXQ_CPU, 0, &isa) == FLEXQ_UNAVAILABLE;
  std::printf("%s%s\n", missing ? "" : "isa ", missing ? flexq_last_error() : isa);
  return missing;
}

}  // namespace test
