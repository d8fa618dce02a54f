// A linear layer with 6-bit weights in C++, through the classes of flexq.hpp.
#include <cmath>
#include <cstdio>
#include <flexq/flexq.hpp>
#include <random>
#include <vector>

int main() {
  const int64_t m = 2, n = 64, k = 512;
  std::vector<float> w(static_cast<size_t>(n * k)), x(static_cast<size_t>(m * k)), y(static_cast<size_t>(m * n));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : w) value = normal(random);
  for (float& value : x) value = normal(random);

  try {
    const flexq::ThreadPool pool(2);
    const flexq::Stream stream = flexq::Stream::cpu(pool);
    const flexq::Weight weight = flexq::Weight::quantize(stream, {n, k}, w.data());  // planes and scales
    flexq::Linear linear(stream, weight, /*act_bits=*/8);                            // prepacked
    linear(stream, x.data(), m, y.data());
  } catch (const flexq::Exception& error) {
    std::fprintf(stderr, "flexq: %s\n", error.what());
    return 1;
  }

  double error = 0, norm = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double exact = 0;
      for (int64_t l = 0; l < k; ++l) {
        exact += double{x[static_cast<size_t>(i * k + l)]} * double{w[static_cast<size_t>(j * k + l)]};
      }
      const double difference = y[static_cast<size_t>(i * n + j)] - exact;
      error += difference * difference;
      norm += exact * exact;
    }
  }
  std::printf("relative error %.4f\n", std::sqrt(error / norm));
  return error < 0.01 * norm ? 0 : 1;
}
