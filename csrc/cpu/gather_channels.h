#pragma once

#include <stdint.h>

#include "isa.h"

// target[i * count + j] = source[i * step + offsets[j]] for i < rows, j < count, all in elements of `element_size`
// bytes (1, 2, 4, 8 or 16).
TRADY_DECLARE_KERNEL(void, gather_rows, const void* source, int64_t step, void* target, int64_t rows,
                     const int64_t* offsets, int64_t count, int element_size)
