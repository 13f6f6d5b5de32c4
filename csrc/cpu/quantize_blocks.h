#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {
// Elements that share a scale; as BLOCK in trady_kernels/ops/quantize_blocks/reference.py.
constexpr int64_t QUANTIZED_BLOCK = 64;
}  // namespace trady

// codes[i] = round(input[i] / scale), scales[i / 64] = max |input| / 127 of each block, for i < elements.
TRADY_DECLARE_KERNEL(void, quantize_blocks, const void* input, int64_t elements, int8_t* codes, float* scales,
                     Dtype dtype)
// output[i] = codes[i] * scales[i / 64] for i < elements.
TRADY_DECLARE_KERNEL(void, dequantize_blocks, const int8_t* codes, const float* scales, int64_t elements, void* output,
                     Dtype dtype)
