// y = x * w^T with a 6-bit w, through flexq.hpp.
#include <cmath>
#include <cstdio>
#include <vector>

#include "flexq/flexq.hpp"

int main() {
  const int64_t m = 2, n = 8, k = 256;
  std::vector<float> w(static_cast<size_t>(n * k)), x(static_cast<size_t>(m * k)), y(static_cast<size_t>(m * n));
  for (size_t i = 0; i < w.size(); ++i) w[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i));

  const flexq::ThreadPool pool(2);
  const flexq::Stream stream = flexq::Stream::cpu(pool);
  const flexq::Weight weight = flexq::Weight::quantize(stream, {n, k}, w.data());
  flexq::Linear linear(stream, weight, /*act_bits=*/8);
  linear(stream, x.data(), m, y.data());

  double error = 0, norm = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double expected = 0;
      for (int64_t l = 0; l < k; ++l) {
        expected += double{x[static_cast<size_t>(i * k + l)]} * double{w[static_cast<size_t>(j * k + l)]};
      }
      const double difference = y[static_cast<size_t>(i * n + j)] - expected;
      error += difference * difference;
      norm += expected * expected;
    }
  }
  std::printf("flexq %s: relative error %.4f\n", flexq_version(), std::sqrt(error / norm));
  if (!(error < 0.01 * norm)) return 1;

  int refused = 0;
  const auto refuses = [&](const auto& call) {
    try {
      call();
    } catch (const flexq::Exception& e) {
      std::printf("refused: %s\n", e.what());
      refused += e.status() != FLEXQ_OK;
    }
  };
  refuses([&] { flexq::Linear(stream, weight, /*act_bits=*/7)(stream, x.data(), m, y.data()); });
  refuses([&] { flexq::Linear(flexq::Stream::cuda(0, nullptr), weight); });
  refuses([&] { linear(flexq::Stream::cuda(0, nullptr), x.data(), m, y.data()); });
  flexq::Experts experts(stream, {2, k, k});
  refuses([&] { experts.set(stream, 0, weight, weight); });
  if (refused == 4) return 0;
  return 1;
}
