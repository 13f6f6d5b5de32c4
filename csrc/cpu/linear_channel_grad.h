#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

// grad[c, o] = sum over r of x[r, c] * dy[r, o]; strides in elements, the last dimension of each is adjacent.
struct LinearChannelGrad {
  const void* x;   // (rows, k), of `dtype`
  const void* dy;  // (rows, out_features), of `dtype`
  void* panel;     // x as the loops read it, by pack_features; null: they read x itself
  int64_t rows, k, out_features;
  int64_t x_stride, dy_stride;
  Dtype dtype;
  bool packs;      // many features: dy too is copied, a block at a time, so that every further read is an adjacent one
  int64_t groups;  // of the features, as even as they can be: at most GROUP_FEATURES in each where it packs, else 1
};

// A rectangle of the result, and the rows of its sums. Features come in groups, which share a register block.
struct LinearChannelGradTask {
  int64_t row_begin, row_end;      // row_begin is even
  int64_t group_begin, group_end;  // of a.groups
  int64_t begin, end;              // outputs
  bool add;                        // to what is there; otherwise it is overwritten
};

constexpr int64_t GROUP_FEATURES = 6;
// Rows and outputs of a packed block: 256 KiB of float32, within any second-level cache.
constexpr int64_t BLOCK_ROWS = 512, BLOCK_OUTPUTS = 256;

}  // namespace trady

// Fills a.panel, room for rows * k float32 (float64 for float64), for the rows [begin, end); begin is even.
TRADY_DECLARE_KERNEL(void, pack_features, const trady::LinearChannelGrad& a, int64_t begin, int64_t end)

// grad: (k, out_features). `scratch`: 64-byte aligned, BLOCK_ROWS * BLOCK_OUTPUTS of float32 or float64, where a.packs.
TRADY_DECLARE_KERNEL(void, linear_channel_grad, const trady::LinearChannelGrad& a,
                     const trady::LinearChannelGradTask& task, void* grad, void* scratch)

// total[i] = parts[0][i] + parts[1][i] + ... for i in [begin, end); parts: (count, size), float32 or float64.
TRADY_DECLARE_KERNEL(void, sum_parts, const void* parts, int64_t count, int64_t size, void* total, int64_t begin,
                     int64_t end, bool float64)
