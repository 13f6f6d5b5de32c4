// Products of matrices that are summed over the pixels of a batch, in float32: 1x1 convolutions and linear layers. The
// problem, and how its work is cut into blocks. No torch, no CUDA: a test drives it.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define TRADY_HOST_DEVICE __host__ __device__
#else
#define TRADY_HOST_DEVICE
#endif

namespace trady::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int SUM_THREADS = 256;
constexpr int VECTOR_BYTES = 16;
constexpr int64_t MOST_OFFSET = (int64_t{1} << 31) - 1;

// result[r, o] is the sum over images and their height * width pixels of input[r] * grad_output[o]. Strides count
// elements; the input's rows and columns are those that pixels of grad_output meet.
struct Product {
  int64_t rows, outputs;
  int64_t images, height, width;
  int64_t input_image, input_channel, input_row, input_column;
  int64_t grad_image, grad_channel, grad_row, grad_column;

  TRADY_HOST_DEVICE constexpr int64_t plane() const { return height * width; }
  TRADY_HOST_DEVICE constexpr int64_t pixels() const { return images * plane(); }
  // Whether the pixels of an image follow each other at the stride of a column.
  TRADY_HOST_DEVICE constexpr bool is_flat_input() const { return height == 1 || input_row == width * input_column; }
};

// A step is what a thread loads of grad_output before it multiplies it: four elements each of four planes, or four
// adjacent outputs each of four pixels.
constexpr int EACH = 4;
constexpr int MOST_ROWS = 16;  // of a block: what registers hold the sums of
constexpr int PRODUCT_WARPS = SUM_THREADS / 32;
// Warps of a block along pixels, each with a copy of its own of the input: shared memory has no room for more.
constexpr int MOST_PIXEL_WARPS = 2;
constexpr int POINT_PIXELS = 32 * EACH;

// Blocks of a multiprocessor, and those of all of them on the largest GPU that was measured: more would come in a
// second wave, which for the last ones is as long as the first. Not asked of the GPU: sums are the same bits on all.
TRADY_HOST_DEVICE constexpr int resident_products(int rows) { return rows <= 4 ? 3 : 2; }
constexpr int64_t blocks_of_wave(int rows) { return 132 * resident_products(rows); }

constexpr int rows_together(int64_t rows) {
  int together = 1;
  while (together < MOST_ROWS && together < rows) together *= 2;
  return together;
}

// Cuts `steps` into as many splits as there are blocks of a wave for each of `tiles`; `together` steps of a split are
// taken at the same time.
struct Share {
  int share, splits;  // share: steps one after the other
};
constexpr Share share_of(int64_t steps, int64_t together, int64_t tiles, int rows) {
  const int64_t wanted = std::clamp<int64_t>(blocks_of_wave(rows) / tiles, 1, ceil_div(steps, together));
  const int64_t share = ceil_div(steps, wanted * together);
  return {static_cast<int>(share), static_cast<int>(ceil_div(steps, share * together))};
}

// Pixels of a plane side by side in memory: a warp takes POINT_PIXELS of them in a step, for some rows and EACH planes
// of grad_output. The warps of a block go along outputs as far as there are some, where they share what is copied of
// the input; others take the next steps, and have parts of their own.
struct PointPlan {
  int rows;                       // of a block: 1, 2, 4, 8 or 16
  int row_tiles, output_tiles;    // blocks along them
  int output_warps, pixel_warps;  // of a block
  int share, splits;
  constexpr int parts() const { return splits * pixel_warps; }
};

// Whether it takes the problem, with 32-bit offsets in the tensors.
constexpr bool is_along_pixels(const Product& p) {
  const auto reach = [&](int64_t channels, int64_t image, int64_t channel, int64_t row, int64_t column) {
    return (p.images - 1) * image + (channels - 1) * channel + (p.height - 1) * row + (p.width - 1) * column;
  };
  return (p.width == 1 || p.grad_column == 1) && (p.height == 1 || p.grad_row == p.width) &&
         reach(p.rows, p.input_image, p.input_channel, p.input_row, p.input_column) <= MOST_OFFSET - EACH &&
         reach(p.outputs, p.grad_image, p.grad_channel, p.grad_row, p.grad_column) <= MOST_OFFSET - EACH &&
         p.pixels() <= MOST_OFFSET / 2;
}

constexpr PointPlan plan_points(const Product& p) {
  PointPlan plan{};
  plan.rows = rows_together(p.rows);
  plan.row_tiles = static_cast<int>(ceil_div(p.rows, plan.rows));
  const int64_t of_outputs = ceil_div(p.outputs, EACH);
  plan.output_tiles = static_cast<int>(ceil_div(of_outputs, PRODUCT_WARPS));
  plan.output_warps = static_cast<int>(ceil_div(of_outputs, plan.output_tiles));
  plan.pixel_warps = std::min(PRODUCT_WARPS / plan.output_warps, MOST_PIXEL_WARPS);
  const int64_t tiles = static_cast<int64_t>(plan.row_tiles) * plan.output_tiles;
  const Share of = share_of(ceil_div(p.pixels(), POINT_PIXELS), plan.pixel_warps, tiles, plan.rows);
  plan.share = of.share;
  plan.splits = of.splits;
  return plan;
}

// Outputs of a pixel side by side in memory, and pixels at one stride: `lanes` threads take EACH outputs each of a
// pixel, those behind them the next pixels, EACH in a step.
struct RowPlan {
  int rows;
  int row_tiles, output_tiles;
  int lanes;        // 4, 8, 16 or 32
  int step_pixels;  // of a block
  int share, splits;
};
constexpr int MOST_STEP_PIXELS = SUM_THREADS / 4 * EACH;

constexpr bool is_along_outputs(const Product& p) {
  return (p.outputs == 1 || p.grad_channel == 1) && (p.height == 1 || p.grad_row == p.width * p.grad_column) &&
         (p.images == 1 || p.grad_image == p.plane() * p.grad_column) && p.pixels() <= MOST_OFFSET / 2;
}

constexpr RowPlan plan_rows(const Product& p) {
  RowPlan plan{};
  plan.rows = rows_together(p.rows);
  plan.row_tiles = static_cast<int>(ceil_div(p.rows, plan.rows));
  // The most lanes that leave few of them idle.
  const auto taken = [&](int lanes) { return ceil_div(p.outputs, lanes * EACH) * lanes * EACH; };
  plan.lanes = 32;
  while (plan.lanes > 4 && 8 * taken(plan.lanes) > 9 * taken(4)) plan.lanes /= 2;
  plan.output_tiles = static_cast<int>(ceil_div(p.outputs, plan.lanes * EACH));
  plan.step_pixels = SUM_THREADS / plan.lanes * EACH;
  const int64_t tiles = static_cast<int64_t>(plan.row_tiles) * plan.output_tiles;
  const Share of = share_of(ceil_div(p.pixels(), plan.step_pixels), 1, tiles, plan.rows);
  plan.share = of.share;
  plan.splits = of.splits;
  return plan;
}

}  // namespace trady::cuda
