#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

enum class Outside : int { lower_bound, bounds, slope };

// What becomes of an element outside the open interval (min, max).
struct Rectifier {
  Outside outside;
  double min, max, slope;
};

}  // namespace trady

// `count` elements of `dtype`, and their bits from the start of a byte on; the target may be the source.
TRADY_DECLARE_KERNEL(void, rectify, Dtype dtype, const Rectifier& rectifier, const void* source, void* target,
                     uint8_t* bits, int64_t count)
