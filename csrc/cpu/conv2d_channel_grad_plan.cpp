// conv2d_channel_grad: which loop takes a problem and how its work is cut. No torch: tests/cpp drives it too.
#include <algorithm>

#include "conv2d_channel_grad.h"

namespace trady {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void cut(Conv2dChannelGrad& q) {
  constexpr int64_t kPixels = kPlane - kSlack;
  const int64_t pixels = q.out_height * q.out_width, taps = q.kernel[0] * q.kernel[1];
  // Where lanes are pixels every tile ends in a reduction of its register blocks, which wants long tiles; where lanes
  // are outputs short ones keep grad_output in the first-level cache.
  const int64_t target = q.outputs_last ? (taps == 1 ? 256 : 128) : taps == 1 ? 2048 : 1024;
  const int64_t reach = (q.kernel[0] - 1) * q.dilation[0] / q.stride[0] * q.out_width;
  if (pixels <= target && pixels + reach <= kPixels) {
    const int64_t images = std::clamp<int64_t>(std::min(kPixels / (pixels + reach), target / pixels), 1, q.batch);
    q.tile_images = ceil_div(q.batch, ceil_div(q.batch, images));
    q.tile_pixels = pixels;
  } else {
    const int64_t most = std::min(target, reach + 512 <= kPixels ? kPixels - reach : kPixels) / 16 * 16;
    q.tile_images = 1;
    q.tile_pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, most)), 16) * 16;
  }
  q.tiles = ceil_div(q.batch, q.tile_images) * ceil_div(pixels, q.tile_pixels);

  constexpr int64_t kTasks = 16, kTaskCost = 200000, kPartialElements = 1 << 20, kRangeOutputs = 256,
                    kSlicePixels = 512;
  const int64_t cost = q.batch * pixels * q.out_per_group * (q.selected * taps / q.run_count + 4) / 4;
  const int64_t tasks = std::clamp<int64_t>(cost / kTaskCost, 1, std::max<int64_t>(1, kTasks / q.run_count));
  const int64_t elements = q.selected * q.out_per_group * taps;
  const int64_t most = std::min(kPartialElements / elements, q.batch * pixels / kSlicePixels);
  q.slices = std::clamp<int64_t>(std::min(tasks, most), 1, q.tiles);
  q.ranges = std::clamp<int64_t>(tasks / q.slices, 1, std::max<int64_t>(1, q.out_per_group / kRangeOutputs));
  q.range_outputs = ceil_div(ceil_div(q.out_per_group, q.ranges), 16) * 16;
  q.ranges = ceil_div(q.out_per_group, q.range_outputs);
  q.tasks = q.run_count * q.slices * q.ranges;
}

void cut_depthwise(Conv2dChannelGrad& q) {
  constexpr int64_t kTasks = 16, kTaskCost = 50000;
  const int64_t planes = q.selected * q.out_per_group;
  const int64_t cost = q.batch * q.out_height * q.out_width * planes;
  q.slices = std::clamp<int64_t>(std::min(cost / kTaskCost, kTasks / planes), 1, q.batch);
  q.tasks = q.slices * planes;
}

}  // namespace

void plan(Conv2dChannelGrad& q) {
  // The stride of a dimension of one element means nothing: give it the one that makes pixels follow each other.
  if (q.out_width == 1) q.grad_stride[3] = q.out_height == 1 ? 1 : q.grad_stride[2];
  if (q.out_height == 1) q.grad_stride[2] = q.out_width * q.grad_stride[3];
  q.depthwise = TRADY_KERNEL(conv2d_channel_grad_depthwise_fits)(q);
  if (q.depthwise)
    cut_depthwise(q);
  else
    cut(q);
  q.whole = q.slices == 1 && !(q.outputs_last && q.kernel[0] * q.kernel[1] > 1);
}

}  // namespace trady
