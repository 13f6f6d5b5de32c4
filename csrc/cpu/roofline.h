// What the machine can do, measured: the denominators of the benchmarks.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

// Bytes a second read from, or read and written in, a working set of `bytes` shared out among `threads`.
__attribute__((visibility("default"))) double read_bandwidth(int64_t bytes, int threads);
__attribute__((visibility("default"))) double copy_bandwidth(int64_t bytes, int threads);
// Floating-point operations a second (an FMA is two) in float32 on the current instruction set.
__attribute__((visibility("default"))) double fma_peak(int threads);

}  // namespace trady

// One pass over `count` floats; the sum keeps the compiler from leaving it out.
TRADY_DECLARE_KERNEL(float, read_pass, const float* source, int64_t count)
TRADY_DECLARE_KERNEL(void, copy_pass, const float* source, float* target, int64_t count)
// Returns the operations done, and writes to `sink` what they computed.
TRADY_DECLARE_KERNEL(int64_t, fma_pass, float* sink)
