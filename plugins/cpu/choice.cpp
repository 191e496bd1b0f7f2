// Which kernels run: the best for this processor.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.hpp"

namespace dynexport::cpu {
namespace {

constexpr const char* kVariable = "DYNEXPORT_CPU_KERNELS";

bool runs(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&kernels == &kAvx2) return avx2;
  if (&kernels == &kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return &kernels == &kPortable;
}

}  // namespace

const Kernels* chosen_kernels() {
  const char* told = std::getenv(kVariable);
  const bool any = told == nullptr || *told == '\0';
#if defined(__x86_64__)
  for (const Kernels* kernels : {&kAvx512, &kAvx2, &kPortable})
#else
  for (const Kernels* kernels : {&kPortable})
#endif
    if (runs(*kernels) && (any || std::strcmp(told, kernels->name) == 0)) return kernels;
  return nullptr;
}

}  // namespace dynexport::cpu
