#include "isa.h"

#include <atomic>

#if defined(__aarch64__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace trady {
namespace {

// ---- how a CPU, and its operating system, is asked for a set -------------------------------------------------

[[maybe_unused]] bool runs_baseline() { return true; }
#if defined(__x86_64__)
// __builtin_cpu_supports asks the operating system too (XGETBV), not the CPU alone.
[[maybe_unused]] bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Linux saves tile registers only for processes that ask for them, once for all of their threads.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
[[maybe_unused]] bool runs_avx512_amx() {
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return runs_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bfloat16) != 0 &&
         (d & tiles) != 0 && may_use_tiles();
}
#elif defined(__aarch64__)
// Bits of AT_HWCAP and AT_HWCAP2, which older C libraries do not name.
constexpr unsigned long ATOMICS = 1UL << 8, HALF = 1UL << 10, RDM = 1UL << 12, SVE = 1UL << 22, BF16 = 1UL << 14;
[[maybe_unused]] bool has(unsigned long features) { return (getauxval(AT_HWCAP) & features) == features; }
[[maybe_unused]] bool runs_neon_bf16() { return has(ATOMICS | RDM) && (getauxval(AT_HWCAP2) & BF16) != 0; }
// Compiled for vectors of exactly 32 bytes: on any others it would compute something else.
[[maybe_unused]] bool runs_sve256() {
  constexpr int get_vector_length = 51, length = 0xffff;
  return has(ATOMICS | RDM | HALF | SVE) && (prctl(get_vector_length) & length) == 32;
}
#endif

struct Row {
  const char* name;
  bool (*runs)();
};
#define TRADY_ROW(name, ...) {#name, &runs_##name},
constexpr Row ROWS[] = {TRADY_FOR_EACH_ISA(TRADY_ROW)};
#undef TRADY_ROW

Isa best_isa() {
  int isa = static_cast<int>(Isa::count) - 1;
  while (isa > 0 && !ROWS[isa].runs()) --isa;
  return static_cast<Isa>(isa);
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> current{best_isa()};
  return current;
}

}  // namespace

Isa current_isa() { return state().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { state().store(isa, std::memory_order_relaxed); }

bool isa_available(Isa isa) { return ROWS[static_cast<int>(isa)].runs(); }

bool pairs_pay() {
#if defined(__x86_64__)
  // On a Xeon with AMX widening to floats was faster, by trial runs that are not kept; others were not timed.
  static const bool slow = __builtin_cpu_is("intel");
  return !slow;
#else
  return true;
#endif
}

const char* isa_name(Isa isa) { return ROWS[static_cast<int>(isa)].name; }

}  // namespace trady
