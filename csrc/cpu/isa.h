// Instruction sets: one source, compiled once for each, chosen at run time.
//
// How to add a CPU operator `example` (schema, fake and Python front are in trady_kernels/ops/example):
//
//   example.h        plain structs for the arguments and one line for each hot function:
//                        TRADY_DECLARE_KERNEL(void, example, const ExampleArguments&)
//   example.isa.cpp  includes example.h and vector.h, nothing of torch, nothing of the C++ library that is more
//                    than a type or a constant. Compiled once per set with -DTRADY_ISA=<set>. Everything but the
//                    entry point sits in an anonymous namespace, so that no object exports a weak symbol:
//                        namespace trady::TRADY_ISA {
//                        namespace { template <class T> void loop(...) {...} }
//                        void example(const ExampleArguments& a) {...}
//                        }
//   example.cpp      checks, allocation, threads (parallel.h), registration:
//                        const auto kernel = TRADY_KERNEL(example);  // the one of the current set
//                        parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { kernel(...); });
//                        STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) { m.impl("example", TORCH_BOX(&example)); }
//   tests/cpp/example.cpp  the hot functions beside plain loops, without torch: for sanitizers and for Arm.
//
// CMake finds the files by name; nothing else has to be edited.
//
// How to add an instruction set: a row in the table of CMakeLists.txt (its compiler options, and where it adds to
// another set the files that it is for) and one in the table of isa.cpp (how a CPU is asked for it); what it can do is
// asked in vector.h by the compiler's own macros.
#pragma once

// TRADY_FOR_EACH_ISA(apply, ...) is apply(baseline, ...) apply(avx2, ...) and so on for the sets that this compiler
// builds, in order of preference. CMakeLists.txt defines it from its table.
#ifndef TRADY_FOR_EACH_ISA
#error "TRADY_FOR_EACH_ISA is defined by CMakeLists.txt: link the target to trady_isas"
#endif

namespace trady {

// `baseline` is what every CPU of the architecture has (SSE2, NEON).
enum class Isa : int {
#define TRADY_ENUMERATE(name, ...) name,
  TRADY_FOR_EACH_ISA(TRADY_ENUMERATE)
#undef TRADY_ENUMERATE
      count
};

// Element types that kernels read; the results are float32, or float64 for float64.
enum class Dtype : int { float32, float64, bfloat16, float16 };

// The set that kernels run on now, and whether this CPU (and its operating system) can run `isa`.
__attribute__((visibility("default"))) Isa current_isa();
__attribute__((visibility("default"))) bool isa_available(Isa isa);
// Only for an available set.
__attribute__((visibility("default"))) void set_isa(Isa isa);
__attribute__((visibility("default"))) const char* isa_name(Isa isa);

// Whether the CPU, where its set multiplies pairs of bfloat16, does so faster than it multiplies floats.
bool pairs_pay();

// The one of the current set out of a function's addresses in every set; where the set has none of its own, that of the
// nearest before it. The baseline has all.
template <class F>
__attribute__((always_inline)) inline F* kernel_of_current_isa(F* const (&&kernels)[static_cast<int>(Isa::count)]) {
  int isa = static_cast<int>(current_isa());
  while (kernels[isa] == nullptr) --isa;
  return kernels[isa];
}

}  // namespace trady

// A set need not define what it would compile to the code of another. Where one is defined it is no weak symbol.
#ifdef TRADY_ISA
#define TRADY_PERHAPS
#else
#define TRADY_PERHAPS __attribute__((weak, visibility("hidden")))
#endif

// Declares `result function(arguments)` in the namespace of every set. Use inside no namespace.
#define TRADY_DECLARE_KERNEL(result, function, ...) \
  TRADY_FOR_EACH_ISA(TRADY_DECLARE_IN_ISA, result, function, __VA_ARGS__)
#define TRADY_DECLARE_IN_ISA(isa, result, function, ...) \
  namespace trady::isa {                                 \
  TRADY_PERHAPS result function(__VA_ARGS__);            \
  }
#define TRADY_KERNEL(function) (::trady::kernel_of_current_isa({TRADY_FOR_EACH_ISA(TRADY_ADDRESS_IN_ISA, function)}))
#define TRADY_ADDRESS_IN_ISA(isa, function) &::trady::isa::function,
