#include "isa.h"

#include <atomic>

namespace trady {
namespace {

Isa best_isa() {
  for (int isa = static_cast<int>(Isa::count) - 1; isa > 0; --isa) {
    if (isa_available(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
  }
  return Isa::baseline;
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> current{best_isa()};
  return current;
}

}  // namespace

Isa current_isa() { return state().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { state().store(isa, std::memory_order_relaxed); }

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return true;
#if defined(__x86_64__)
    // __builtin_cpu_supports asks the operating system too (XGETBV), not the CPU alone.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return isa_available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    default:
      return false;
  }
}

const char* isa_name(Isa isa) {
  switch (isa) {
#define TRADY_NAME(name) \
  case Isa::name:        \
    return #name;
    TRADY_FOR_EACH_ISA(TRADY_NAME)
#undef TRADY_NAME
    default:
      return "none";
  }
}

}  // namespace trady
