// conv2d_channel_grad: which loop takes a problem and how its work is cut. No torch: tests/cpp drives it too.
#include <algorithm>

#include "conv2d_channel_grad.h"

namespace trady {
namespace {

constexpr int64_t kTasks = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The last `extent` input elements that `count` output elements read start at the first's and end here.
int64_t extent(int64_t count, int64_t stride) { return (count - 1) * stride + 1; }
int64_t reach(const Conv2dChannelGrad& q, int axis) { return (q.kernel[axis] - 1) * q.dilation[axis]; }

// Cuts into slices of tiles where each result has many pixels, and into ranges of outputs.
void cut_tasks(Conv2dChannelGrad& q) {
  constexpr int64_t kTaskCost = 200000, kPartialElements = 1 << 20, kSlicePixels = 512;
  const int64_t pixels = q.batch * q.out_height * q.out_width, taps = q.kernel[0] * q.kernel[1];
  const int64_t cost = pixels * q.out_per_group * (q.selected * taps / q.run_count + 4) / 4;
  const int64_t tasks = std::clamp<int64_t>(cost / kTaskCost, 1, std::max<int64_t>(1, kTasks / q.run_count));
  // Every range packs the input again.
  const int64_t range_outputs = taps == 1 ? 96 : 80;
  const int64_t elements = q.selected * q.out_per_group * taps;
  const int64_t most = std::min(kPartialElements / elements, pixels / kSlicePixels);
  q.slices = std::clamp<int64_t>(std::min(tasks, most), 1, q.tiles);
  q.ranges = std::clamp<int64_t>(tasks / q.slices, 1, std::max<int64_t>(1, q.out_per_group / range_outputs));
  q.range_outputs = ceil_div(ceil_div(q.out_per_group, q.ranges), 16) * 16;
  q.ranges = ceil_div(q.out_per_group, q.range_outputs);
  q.tasks = q.run_count * q.slices * q.ranges;
  q.scratch = kScratch;
}

// A tile is a range of output pixels of one image, or all pixels of several images. Every tile ends in a reduction of
// its register blocks: it is as long as the planes allow.
Conv2dChannelGradLoop plan_pixels(Conv2dChannelGrad& q) {
  constexpr int64_t kPixels = kPlane - kSlack, kLanes = 16;
  const int64_t pixels = q.out_height * q.out_width;
  const int64_t reach = (q.kernel[0] - 1) * q.dilation[0] / q.stride[0] * q.out_width;
  if (pixels + reach <= kPixels) {
    const int64_t images = std::clamp<int64_t>(kPixels / (pixels + reach), 1, q.batch);
    q.tile_images = ceil_div(q.batch, ceil_div(q.batch, images));
    q.tile_pixels = pixels;
  } else {
    const int64_t most = (reach + 512 <= kPixels ? kPixels - reach : kPixels) / kLanes * kLanes;
    q.tile_images = 1;
    q.tile_pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, most)), kLanes) * kLanes;
  }
  q.tiles = ceil_div(q.batch, q.tile_images) * ceil_div(pixels, q.tile_pixels);
  cut_tasks(q);
  return TRADY_KERNEL(conv2d_channel_grad);
}

// Tiles of `target` output pixels: rows and columns of one image, or several whole images.
void cut_rows(Conv2dChannelGrad& q, int64_t target, int64_t input_target) {
  q.tile_columns = std::clamp<int64_t>(std::min(target, input_target / q.stride[1]), 1, q.out_width);
  const int64_t across = extent(q.tile_columns, q.stride[1]) + reach(q, 1);
  const int64_t fitting = (input_target / across - reach(q, 0) - 1) / q.stride[0] + 1;
  q.tile_rows = std::clamp<int64_t>(std::min(target / q.tile_columns, fitting), 1, q.out_height);
  q.tile_rows = ceil_div(q.out_height, ceil_div(q.out_height, q.tile_rows));
  q.tile_images = 1;
  if (q.tile_columns == q.out_width && q.tile_rows == q.out_height) {
    const int64_t elements = (extent(q.tile_rows, q.stride[0]) + reach(q, 0)) * across;
    q.tile_images =
        std::clamp<int64_t>(std::min(target / (q.out_height * q.out_width), input_target / elements), 1, q.batch);
    q.tile_images = ceil_div(q.batch, ceil_div(q.batch, q.tile_images));
  }
  q.tiles =
      ceil_div(q.batch, q.tile_images) * ceil_div(q.out_height, q.tile_rows) * ceil_div(q.out_width, q.tile_columns);
}

Conv2dChannelGradLoop plan_channels_last(Conv2dChannelGrad& q) {
  // Shorter tiles keep grad_output in the caches for the channels after the first.
  const int64_t taps = q.kernel[0] * q.kernel[1], channels = q.selected / q.run_count;
  const int64_t target = taps * channels > 9 || q.grad_stride[1] != 1 ? kTurnedPixels : 1024;
  cut_rows(q, target, kScratch / 8);
  q.outputs_last = true;
  cut_tasks(q);
  q.scratch = kScratch + kTurnedSlack + (kTurnedPixels + 16) * kTurnedOutputs;
  return TRADY_KERNEL(conv2d_channel_grad_channels_last);
}

Conv2dChannelGradLoop plan_depthwise(Conv2dChannelGrad& q) {
  constexpr int64_t kTaskCost = 50000;
  const int64_t planes = q.selected * q.out_per_group;
  const int64_t cost = q.batch * q.out_height * q.out_width * planes;
  q.slices = std::clamp<int64_t>(std::min(cost / kTaskCost, kTasks / planes), 1, q.batch);
  q.tasks = q.slices * planes;
  return TRADY_KERNEL(conv2d_channel_grad_depthwise);
}

Conv2dChannelGradLoop plan_depthwise_channels_last(Conv2dChannelGrad& q) {
  constexpr int64_t kTaskCost = 5000;
  cut_rows(q, kStripGrad / 16, 1024);
  q.tile_images = 1;
  q.tiles = q.batch * ceil_div(q.out_height, q.tile_rows) * ceil_div(q.out_width, q.tile_columns);
  q.range_outputs = 16;
  q.ranges = ceil_div(q.selected * q.out_per_group, q.range_outputs);
  const int64_t cost = q.batch * q.out_height * q.out_width;
  q.slices = std::clamp<int64_t>(std::min(cost / kTaskCost, kTasks / q.ranges), 1, q.tiles);
  q.tasks = q.slices * q.ranges;
  q.scratch = kStripInput + kStripGrad + q.kernel[0] * q.kernel[1] * 16;
  return TRADY_KERNEL(conv2d_channel_grad_depthwise_channels_last);
}

// Whether so many taps read each element of grad_output that lanes of outputs, which need no reduction and waste no
// lanes on small maps, repay turning it over.
bool turning_over_pays(const Conv2dChannelGrad& q) {
  const int64_t taps = q.kernel[0] * q.kernel[1] * q.selected / q.run_count;
  const int64_t pixels = q.out_height * q.out_width;
  // Chosen on a Zen 4 at batch 8 by trial runs that are not kept: 7x7 maps want it soonest, 28x28 never.
  const int64_t least = pixels < 64 ? 24 : 64;
  return q.out_per_group >= 16 && q.grad_stride[3] == 1 && q.grad_stride[2] == q.out_width && pixels < 256 &&
         taps >= least;
}

// Whether there are enough taps for matrix tiles. With few the tiles are mostly empty, and what counts is how fast
// grad_output is read: the other loops read it as it is.
bool tiles_pay(const Conv2dChannelGrad& q) {
  const int64_t taps = q.kernel[0] * q.kernel[1];
  // Chosen on a Xeon with AMX at batch 8 by trial runs that are not kept.
  const int64_t least = taps > 1 ? 18 : q.grad_stride[3] == 1 ? 5 : 10;
  return q.selected * taps >= least;
}

}  // namespace

Conv2dChannelGradLoop plan(Conv2dChannelGrad& q) {
  // The stride of a dimension of one element means nothing: give it the one that makes pixels follow each other.
  if (q.out_width == 1) q.grad_stride[3] = q.out_height == 1 ? 1 : q.grad_stride[2];
  if (q.out_height == 1) q.grad_stride[2] = q.out_width * q.grad_stride[3];
  q.tile_images = q.tile_pixels = q.tile_rows = q.tile_columns = q.tiles = q.scratch = 0;
  q.ranges = q.slices = 1;
  q.range_outputs = q.out_per_group;
  q.outputs_last = false;
  const bool pixels_adjacent = q.grad_stride[3] == 1 && q.out_height * q.out_width > 1;
  // With fewer outputs a group lanes over outputs would be empty.
  if (q.out_per_group < 4 && !q.with_bias) {
    if (TRADY_KERNEL(conv2d_channel_grad_depthwise_fits)(q)) return plan_depthwise(q);
    if (!pixels_adjacent || q.input_stride[3] != 1) return plan_depthwise_channels_last(q);
  } else if (tiles_pay(q) && TRADY_KERNEL(conv2d_channel_grad_amx_plan)(q)) {
    return TRADY_KERNEL(conv2d_channel_grad_amx);
  } else if ((q.grad_stride[1] == 1 && !pixels_adjacent) || turning_over_pays(q)) {
    return plan_channels_last(q);
  }
  return plan_pixels(q);
}

}  // namespace trady
