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
  int64_t selected;       // k
  int64_t out_per_group;  // C' / groups
  int64_t input_stride[4], grad_stride[4];
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const ChannelRun* runs;
  int64_t run_count;
  // How the work is cut. It depends on the shape alone, never on the number of threads, so the sums are the same for
  // any number of them. A tile is a range of output pixels of one image, or all pixels of several images.
  bool outputs_last;  // grad_output has its channels adjacent: lanes are outputs
  int64_t tile_images, tile_pixels, tiles;
  int64_t slices, ranges, range_outputs;
  bool depthwise;  // conv2d_channel_grad_depthwise takes it
  int64_t tasks;
  // Whether the one slice is the result itself, (k, C'/groups, kh, kw), and there is nothing to add up.
  bool whole;
};

// Decides which loop takes the problem, and fills in how the work is cut, from the shape alone. Everything above
// `outputs_last`, and that, must be set.
void plan(Conv2dChannelGrad& problem);

// Row pitch of the packed input, in elements; a constant, so that a tap is an immediate offset of one base pointer.
// 16 more than a multiple of 1024: neighbouring planes fall into different sets of the first-level cache.
constexpr int64_t kPlane = 2064;
constexpr int64_t kMaxPlanes = 48;
// Elements past a tile's last pixel that a vector store of the packing may touch.
constexpr int64_t kSlack = 16;
constexpr int64_t kOutputBlock = 32;
// Outputs of a register block, where lanes are pixels.
constexpr int64_t kMostOutputs = 8;
constexpr int64_t kScratch = (kMaxPlanes + kOutputBlock + kMostOutputs) * kPlane;

}  // namespace trady

// Computes one task's share of `partial`, (slices, k, C'/groups, kh, kw), or (slices, k, kh, kw, C'/groups) where
// outputs_last; float, or double for float64 input. `scratch` holds kScratch of those, 64-byte aligned.
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad, const trady::Conv2dChannelGrad& problem, int64_t task, void* partial,
                     void* scratch)

// Depthwise layers of common shape on CPUs with masked loads: whether that kernel takes the problem, and task
// (slice, channel, output) of it; partial is (slices, k, C'/groups, kh, kw).
TRADY_DECLARE_KERNEL(bool, conv2d_channel_grad_depthwise_fits, const trady::Conv2dChannelGrad& problem)
TRADY_DECLARE_KERNEL(void, conv2d_channel_grad_depthwise, const trady::Conv2dChannelGrad& problem, int64_t task,
                     void* partial)
