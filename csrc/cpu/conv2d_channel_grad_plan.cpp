// conv2d_channel_grad: which loop takes a problem and how its work is cut. No torch: tests/cpp drives it too.
#include <algorithm>
#include <utility>

#include "conv2d_channel_grad.h"

namespace trady {
namespace {

constexpr int64_t kTasks = 16;
constexpr int64_t kLeastOutputs[] = {96, 80};  // of a range, by whether the kernel has several taps

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The last `extent` input elements that `count` output elements read start at the first's and end here.
int64_t extent(int64_t count, int64_t stride) { return (count - 1) * stride + 1; }
int64_t reach(const Conv2dChannelGrad& q, int axis) { return (q.kernel[axis] - 1) * q.dilation[axis]; }

// As many parts, or one less: threads take tasks in equal numbers, and mostly there is an even number of threads.
int64_t even(int64_t parts) { return parts > 1 ? parts - parts % 2 : parts; }

void lay_out_sums(Conv2dChannelGrad& q, int64_t channel, int64_t output, int64_t row, int64_t column) {
  q.sum_stride[0] = channel;
  q.sum_stride[1] = output;
  q.sum_stride[2] = row;
  q.sum_stride[3] = column;
}

// Of a 1x1 kernel whose pixels are those of the input, input and grad_output mean the same.
bool may_exchange(const Conv2dChannelGrad& q) {
  return q.kernel[0] * q.kernel[1] * q.stride[0] * q.stride[1] == 1 && q.padding[0] + q.padding[1] == 0 &&
         q.run_count == 1 && q.runs[0].group == 0 && !q.with_bias;
}
// Exchanges them; the strides are of the result's channels and outputs as they were before.
void exchange(Conv2dChannelGrad& q, int64_t channel_stride, int64_t output_stride) {
  std::swap(q.input, q.grad_output);
  std::swap(q.input_stride, q.grad_stride);
  std::swap(q.selected, q.out_per_group);
  lay_out_sums(q, channel_stride, output_stride, 1, 1);
}

// Cuts into slices of tiles where each result has many pixels, and into ranges of outputs, of which every one packs the
// input again, of no fewer than `least_outputs`, or where there is one slice, a `few`th of them; a small map into no
// more than `few` slices.
void cut_tasks(Conv2dChannelGrad& q, int64_t least_outputs, int64_t few = 1) {
  constexpr int64_t kTaskCost = 200000, kPartialElements = 1 << 20, kSlicePixels = 512, kFewPixels = 192;
  const int64_t pixels = q.batch * q.out_height * q.out_width, taps = q.kernel[0] * q.kernel[1];
  const int64_t cost = pixels * q.out_per_group * (q.selected * taps / q.run_count + 4) / 4;
  const int64_t tasks = std::clamp<int64_t>(cost / kTaskCost, 1, std::max<int64_t>(1, kTasks / q.run_count));
  const int64_t elements = q.selected * q.out_per_group * taps;
  const int64_t most =
      std::min(kPartialElements / elements, std::max(pixels / kSlicePixels, std::min(few, pixels / kFewPixels)));
  q.slices = even(std::clamp<int64_t>(std::min(tasks, most), 1, q.tiles));
  q.ranges = std::clamp<int64_t>(tasks / q.slices, 1,
                                 std::max<int64_t>(1, q.out_per_group * (q.slices == 1 ? few : 1) / least_outputs));
  if (q.slices * q.run_count % 2) q.ranges = even(q.ranges);
  q.range_outputs = ceil_div(ceil_div(q.out_per_group, q.ranges), 16) * 16;
  q.ranges = ceil_div(q.out_per_group, q.range_outputs);
  q.tasks = q.run_count * q.slices * q.ranges;
  q.scratch = kScratch;
}

int64_t padded_lanes(int64_t lanes) { return ceil_div(lanes, 16) * 16; }

// Output pixels of a tile where lanes are channels: few enough that two or three vectors of lanes stay in the first two
// levels of the caches, but no fewer than repay packing the rows of the input that tiles share. Less than 1 where there
// is no room.
int64_t tile_of_many_channels(const Conv2dChannelGrad& q) {
  const int64_t lanes = padded_lanes(q.selected / q.run_count * q.kernel[1]);
  const int64_t slots = q.kernel[0] == 1 ? 1 : q.stride[0];
  const int64_t shared = (q.kernel[0] - 1) * q.dilation[0] / q.stride[0] * q.out_width;
  const int64_t room = std::min(kTurnedPlanes / std::min<int64_t>(lanes, 48) / slots, kPlane) - kSlack;
  const int64_t pixels = q.out_height * q.out_width;
  const int64_t wanted = std::max<int64_t>(256, 2 * shared);
  // A whole image, where it is not much more; of several, each has its own shared rows.
  const int64_t target = pixels <= 2 * wanted ? std::max(pixels, wanted) : wanted;
  const int64_t images = std::max<int64_t>(1, target / pixels);
  return std::min(target, room - images * shared);
}

// A tile is a range of output pixels of one image, a multiple of `unit`, or all pixels of several images: at most
// `target`, and as many as the planes allow.
void cut_pixels(Conv2dChannelGrad& q, int64_t target, int64_t plane, int64_t unit) {
  const int64_t room = plane - kSlack;
  const int64_t pixels = q.out_height * q.out_width;
  const int64_t reach = (q.kernel[0] - 1) * q.dilation[0] / q.stride[0] * q.out_width;
  if (pixels <= target && pixels + reach <= room) {
    const int64_t images = std::clamp<int64_t>(std::min(target / pixels, room / (pixels + reach)), 1, q.batch);
    q.tile_images = ceil_div(q.batch, ceil_div(q.batch, images));
    q.tile_pixels = pixels;
  } else {
    const int64_t most = std::min(target, reach + room / 4 <= room ? room - reach : room) / unit * unit;
    q.tile_images = 1;
    q.tile_pixels = ceil_div(ceil_div(pixels, ceil_div(pixels, most)), unit) * unit;
  }
  q.tiles = ceil_div(q.batch, q.tile_images) * ceil_div(pixels, q.tile_pixels);
}

// Every tile ends in a reduction of its register blocks: it is as long as the planes allow, or as lets those of a
// block, which every block of outputs reads, stay in the first cache: eight channels of a point, a row of a large
// kernel.
Conv2dChannelGradLoop plan_pixels(Conv2dChannelGrad& q) {
  cut_pixels(q, q.kernel[0] * q.kernel[1] == 1 ? 800 : q.kernel[0] > kRowsTogether ? 1120 : kPlane, kPlane, 16);
  cut_tasks(q, kLeastOutputs[q.kernel[0] * q.kernel[1] > 1]);
  return TRADY_KERNEL(conv2d_channel_grad);
}

// Whether a tile's planes, turned over, have room, and grad_output is read as it lies.
bool turns_planes_over(const Conv2dChannelGrad& q) {
  return (q.dtype == Dtype::float32 || q.dtype == Dtype::float64) && q.grad_stride[3] == 1 &&
         q.grad_stride[2] == q.out_width && q.kernel[1] <= 16 && q.stride[0] <= 4 && tile_of_many_channels(q) >= 64;
}
// Whether lanes of channels fill vectors.
bool many_channels_pays(const Conv2dChannelGrad& q) {
  const int64_t lanes = q.selected / q.run_count * q.kernel[1], padded = padded_lanes(lanes);
  const bool point = q.kernel[0] * q.kernel[1] == 1;
  // Chosen on a Xeon with AMX at batch 8 by trial runs that are not kept. Lanes of pixels suffer most on small maps,
  // whose planes begin anywhere in a cache line.
  const bool small = q.out_height * q.out_width < 256;
  const int64_t least_percent = !point ? 90 : small ? 60 : 75;
  return 100 * lanes >= least_percent * padded && (lanes > 16 || (small && point) || lanes == 16) &&
         turns_planes_over(q);
}

// Cycles of a pixel where lanes are channels: two vectors multiplied, and half an element turned over.
int64_t cost_of_lanes(int64_t lanes, int64_t outputs) { return padded_lanes(lanes) * outputs + 16 * lanes; }

Conv2dChannelGradLoop plan_many_channels(Conv2dChannelGrad& q) {
  // Lanes of the smaller of the two, or of those that fill vectors.
  if (may_exchange(q) && q.input_stride[3] == 1 && q.input_stride[2] == q.width &&
      cost_of_lanes(q.out_per_group, q.selected) < cost_of_lanes(q.selected, q.out_per_group))
    exchange(q, q.out_per_group, 1);
  else
    lay_out_sums(q, q.kernel[1], q.kernel[0] * q.selected * q.kernel[1], q.selected * q.kernel[1], 1);
  cut_pixels(q, tile_of_many_channels(q), kPlane, 16);
  // Of a strided point packing is the most beside the products.
  const bool strided_point = q.kernel[0] * q.kernel[1] == 1 && q.stride[0] * q.stride[1] > 1;
  cut_tasks(q, strided_point ? 1024 : 256, 2);
  q.scratch = kScratch + kTurnedPlanes;
  return TRADY_KERNEL(conv2d_channel_grad_many_channels);
}

// Tiles of `target` output pixels: rows and columns of one image.
void cut_rows(Conv2dChannelGrad& q, int64_t target, int64_t input_target) {
  q.tile_columns = std::clamp<int64_t>(std::min(target, input_target / q.stride[1]), 1, q.out_width);
  const int64_t across = extent(q.tile_columns, q.stride[1]) + reach(q, 1);
  const int64_t fitting = (input_target / across - reach(q, 0) - 1) / q.stride[0] + 1;
  q.tile_rows = std::clamp<int64_t>(std::min(target / q.tile_columns, fitting), 1, q.out_height);
  q.tile_rows = ceil_div(q.out_height, ceil_div(q.out_height, q.tile_rows));
  q.tile_images = 1;
  q.tiles = q.batch * ceil_div(q.out_height, q.tile_rows) * ceil_div(q.out_width, q.tile_columns);
}

Conv2dChannelGradLoop plan_channels_last(Conv2dChannelGrad& q) {
  // Shorter tiles keep grad_output in the caches for the channels after the first.
  const int64_t taps = q.kernel[0] * q.kernel[1], channels = q.selected / q.run_count;
  const int64_t target = taps * channels > 9 || q.grad_stride[1] != 1 ? kTilePixels / 2 : kTilePixels;
  // Whole rows, so that the rows of the input are taken apart once.
  cut_pixels(q, target, kShortPlane, q.out_width <= target / 2 ? q.out_width : 16);
  // Few outputs make few vectors, which may not be full; the selected channels, if they are more, make others.
  if (may_exchange(q) && q.input_stride[1] == 1 && q.grad_stride[1] == 1 && q.out_per_group <= 128 &&
      q.selected > q.out_per_group)
    exchange(q, 1, q.selected);
  else
    lay_out_sums(q, taps * q.out_per_group, 1, q.kernel[1] * q.out_per_group, q.out_per_group);
  q.pairs = pairs_pay();
  cut_tasks(q, kLeastOutputs[q.kernel[0] * q.kernel[1] > 1]);
  q.scratch = kScratch + kTurnedSlack + (kTilePixels + 16) * kTurnedOutputs;
  return TRADY_KERNEL(conv2d_channel_grad_channels_last);
}

Conv2dChannelGradLoop plan_depthwise(Conv2dChannelGrad& q) {
  constexpr int64_t kTaskCost = 50000, kRanges = 32;
  const int64_t pairs = q.selected * q.out_per_group;
  const int64_t cost = q.batch * q.out_height * q.out_width * pairs;
  q.slices = even(std::clamp<int64_t>(std::min(cost / kTaskCost, kTasks / pairs), 1, q.batch));
  q.range_outputs = ceil_div(pairs, kRanges);
  q.ranges = ceil_div(pairs, q.range_outputs);
  q.tasks = q.slices * q.ranges;
  return TRADY_KERNEL(conv2d_channel_grad_depthwise);
}

Conv2dChannelGradLoop plan_depthwise_channels_last(Conv2dChannelGrad& q) {
  constexpr int64_t kTaskCost = 5000;
  // Strips are as large as the caches like them, and have room for all of a task's vectors of pairs.
  const int64_t pairs = q.selected * q.out_per_group;
  q.range_outputs = ceil_div(ceil_div(pairs, ceil_div(pairs, kStripPairs)), 16) * 16;
  q.ranges = ceil_div(pairs, q.range_outputs);
  const int64_t blocks = q.range_outputs / 16;
  cut_rows(q, std::min<int64_t>(1024, kStripGrad / 16 / blocks), std::min<int64_t>(1024, kStripInput / 16 / blocks));
  const int64_t cost = q.batch * q.out_height * q.out_width * blocks;
  q.slices = even(std::clamp<int64_t>(std::min(cost / kTaskCost, kTasks / q.ranges), 1, q.tiles));
  q.tasks = q.slices * q.ranges;
  q.scratch = kStripInput + kStripGrad + q.kernel[0] * q.kernel[1] * kStripPairs;
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
  lay_out_sums(q, q.out_per_group * q.kernel[0] * q.kernel[1], q.kernel[0] * q.kernel[1], q.kernel[1], 1);
  const bool pixels_adjacent = q.grad_stride[3] == 1 && q.out_height * q.out_width > 1;
  // With fewer outputs a group lanes over outputs would be empty.
  if (q.out_per_group < 4 && !q.with_bias) {
    if (TRADY_KERNEL(conv2d_channel_grad_depthwise_fits)(q)) return plan_depthwise(q);
    if (!pixels_adjacent || q.input_stride[3] != 1) return plan_depthwise_channels_last(q);
  } else if (pixels_adjacent && many_channels_pays(q)) {
    return plan_many_channels(q);
  } else if (tiles_pay(q) && TRADY_KERNEL(conv2d_channel_grad_amx_plan)(q)) {
    return TRADY_KERNEL(conv2d_channel_grad_amx);
  } else if ((q.grad_stride[1] == 1 && !pixels_adjacent) || turning_over_pays(q)) {
    return plan_channels_last(q);
  }
  return plan_pixels(q);
}

}  // namespace trady
