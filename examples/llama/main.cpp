// Generates greedily from token ids with a Llama-like FlexQ checkpoint.
//
//   llama CHECKPOINT --tokens 504,4120,3112 [--new 64] [--stop 2] [--threads 2] [--cuda]
//   llama CHECKPOINT --bench [--prompt 512] [--new 128] [--repeat 3]
//
// Prints the new token ids, separated by commas; how fast it was goes to stderr.
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "model.h"

namespace {

struct Options {
  std::string checkpoint;
  std::vector<int32_t> tokens;
  int64_t count = 64, prompt = 512, repeat = 3, stop = -1;
  int threads = 0;
  bool bench = false, cuda = false;
};

int64_t number(const std::string& text, int64_t least) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least) {
    throw std::runtime_error("expected a number of " + std::to_string(least) + " or more, got \"" + text + "\"");
  }
  return value;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto next = [&] {
      if (++i == argc) throw std::runtime_error(name + " needs a value");
      return std::string(argv[i]);
    };
    if (name == "--tokens") {
      std::string list = next();
      for (size_t at = 0; at <= list.size();) {
        const size_t comma = std::min(list.find(',', at), list.size());
        o.tokens.push_back(static_cast<int32_t>(std::min<int64_t>(number(list.substr(at, comma - at), 0), INT32_MAX)));
        at = comma + 1;
      }
    } else if (name == "--new") {
      o.count = number(next(), 1);
    } else if (name == "--stop") {
      o.stop = number(next(), 0);
    } else if (name == "--prompt") {
      o.prompt = number(next(), 1);
    } else if (name == "--repeat") {
      o.repeat = number(next(), 1);
    } else if (name == "--threads") {
      o.threads = static_cast<int>(std::min<int64_t>(number(next(), 1), 1024));
    } else if (name == "--bench") {
      o.bench = true;
    } else if (name == "--cuda") {
      o.cuda = true;
    } else if (!name.starts_with("-") && o.checkpoint.empty()) {
      o.checkpoint = name;
    } else {
      throw std::runtime_error("unknown argument " + name);
    }
  }
  if (o.checkpoint.empty() || (o.tokens.empty() && !o.bench)) {
    throw std::runtime_error("usage: llama CHECKPOINT --tokens ID,ID,... [--new N] [--stop ID] [--threads N] [--cuda]");
  }
  if (o.threads == 0) o.threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 1024u));
  return o;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void generate(Model& model, const Options& o) {
  const double begin = seconds();
  std::vector<int32_t> out{model.forward(o.tokens)};
  const double first = seconds();
  while (static_cast<int64_t>(out.size()) < o.count && out.back() != o.stop) out.push_back(model.forward({out.back()}));
  const double end = seconds();
  for (size_t i = 0; i < out.size(); ++i) std::printf("%s%d", i == 0 ? "" : ",", out[i]);
  std::printf("\n");
  std::fprintf(stderr, "prompt of %zu: %.1f tokens/s", o.tokens.size(),
               static_cast<double>(o.tokens.size()) / (first - begin));
  if (out.size() > 1) std::fprintf(stderr, ", then %.1f tokens/s", static_cast<double>(out.size() - 1) / (end - first));
  std::fprintf(stderr, "\n");
}

// Reading a prompt, and generating from nothing, each the best and the median of its repetitions.
void bench(Model& model, const Options& o) {
  const auto report = [&](const char* what, int64_t count, auto work) {
    std::vector<double> rates;
    work();
    for (int64_t i = 0; i < o.repeat; ++i) {
      const double begin = seconds();
      work();
      rates.push_back(static_cast<double>(count) / (seconds() - begin));
    }
    std::sort(rates.begin(), rates.end());
    std::printf("%s of %lld: best %.1f, median %.1f tokens/s\n", what, static_cast<long long>(count), rates.back(),
                rates[rates.size() / 2]);
  };
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < o.prompt; ++i) prompt.push_back(static_cast<int32_t>((i * 7919) % model.config().vocabulary));
  report("prompt", o.prompt, [&] {
    model.forget();
    model.forward(prompt);
  });
  report("generation", o.count, [&] {
    model.forget();
    int32_t token = 1;
    for (int64_t i = 0; i < o.count; ++i) token = model.forward({token});
  });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options o = parse(argc, argv);
    const Checkpoint checkpoint(o.checkpoint);
    const std::unique_ptr<Device> device = o.cuda ? cuda_device(0) : cpu_device(o.threads);
    const auto given = static_cast<int64_t>(o.tokens.size());
    Model model(*device, checkpoint, o.bench ? std::max(o.prompt, o.count) : given + o.count);
    o.bench ? bench(model, o) : generate(model, o);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "llama: %s\n", error.what());
    return 1;
  }
}
