// conv2d_channel_grad on a GPU: the problem, and how its work is cut into blocks. No torch, no CUDA: a test drives it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "products.h"

namespace trady::cuda {

// All strides count elements; pairs are (height, width).
struct Conv2dChannelGrad {
  int64_t batch, height, width, out_height, out_width;
  int64_t selected;     // k
  int64_t outputs;      // C' / groups
  int64_t in_channels;  // of the layer
  int64_t in_per_group;
  int64_t input_stride[4], grad_stride[4];
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  TRADY_HOST_DEVICE constexpr int64_t taps() const { return kernel[0] * kernel[1]; }
  TRADY_HOST_DEVICE constexpr int64_t elements() const { return selected * outputs * taps(); }
};

constexpr int GENERAL_THREADS = 128;
// About eight for each multiprocessor of the largest GPUs. Not asked of the GPU: sums are the same bits on all of them.
constexpr int64_t WANTED_BLOCKS = 1024;

// Two of these, with what else a block shares, stay below the 48 KiB that need no opt-in.
constexpr int STAGE_VECTORS = 1024;
// In front of the first plane: a 7x7 kernel's columns begin up to six floats before a row.
constexpr int MARGIN_VECTORS = 2;
// Of the output, that a thread multiplies while they are in registers: maps of 7, 14, 28, 56 and 112 are so many times
// it.
constexpr int ITEM_ROWS = 7;

// Kernels of a size and stride known to the compiler: whether they take the problem, with 32-bit offsets in a plane.
constexpr bool is_usual(const Conv2dChannelGrad& q) {
  const int64_t k = q.kernel[0], s = q.stride[0];
  const auto reach = [](int64_t height, int64_t width, const int64_t (&stride)[4]) {
    return (height - 1) * stride[2] + (width - 1) * stride[3];
  };
  return k == q.kernel[1] && (k == 1 || k == 3 || k == 5 || k == 7) && s == q.stride[1] && s <= 2 &&
         (k == 1 || (q.dilation[0] == 1 && q.dilation[1] == 1)) && q.padding[0] < k && q.padding[1] < k &&
         q.out_width <= 1 << 15 && q.batch * q.out_height <= MOST_OFFSET / 2 &&
         reach(q.height + k, q.width + k, q.input_stride) <= MOST_OFFSET &&
         reach(q.out_height, q.out_width, q.grad_stride) <= MOST_OFFSET;
}

// The 1x1 kernel of a layer without groups and padding, as the product that it is.
constexpr Product product_of(const Conv2dChannelGrad& q) {
  Product p{};
  p.rows = q.selected;
  p.outputs = q.outputs;
  p.images = q.batch;
  p.height = q.out_height;
  p.width = q.out_width;
  p.input_image = q.input_stride[0];
  p.input_channel = q.input_stride[1];
  p.input_row = q.stride[0] * q.input_stride[2];
  p.input_column = q.stride[1] * q.input_stride[3];
  p.grad_image = q.grad_stride[0];
  p.grad_channel = q.grad_stride[1];
  p.grad_row = q.grad_stride[2];
  p.grad_column = q.grad_stride[3];
  return p;
}
constexpr bool is_product(const Conv2dChannelGrad& q) {
  return q.kernel[0] == 1 && q.kernel[1] == 1 && q.padding[0] == 0 && q.padding[1] == 0 &&
         q.in_per_group == q.in_channels;
}

constexpr bool is_dense_plane(int64_t height, int64_t width, const int64_t (&stride)[4]) {
  return (width == 1 || stride[3] == 1) && (height == 1 || stride[2] == width);
}

// Planes through shared memory. A tile is all of several planes, or a strip of rows of one; an item is some rows of a
// plane in it, of which a thread has one column. A thread keeps its column, and takes every `slots`th item.
struct StagedPlan {
  int columns, slots;
  int item_rows;
  int strip_items, strips;               // of a plane; rows of a strip: strip_items * item_rows
  int planes;                            // of a tile, or 0 where the problem does not fit
  int input_vectors, grad_vectors;       // room of a plane of a tile
  uint32_t input_inverse, grad_inverse;  // 2^32 / vectors, rounded up
  int tiles;
  int share, splits;  // tiles of a split
};

// The rows of the input that rows [first, last) of the output meet.
struct Rows {
  int begin, end;
};
TRADY_HOST_DEVICE constexpr Rows rows_met(const Conv2dChannelGrad& q, int first, int last) {
  const int stride = static_cast<int>(q.stride[0]), padding = static_cast<int>(q.padding[0]);
  const int begin = first * stride - padding, end = (last - 1) * stride - padding + static_cast<int>(q.kernel[0]);
  const int height = static_cast<int>(q.height);
  return {begin < 0 ? 0 : begin, end > height ? height : end};
}

// As few splits as fill the GPU, each of which is one more number to add for every result.
constexpr int splits_of(int64_t blocks, int64_t most) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(WANTED_BLOCKS, blocks), 1, std::max<int64_t>(1, most)));
}

constexpr int balanced(int64_t length, int64_t most) {
  return static_cast<int>(ceil_div(length, ceil_div(length, most)));
}

// `together` outputs of a group share a plane of the input.
constexpr StagedPlan plan_staged(const Conv2dChannelGrad& q, int element_size, int together) {
  StagedPlan plan{};
  if (q.out_width > SUM_THREADS) return plan;
  plan.columns = static_cast<int>(q.out_width);
  plan.slots = SUM_THREADS / plan.columns;
  plan.item_rows = balanced(q.out_height, ITEM_ROWS);
  const int items = static_cast<int>(ceil_div(q.out_height, plan.item_rows));
  const auto rows_of = [&](int64_t strip_items) { return std::min(strip_items * plan.item_rows, q.out_height); };
  // A run of elements begins and ends anywhere in a vector.
  const auto vectors = [&](int64_t count) { return ceil_div(count * element_size, VECTOR_BYTES) + 1; };
  const auto input_vectors = [&](int64_t strip_items) {
    return vectors(std::min(q.height, (rows_of(strip_items) - 1) * q.stride[0] + q.kernel[0]) * q.width);
  };
  const auto grad_vectors = [&](int64_t strip_items) { return vectors(rows_of(strip_items) * q.out_width); };
  const auto room = [&](int64_t strip_items) {
    return (STAGE_VECTORS - MARGIN_VECTORS) / (input_vectors(strip_items) + together * grad_vectors(strip_items));
  };
  // Of the cuts that keep the slots busy for the fewest rounds the one into the largest tiles.
  int64_t fewest = 0;
  const auto consider = [&](int64_t planes, int64_t strip_items, int64_t rounds) {
    if (plan.planes != 0 && rounds > fewest) return;
    fewest = rounds;
    plan.planes = static_cast<int>(planes);
    plan.strip_items = static_cast<int>(strip_items);
  };
  if (room(items) >= 1) {
    for (int64_t planes = 1; planes <= std::min(q.batch, room(items)); ++planes)
      consider(planes, items, ceil_div(q.batch, planes) * ceil_div(planes * items, plan.slots));
    plan.planes = balanced(q.batch, plan.planes);
  } else {
    for (int64_t strip_items = 1; strip_items < items && room(strip_items) >= 1; ++strip_items)
      consider(1, strip_items, ceil_div(items, strip_items) * ceil_div(strip_items, plan.slots));
  }
  if (plan.planes == 0) return plan;
  plan.strips = static_cast<int>(ceil_div(items, plan.strip_items));
  plan.input_vectors = static_cast<int>(input_vectors(plan.strip_items));
  plan.grad_vectors = static_cast<int>(grad_vectors(plan.strip_items));
  plan.input_inverse = static_cast<uint32_t>((int64_t{1} << 32) / plan.input_vectors + 1);
  plan.grad_inverse = static_cast<uint32_t>((int64_t{1} << 32) / plan.grad_vectors + 1);
  plan.tiles = static_cast<int>(ceil_div(q.batch, plan.planes) * plan.strips);
  const int wanted = splits_of(q.selected * ceil_div(q.outputs, together), plan.tiles);
  plan.share = static_cast<int>(ceil_div(plan.tiles, wanted));
  plan.splits = static_cast<int>(ceil_div(plan.tiles, plan.share));
  return plan;
}

// Element by element from where they lie: any strides. `lanes` threads side by side have as many selected channels; of
// their planes each has a column, and every `slots`th item.
struct DirectPlan {
  int lanes, columns, slots;
  int chunks;  // of the columns of the output
  int item_rows, plane_items;
  int items;          // of all images
  int share, splits;  // items of a split
};

constexpr DirectPlan plan_direct(const Conv2dChannelGrad& q, int together) {
  DirectPlan plan{};
  plan.lanes = 1;
  if (q.input_stride[1] == 1 && q.input_stride[3] != 1) {
    while (plan.lanes < 32 && plan.lanes < q.selected) plan.lanes *= 2;
  }
  const int positions = SUM_THREADS / plan.lanes;
  plan.columns = balanced(q.out_width, positions);
  plan.chunks = static_cast<int>(ceil_div(q.out_width, plan.columns));
  plan.slots = positions / plan.columns;
  plan.item_rows = balanced(q.out_height, ITEM_ROWS);
  plan.plane_items = static_cast<int>(ceil_div(q.out_height, plan.item_rows));
  plan.items = static_cast<int>(q.batch * plan.plane_items);
  const int64_t blocks = ceil_div(q.selected, plan.lanes) * ceil_div(q.outputs, together) * plan.chunks;
  const int wanted = splits_of(blocks, ceil_div(plan.items, plan.slots));
  plan.share = static_cast<int>(ceil_div(plan.items, wanted * plan.slots)) * plan.slots;
  plan.splits = static_cast<int>(ceil_div(plan.items, plan.share));
  return plan;
}

// Any kernel: the pixels of the output, in order, cut into splits of `pixels`.
struct GeneralPlan {
  int64_t pixels;
  int splits;
};

constexpr GeneralPlan plan_general(const Conv2dChannelGrad& q) {
  constexpr int64_t LEAST_PIXELS = 4 * GENERAL_THREADS, MOST_PIXELS = int64_t{1} << 30;
  const int64_t pixels = q.batch * q.out_height * q.out_width;
  const int64_t splits =
      std::max<int64_t>(splits_of(q.selected * q.outputs, pixels / LEAST_PIXELS), ceil_div(pixels, MOST_PIXELS));
  return {ceil_div(pixels, splits), static_cast<int>(splits)};
}

}  // namespace trady::cuda
