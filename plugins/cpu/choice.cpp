// Which kernels run: the best for this processor.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.hpp"

namespace dynexport::cpu {
namespace {

constexpr const char* kVariable = "DYNEXPORT_CPU_KERNELS";

struct Choice {
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
const Kernels& with_bfloat16() {
  static const Kernels made = [] {
    Kernels kernels = kAvx512;
    kernels.name = "avx512-bf16";
    kernels.halves = kAvx512Bfloat16;
    return kernels;
  }();
  return made;
}
#endif

}  // namespace

const Kernels* chosen_kernels() {
  const char* const told = std::getenv(kVariable);
  const bool any = told == nullptr || *told == '\0';
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const Choice choices[] = {{&with_bfloat16(), bfloat16}, {&kAvx512, avx512}, {&kAvx2, avx2}, {&kPortable, true}};
#else
  const Choice choices[] = {{&kPortable, true}};
#endif
  for (const Choice& choice : choices)
    if (choice.runs && (any || std::strcmp(told, choice.kernels->name) == 0)) return choice.kernels;
  return nullptr;
}

}  // namespace dynexport::cpu
