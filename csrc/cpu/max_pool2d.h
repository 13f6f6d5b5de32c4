#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

// (height, width) each. A window is kernel[0] x kernel[1] elements; the offset of one is kernel[1] * row + column.
struct MaxPool2d {
  Dtype dtype;
  int64_t channels, size[2], out_size[2];
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// A tensor (N, C, H, W) and its strides in elements.
struct Images {
  void* data;
  int64_t batch, channel, row, column;
};

}  // namespace trady

// Planes [begin, end) of all images, one behind the other in `output` and `offsets`; input.column is 1. `scratch` has
// as many bytes as max_pool2d_scratch says.
TRADY_DECLARE_KERNEL(int64_t, max_pool2d_scratch, const MaxPool2d& pool)
TRADY_DECLARE_KERNEL(void, max_pool2d_planes, const MaxPool2d& pool, const Images& input, void* output,
                     uint8_t* offsets, int64_t begin, int64_t end, char* scratch)
TRADY_DECLARE_KERNEL(int64_t, max_pool2d_backward_scratch, const MaxPool2d& pool)
TRADY_DECLARE_KERNEL(void, max_pool2d_backward_planes, const MaxPool2d& pool, const Images& grad_output,
                     const uint8_t* offsets, void* grad_input, int64_t begin, int64_t end, char* scratch)
// Rows [begin, end) of all images, channels innermost: of the output, and in the backward of the input.
TRADY_DECLARE_KERNEL(void, max_pool2d_rows, const MaxPool2d& pool, const Images& input, void* output, uint8_t* offsets,
                     int64_t begin, int64_t end)
TRADY_DECLARE_KERNEL(void, max_pool2d_backward_rows, const MaxPool2d& pool, const Images& grad_output,
                     const uint8_t* offsets, void* grad_input, int64_t begin, int64_t end, char* scratch)
// Items [begin, end): planes, or with channels innermost images.
TRADY_DECLARE_KERNEL(void, max_pool2d_backward_scatter, const MaxPool2d& pool, const Images& grad_output,
                     const uint8_t* offsets, void* grad_input, bool channels_last, int64_t begin, int64_t end)
