#pragma once

#include <stdint.h>

#include "isa.h"

// target[i] = bit i ? on * source[i] : selects_zero ? 0 : off * source[i], for `count` elements of `dtype`; the
// target may be the source.
TRADY_DECLARE_KERNEL(void, scale_by_bits, Dtype dtype, double on, double off, bool selects_zero, const void* source,
                     const uint8_t* bits, void* target, int64_t count)
