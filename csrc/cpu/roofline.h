// What the machine can do, measured: the denominators of the benchmarks.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

constexpr int64_t kProbeStep = 128;  // floats: eight of the widest vectors

// Bytes a second read and written in a working set of `bytes` shared out among `threads`.
__attribute__((visibility("default"))) double copy_bandwidth(int64_t bytes, int threads);
// Floating-point operations a second (an FMA is two) in float32 on the current instruction set.
__attribute__((visibility("default"))) double fma_peak(int threads);

}  // namespace trady

// `passes` over `count` floats, a multiple of kProbeStep.
TRADY_DECLARE_KERNEL(void, copy_passes, const float* source, float* target, int64_t count, int64_t passes)
// Returns the operations done, and writes to `sink` what they computed.
TRADY_DECLARE_KERNEL(int64_t, fma_passes, float* sink, int64_t passes)
