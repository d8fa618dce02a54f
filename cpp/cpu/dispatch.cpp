#include <cstdlib>
#include <string>
#include <string_view>

#include "core/error.h"
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

struct Choice {
  const Kernels* kernels;
  std::string refusal;  // of FLEXQ_CPU_ISA; empty if there is none
};

Choice choose() {
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
  const char* variable = std::getenv("FLEXQ_CPU_ISA");
  const std::string_view wanted = variable == nullptr ? "" : variable;
  const Kernels* best = nullptr;
  std::string names;
  for (const auto& [kernels, runs_here] : candidates) {
    if (kernels == nullptr || !runs_here) continue;
    if (wanted == kernels->isa) return {kernels, {}};
    if (best == nullptr) best = kernels;
    names.append(names.empty() ? "" : ", ").append(kernels->isa);
  }
  if (wanted.empty()) return {best, {}};
  return {best, "FLEXQ_CPU_ISA must be one of those that this machine and build have, " + names + "; got " + variable};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().kernels; }

void require_wanted_isa() {
  if (!choice().refusal.empty()) fail(FLEXQ_UNAVAILABLE, choice().refusal);
}

}  // namespace flexq::cpu
