#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

// grad[c, o] = sum over r of x[r, c] * dy[r, o]; strides in elements, the last dimension of each is adjacent.
struct LinearChannelGrad {
  const void* x;   // (rows, k), float32, or float64 where dy is
  const void* dy;  // (rows, out_features), of `dtype`
  int64_t k, out_features;
  int64_t x_stride, dy_stride;
  Dtype dtype;
};

}  // namespace trady

// Sums the rows [row_begin, row_end) for the outputs [begin, end) into grad: (k, out_features), all of it overwritten
// there.
TRADY_DECLARE_KERNEL(void, linear_channel_grad, const LinearChannelGrad& a, void* grad, int64_t row_begin,
                     int64_t row_end, int64_t begin, int64_t end)

// total[i] = parts[0][i] + parts[1][i] + ... for i in [begin, end); parts: (count, size), float32 or float64.
TRADY_DECLARE_KERNEL(void, sum_parts, const void* parts, int64_t count, int64_t size, void* total, int64_t begin,
                     int64_t end, bool float64)
