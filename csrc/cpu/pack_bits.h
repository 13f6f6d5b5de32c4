#pragma once

#include <stdint.h>

#include "isa.h"

// Bit i of the result is 1 where byte i of the mask is not 0, for `count` bytes.
TRADY_DECLARE_KERNEL(void, pack_bits, const uint8_t* mask, uint8_t* bits, int64_t count)
