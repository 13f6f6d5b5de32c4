// conv2d_channel_grad: what the operator's host code and its hot loops agree on.
#pragma once

#include <cstdint>

#include "isa.h"

namespace trady {

// Consecutive selected channels that read the same group of the layer's outputs.
struct ChannelRun {
  int64_t begin, end;
  int64_t group;
};

// All strides count elements; pairs are (height, width).
struct Conv2dChannelGrad {
  const void* input;        // (N, k, H, W)
  const void* grad_output;  // (N, C', H', W')
  Dtype dtype;
  int64_t batch, height, width, out_height, out_width;
  int64_t selected;  // k
  int64_t groups;
  int64_t out_per_group;  // C' / groups
  int64_t input_stride[4], grad_stride[4];
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const ChannelRun* runs;
  int64_t run_count;
  bool with_bias;  // only with one run, of all channels

  void* bias;  // where (slices, C') sums of grad_output over its pixels go, with_bias; otherwise null

  // How the work is cut, by plan(). It depends on the shape alone, never on the number of threads, so the sums are the
  // same for any number of them. A task is a range of outputs, of depthwise layers of their pairs with channels, and a
  // slice of the tiles or images.
  int64_t tile_images;
  int64_t tile_pixels;              // of the output
  int64_t tile_rows, tile_columns;  // likewise, of a depthwise strip
  int64_t tiles;
  int64_t slices, ranges, range_outputs;
  int64_t range_channels;  // where ranges are of channels: of all but the last
  int64_t tasks;
  int64_t scratch;  // elements of the accumulation type that a task needs
  bool pairs;       // of bfloat16 are multiplied where lanes are outputs and the set can, otherwise floats
  // Where a slice's result for (channel of k, output of C'/groups, kh, kw) lies.
  int64_t sum_stride[4];
};

// Elements of a plane of the packed input, or of a shorter one where lanes are outputs and tiles are shorter. 32 more
// than a multiple of 1024: neighbouring planes fall into different sets of the first-level cache.
constexpr int64_t kPlane = 2080, kShortPlane = 1056;
// Long ones: those of a 7x7 kernel, or of 16 channels of a 3x3 one.
constexpr int64_t kMaxPlanes = 49;
// Elements past a tile's last pixel that a vector store of the packing may touch.
constexpr int64_t kSlack = 32;
constexpr int64_t kRowsTogether = 3;  // kernel rows that a block of outputs is multiplied by while it is in the caches
constexpr int64_t kMostOutputs = 8;   // of a register block
constexpr int64_t kScratch = (kMaxPlanes + 2 * kMostOutputs) * kPlane;
// Where lanes are outputs: channels of a 1x1 kernel that are packed together; outputs that are copied together, the
// most of a register block, for the pixels of a tile; and what turning over writes too much, a vector's worth of
// pixels.
constexpr int64_t kPointChannels = 128, kTurnedOutputs = 8 * 16, kTilePixels = 1024;
constexpr int64_t kTurnedSlack = 16 * kPointChannels;
// Where lanes are channels: elements of a tile's input, turned over.
constexpr int64_t kTurnedPlanes = 1 << 16;
// Depthwise channels_last strips: vectors of at most 16 elements for 8192 pixels of the input and 4096 of the output,
// of all vectors of pairs that a task has.
constexpr int64_t kStripInput = 8192 * 16, kStripGrad = 4096 * 16;
constexpr int64_t kStripPairs = 512;  // that a task has at most, a multiple of all vectors' lengths
constexpr int64_t kFewPairs = 2;      // up to so many, a task's strips are planes

// Computes one task's share of `partial`, float, or double for float64 input. `scratch` is 64-byte aligned.
using Conv2dChannelGradLoop = void (*)(const Conv2dChannelGrad& problem, int64_t task, void* partial, void* scratch);

// Decides which loop takes the problem, and fills in how the work is cut. Everything up to `bias` must be set; that, by
// the time a task runs. Of a 1x1 kernel input and grad_output may come out exchanged, with their strides and numbers of
// channels.
Conv2dChannelGradLoop plan(Conv2dChannelGrad& problem);

}  // namespace trady

TRADY_DECLARE_KERNEL(void, conv2d_channel_grad, const trady::Conv2dChannelGrad& problem, int64_t task, void* partial,
                     void* scratch)
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_channels_last, const trady::Conv2dChannelGrad& problem, int64_t task,
                     void* partial, void* scratch)
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_many_channels, const trady::Conv2dChannelGrad& problem, int64_t task,
                     void* partial, void* scratch)
// Its sums as (k, C'/groups, kh, kw), which are `sizes`, of channels [begin, end).
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_copy_sums, const void* sums, const int64_t (&sizes)[4], int64_t begin,
                     int64_t end, trady::Dtype dtype, void* out)
// Layers with one or two outputs a group, of common shapes, on CPUs with masked loads: whether that loop takes them.
TRADY_DECLARE_KERNEL(bool, conv2d_channel_grad_depthwise_fits, const trady::Conv2dChannelGrad& problem)
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_depthwise, const trady::Conv2dChannelGrad& problem, int64_t task,
                     void* partial, void* scratch)
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_depthwise_channels_last, const trady::Conv2dChannelGrad& problem,
                     int64_t task, void* partial, void* scratch)
// bfloat16 on CPUs with AMX: whether that loop takes the problem; if so the plan is made. (linear_channel_grad too.)
TRADY_DECLARE_KERNEL(bool, conv2d_channel_grad_amx_plan, trady::Conv2dChannelGrad& problem)
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_amx, const trady::Conv2dChannelGrad& problem, int64_t task,
                     void* partial, void* scratch)
