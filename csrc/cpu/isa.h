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
//
// CMake finds the files by name; nothing else has to be edited.
#pragma once

#if defined(__x86_64__)
#define TRADY_FOR_EACH_ISA(apply) apply(baseline) apply(avx2) apply(avx512)
#else
#define TRADY_FOR_EACH_ISA(apply) apply(baseline)
#endif

namespace trady {

// In order of preference; `baseline` is what every CPU of the architecture has (SSE2, NEON).
enum class Isa : int {
#define TRADY_ENUMERATE(name) name,
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

}  // namespace trady

// Declares `result function(arguments)` in the namespace of every set. Use inside no namespace.
#if defined(__x86_64__)
#define TRADY_DECLARE_KERNEL(result, function, ...) \
  namespace trady::baseline {                       \
  result function(__VA_ARGS__);                     \
  }                                                 \
  namespace trady::avx2 {                           \
  result function(__VA_ARGS__);                     \
  }                                                 \
  namespace trady::avx512 {                         \
  result function(__VA_ARGS__);                     \
  }
#define TRADY_KERNEL(function)                                                 \
  (::trady::current_isa() == ::trady::Isa::avx512 ? &::trady::avx512::function \
   : ::trady::current_isa() == ::trady::Isa::avx2 ? &::trady::avx2::function   \
                                                  : &::trady::baseline::function)
#else
#define TRADY_DECLARE_KERNEL(result, function, ...) \
  namespace trady::baseline {                       \
  result function(__VA_ARGS__);                     \
  }
#define TRADY_KERNEL(function) (&::trady::baseline::function)
#endif
