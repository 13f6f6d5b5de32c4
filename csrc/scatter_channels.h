// Where the rows of a scatter_channels_ go, from the shapes and strides. For the CPU and the CUDA operator.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace trady {

constexpr int MOST_PIXEL_DIMENSIONS = 4;

// rows: (selected, outputs, pixels), weight: (groups * outputs, group_channels, pixels); strides in elements.
struct Scatter {
  int64_t selected, outputs, channels, group_channels, pixels;
  int64_t row_stride, row_output_stride;
  int64_t group_stride, channel_stride, output_stride;
  // The dimensions of the pixels, innermost first, as few as the strides allow; at least one.
  struct Dimension {
    int64_t size, row_stride, stride;
  } pixel[MOST_PIXEL_DIMENSIONS];
  int dimensions;
};

// Raises where the shapes do not fit each other; the indices are left to the kernel.
inline Scatter plan_scatter(const torch::stable::Tensor& weight, const torch::stable::Tensor& channels,
                            const torch::stable::Tensor& rows, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() >= 2, "weight: got ", weight.dim(), " dimensions, expected at least 2");
  STD_TORCH_CHECK(groups >= 1 && weight.size(0) % groups == 0, "groups: got ", groups, " for ", weight.size(0),
                  " outputs");
  STD_TORCH_CHECK(channels.dim() == 1 && channels.scalar_type() == torch::headeronly::ScalarType::Long,
                  "channels: expected a 1-D int64 tensor");
  STD_TORCH_CHECK(rows.dim() == weight.dim() && rows.scalar_type() == weight.scalar_type(),
                  "rows: expected the dimensions and the dtype of weight");
  Scatter plan{};
  plan.selected = channels.size(0);
  plan.outputs = weight.size(0) / groups;
  plan.group_channels = weight.size(1);
  plan.channels = plan.group_channels * groups;
  plan.row_stride = rows.stride(0);
  plan.row_output_stride = rows.stride(1);
  plan.group_stride = plan.outputs * weight.stride(0);
  plan.channel_stride = weight.stride(1);
  plan.output_stride = weight.stride(0);
  bool fits = rows.size(0) == plan.selected && rows.size(1) == plan.outputs;
  plan.pixels = 1;
  plan.dimensions = 1;
  plan.pixel[0] = {1, 1, 1};
  for (int64_t d = weight.dim() - 1; d >= 2; --d) {
    const Scatter::Dimension next{weight.size(d), rows.stride(d), weight.stride(d)};
    fits = fits && rows.size(d) == next.size;
    plan.pixels *= next.size;
    if (next.size == 1) continue;
    auto& last = plan.pixel[plan.dimensions - 1];
    if (last.size == 1) {
      last = next;
    } else if (next.stride == last.size * last.stride && next.row_stride == last.size * last.row_stride) {
      last.size *= next.size;
    } else {
      STD_TORCH_CHECK(plan.dimensions < MOST_PIXEL_DIMENSIONS, "weight: got ", weight.dim(),
                      " dimensions in no regular order, expected at most ", MOST_PIXEL_DIMENSIONS + 2);
      plan.pixel[plan.dimensions++] = next;
    }
  }
  STD_TORCH_CHECK(fits, "rows: expected a row for each channel, shaped as weight");
  return plan;
}

}  // namespace trady
