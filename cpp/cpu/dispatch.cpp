#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace flexq::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs_here;
};

const Kernels& choose() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
  const bool avx_vnni = avx2 && __builtin_cpu_supports("avxvnni");
#else
  const bool avx_vnni = false;  // clang learned the name late; its AVX2 path is right everywhere
#endif
  const Candidate candidates[] = {{avx512_vnni_kernels(), avx512},
                                  {avx_vnni_kernels(), avx_vnni},
                                  {avx2_kernels(), avx2},
                                  {portable_kernels(), true}};
#elif defined(__aarch64__)
#if defined(__linux__)
  const bool dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  const bool dot = true;  // every 64-bit Apple machine has it
#endif
  const Candidate candidates[] = {{neon_kernels(), dot}, {portable_kernels(), true}};
#else
  const Candidate candidates[] = {{portable_kernels(), true}};
#endif
  const char* wanted = std::getenv("FLEXQ_CPU_ISA");
  for (const bool any : {false, true}) {
    for (const auto& [kernels, runs_here] : candidates) {
      if (kernels == nullptr || !runs_here) continue;
      if (any || (wanted != nullptr && std::string_view(wanted) == kernels->isa)) return *kernels;
    }
  }
  return *portable_kernels();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace flexq::cpu
