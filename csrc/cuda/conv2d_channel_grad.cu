// conv2d_channel_grad for depthwise and grouped layers: each selected plane of the input against the planes of
// grad_output that it belongs to, which are read where they lie.
//
// An output pixel of a depthwise layer of stride 1 costs two elements and kh * kw multiply-adds. In the time in which
// the DRAM of an H100 delivers 8 bytes (3.35 TB/s) its 132 multiprocessors issue 70 instructions a lane (at 1.75 GHz):
// 70 an output pixel in float32, 35 in half precision. So a 3x3 kernel is bound by memory if the rest is kept from
// costing much more than its 9 multiply-adds, 5x5 (25) is at the border in half precision, and 7x7 (49) beyond it
// there. Hence:
// * A thread has a column, and up to seven rows of grad_output in registers; each element of the input that it loads is
//   multiplied by all of those rows that it meets: (rows + k - 1) * k + rows loads for rows * k * k products.
// * Elements come from shared memory. Planes of 7x7 and 14x14 begin anywhere in a sector and have rows of 14 to 56
//   bytes, so they are copied there as flat runs, by aligned 16-byte vectors which contain them: no vector with a byte
//   of a tensor in it leaves the page, or torch's allocation, and what else it brings is not looked at. Copies of the
//   next tile are in flight, without a register, while a tile is multiplied.
// * Columns outside of the map are multiplied too, and their sums dropped in the end: a thread has one column for good.
// * Memory formats without dense planes are read directly; the first-level cache serves what neighbours share. In
//   channels_last, adjacent threads have adjacent selected channels. What keeps the DRAM busy there is that a thread
//   starts all loads of its rows, 34 of a 3x3 kernel, before it waits for the first: an element of grad_output costs a
//   sector of 32 bytes, and each load that waits for another one costs most of a microsecond.
// Sums of a block go to a partial buffer, and a second kernel adds them in a fixed order.
#include "conv2d_channel_grad.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "conv2d_checks.h"
#include "elements.h"
#include "launch.h"
#include "layout.h"
#include "sums.h"

namespace trady::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- kernels ------------------------------------------------------------------------------------------------

// The first plane of grad_output that a channel belongs to.
__device__ int64_t first_output(const Conv2dChannelGrad& q, int64_t channel) {
  assert(0 <= channel && channel < q.in_channels && "conv2d_channel_grad: an index in channels is out of range");
  return static_cast<uint32_t>(channel) / static_cast<uint32_t>(q.in_per_group) * q.outputs;
}

// Rows of grad_output, from `row` on, times the rows of the input that they meet, of which `top` is the first. Nothing
// here branches, so that all loads can be on their way before the first product: a row of the padding is another one's
// address and zeros.
template <int K, int S, int ROWS, int OUTPUTS, class Planes>
__device__ __forceinline__ void multiply_rows(const Planes& planes, int row, int top, int height,
                                              float (&sums)[OUTPUTS * K * K]) {
  float grad[OUTPUTS][ROWS];
#pragma unroll
  for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
    for (int h = 0; h < ROWS; ++h) grad[o][h] = planes.grad(o, row + h);
  }
#pragma unroll
  for (int r = 0; r < (ROWS - 1) * S + K; ++r) {
    // Each output meets a row of the map, and padding is less than a kernel: these need no look.
    const bool always = K - 1 <= r && r <= (ROWS - 1) * S;
    const bool inside = always || static_cast<unsigned>(top + r) < static_cast<unsigned>(height);
    const int there = always ? top + r : min(max(top + r, 0), height - 1);
    float pixels[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const float pixel = planes.input(there, j);
      pixels[j] = inside ? pixel : 0;
    }
#pragma unroll
    for (int h = 0; h < ROWS; ++h) {
      const int i = r - h * S;
      if (i < 0 || i >= K) continue;
#pragma unroll
      for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
        for (int j = 0; j < K; ++j) sums[(o * K + i) * K + j] += grad[o][h] * pixels[j];
      }
    }
  }
}

// Never a row of grad_output that is not there: zeros in its place would meet pixels, and infinity times zero is NaN.
template <int K, int S, int OUTPUTS, class Planes>
__device__ __forceinline__ void multiply_item(const Planes& planes, int row, int rows, int top, int height,
                                              float (&sums)[OUTPUTS * K * K]) {
  if (rows == ITEM_ROWS) {
    multiply_rows<K, S, ITEM_ROWS, OUTPUTS>(planes, row, top, height, sums);
    return;
  }
  static_assert(ITEM_ROWS <= 8);
  if (rows & 4) {
    multiply_rows<K, S, 4, OUTPUTS>(planes, row, top, height, sums);
    row += 4;
    top += 4 * S;
  }
  if (rows & 2) {
    multiply_rows<K, S, 2, OUTPUTS>(planes, row, top, height, sums);
    row += 2;
    top += 2 * S;
  }
  if (rows & 1) multiply_rows<K, S, 1, OUTPUTS>(planes, row, top, height, sums);
}

// Sums of the taps whose column lies outside of the map: of whatever was there.
template <int K, int OUTPUTS>
__device__ __forceinline__ void drop_outside(int left, int width, float (&sums)[OUTPUTS * K * K]) {
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (static_cast<unsigned>(left + j) < static_cast<unsigned>(width)) continue;
#pragma unroll
    for (int i = 0; i < OUTPUTS * K; ++i) sums[i * K + j] = 0;
  }
}

// Blocks of a multiprocessor that registers are sought for: what a thread holds are its sums and rows, and what has
// been loaded of the input, which from shared memory is little.
constexpr int resident_blocks(int k, int outputs) { return k >= 5 ? 2 : outputs > 1 ? 3 : 4; }
constexpr int resident_direct_blocks(int k) { return k == 7 ? 1 : k == 5 ? 2 : 3; }

// ---- planes through shared memory ---------------------------------------------------------------------------

// Runs of `length` elements, one an image, with `vectors` of room for each.
template <class T>
__device__ __forceinline__ void copy_runs(uint4* shared, int vectors, uint32_t inverse, const T* first,
                                          int64_t batch_stride, int images, int length) {
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(images * vectors); i += blockDim.x) {
    const unsigned image = static_cast<unsigned>(static_cast<uint64_t>(i) * inverse >> 32);  // i / vectors
    const unsigned vector = i - image * vectors;
    const auto address = reinterpret_cast<uintptr_t>(first + image * batch_stride);
    const unsigned before = address % VECTOR_BYTES;
    const unsigned end = before + length * static_cast<unsigned>(sizeof(T)), start = vector * VECTOR_BYTES;
    if (start >= end) continue;
    copy_later(shared + i, reinterpret_cast<const uint4*>(address - before) + vector,
               min(static_cast<unsigned>(VECTOR_BYTES), end - start));
  }
}

// The run's first element, in its room.
template <class T>
__device__ __forceinline__ const T* copied_run(const uint4* shared, int vectors, const T* first, int64_t batch_stride,
                                               int image) {
  const auto address = reinterpret_cast<uintptr_t>(first + image * batch_stride);
  return reinterpret_cast<const T*>(shared + image * vectors) + address % VECTOR_BYTES / sizeof(T);
}

// A thread's column of planes in shared memory.
template <class T, int OUTPUTS>
struct SharedColumn {
  const T* inputs;  // where the first tap's element of row 0 would lie
  const T* grads[OUTPUTS];
  int width, out_width;
  __device__ __forceinline__ float input(int row, int j) const { return static_cast<float>(inputs[row * width + j]); }
  __device__ __forceinline__ float grad(int o, int row) const { return static_cast<float>(grads[o][row * out_width]); }
};

template <class T, int K, int S, int OUTPUTS>
__global__ void __launch_bounds__(SUM_THREADS, resident_blocks(K, OUTPUTS))
    staged_sums(const T* __restrict__ input, const T* __restrict__ grad_output, const int64_t* __restrict__ channels,
                float* __restrict__ partial, const Conv2dChannelGrad q, const StagedPlan plan) {
  let_next_start();
  // In the end the same memory adds up the threads' sums.
  __shared__ uint4 stages[2][STAGE_VECTORS];
  using Scratch = float[SUM_THREADS / 32][SUMS_TOGETHER][32];
  static_assert(sizeof(Scratch) <= sizeof(stages));
  // Blocks side by side have the same outputs for several channels: what these share, they find in the cache.
  const int outputs = static_cast<int>(q.outputs);
  const auto selected = static_cast<uint32_t>(q.selected);
  const int64_t j = blockIdx.x % selected;
  const int output = blockIdx.x / selected * OUTPUTS, last_output = min(OUTPUTS, outputs - output) - 1;
  input += j * q.input_stride[1];
  grad_output += (first_output(q, channels[j]) + output) * q.grad_stride[1];

  const int height = static_cast<int>(q.height), width = static_cast<int>(q.width);
  const int out_height = static_cast<int>(q.out_height), out_width = static_cast<int>(q.out_width);
  const int column = threadIdx.x % plan.columns, slot = threadIdx.x / plan.columns;
  const int top = static_cast<int>(q.padding[0]), left = column * S - static_cast<int>(q.padding[1]);

  struct Tile {
    const T *input, *grad;
    int images, first_row, last_row;
    Rows met;
  };
  const auto tile_of = [&](int index) {
    const int strip = index % plan.strips;
    const int64_t image = static_cast<int64_t>(index / plan.strips) * plan.planes;
    const int strip_rows = plan.strip_items * plan.item_rows, first_row = strip * strip_rows;
    const int last_row = min(out_height, first_row + strip_rows);
    const Rows met = rows_met(q, first_row, last_row);
    return Tile{input + image * q.input_stride[0] + met.begin * width,
                grad_output + image * q.grad_stride[0] + first_row * out_width,
                static_cast<int>(min(static_cast<int64_t>(plan.planes), q.batch - image)),
                first_row,
                last_row,
                met};
  };
  const auto grad_room = [&](uint4* stage, int o) {
    return stage + MARGIN_VECTORS + plan.planes * (plan.input_vectors + o * plan.grad_vectors);
  };
  const auto grad_of = [&](const Tile& tile, int o) { return tile.grad + min(o, last_output) * q.grad_stride[1]; };
  const auto copy = [&](int index, uint4* stage) {
    const Tile tile = tile_of(index);
    copy_runs(stage + MARGIN_VECTORS, plan.input_vectors, plan.input_inverse, tile.input, q.input_stride[0],
              tile.images, (tile.met.end - tile.met.begin) * width);
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
      copy_runs(grad_room(stage, o), plan.grad_vectors, plan.grad_inverse, grad_of(tile, o), q.grad_stride[0],
                tile.images, (tile.last_row - tile.first_row) * out_width);
    }
    end_of_copies();
  };

  float sums[OUTPUTS * K * K] = {};
  int index = static_cast<int>(blockIdx.y) * plan.share, current = 0;
  const int end = min(plan.tiles, index + plan.share);
  copy(index, stages[current]);
  for (; index < end; ++index, current ^= 1) {
    if (index + 1 < end) {
      copy(index + 1, stages[current ^ 1]);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    uint4* stage = stages[current];
    const Tile tile = tile_of(index);
    const int plane_items = (tile.last_row - tile.first_row + plan.item_rows - 1) / plan.item_rows;
    const int items = slot < plan.slots ? tile.images * plane_items : 0;
    for (int item = slot; item < items; item += plan.slots) {
      const int image = item / plane_items, row = item % plane_items * plan.item_rows;  // row of the tile
      SharedColumn<T, OUTPUTS> planes;
      planes.inputs = copied_run(stage + MARGIN_VECTORS, plan.input_vectors, tile.input, q.input_stride[0], image) -
                      tile.met.begin * width + left;
#pragma unroll
      for (int o = 0; o < OUTPUTS; ++o) {
        planes.grads[o] =
            copied_run(grad_room(stage, o), plan.grad_vectors, grad_of(tile, o), q.grad_stride[0], image) + column;
      }
      planes.width = width;
      planes.out_width = out_width;
      multiply_item<K, S, OUTPUTS>(planes, row, min(plan.item_rows, tile.last_row - tile.first_row - row),
                                   (tile.first_row + row) * S - top, height, sums);
    }
    __syncthreads();
  }
  drop_outside<K, OUTPUTS>(left, width, sums);
  partial += (j * outputs + output) * (K * K) * gridDim.y + blockIdx.y;
  add_threads(sums, 1, reinterpret_cast<Scratch&>(stages), [&](int i, int, float sum) {
    if (i < (last_output + 1) * K * K) partial[static_cast<int64_t>(i) * gridDim.y] = sum;
  });
}

// ---- planes as they lie -------------------------------------------------------------------------------------

// A thread's column of planes with any strides.
template <class T, int K, int OUTPUTS>
struct StridedColumn {
  const T* inputs;
  const T* grads[OUTPUTS];
  int columns[K];  // offsets of the taps' columns, of those outside the map of another one
  int row_stride, grad_row_stride;
  __device__ __forceinline__ float input(int row, int j) const {
    return static_cast<float>(inputs[row * row_stride + columns[j]]);
  }
  __device__ __forceinline__ float grad(int o, int row) const {
    return static_cast<float>(grads[o][row * grad_row_stride]);
  }
};

template <class T, int K, int S, int OUTPUTS>
__global__ void __launch_bounds__(SUM_THREADS, resident_direct_blocks(K))
    direct_sums(const T* __restrict__ input, const T* __restrict__ grad_output, const int64_t* __restrict__ channels,
                float* __restrict__ partial, const Conv2dChannelGrad q, const DirectPlan plan) {
  let_next_start();
  __shared__ float scratch[SUM_THREADS / 32][SUMS_TOGETHER][32];
  const int outputs = static_cast<int>(q.outputs), passes = (outputs + OUTPUTS - 1) / OUTPUTS;
  const int output = blockIdx.x % passes * OUTPUTS, last_output = min(OUTPUTS, outputs - output) - 1;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.x / passes) * plan.lanes;
  const int64_t j = first_channel + (threadIdx.x & (plan.lanes - 1));
  const int64_t channel = channels[min(j, q.selected - 1)];  // on its way while the thread finds its place
  const int position = threadIdx.x / plan.lanes, slot = position / plan.columns;
  const int chunk = blockIdx.y % plan.chunks, split = blockIdx.y / plan.chunks;
  const int column = chunk * plan.columns + position % plan.columns;
  const int height = static_cast<int>(q.height), width = static_cast<int>(q.width);
  const int out_height = static_cast<int>(q.out_height);
  const int top = static_cast<int>(q.padding[0]), left = column * S - static_cast<int>(q.padding[1]);

  const int64_t first_plane = first_output(q, channel);

  float sums[OUTPUTS * K * K] = {};
  if (j < q.selected && slot < plan.slots && column < q.out_width) {
    StridedColumn<T, K, OUTPUTS> planes;
    planes.row_stride = static_cast<int>(q.input_stride[2]);
    planes.grad_row_stride = static_cast<int>(q.grad_stride[2]);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      planes.columns[i] = min(max(left + i, 0), width - 1) * static_cast<int>(q.input_stride[3]);
    }
    input += j * q.input_stride[1];
    grad_output += (first_plane + output) * q.grad_stride[1] + column * q.grad_stride[3];
    const int first = split * plan.share, end = min(plan.items, first + plan.share);
    for (int item = first + slot; item < end; item += plan.slots) {
      const int image = item / plan.plane_items, row = item % plan.plane_items * plan.item_rows;
      planes.inputs = input + image * q.input_stride[0];
#pragma unroll
      for (int o = 0; o < OUTPUTS; ++o) {
        planes.grads[o] = grad_output + image * q.grad_stride[0] + min(o, last_output) * q.grad_stride[1];
      }
      multiply_item<K, S, OUTPUTS>(planes, row, min(plan.item_rows, out_height - row), row * S - top, height, sums);
    }
    drop_outside<K, OUTPUTS>(left, width, sums);
  }
  add_threads(sums, plan.lanes, scratch, [&](int i, int lane, float sum) {
    const int64_t channel = first_channel + lane;
    if (channel < q.selected && i < (last_output + 1) * K * K) {
      partial[((channel * outputs + output) * (K * K) + i) * gridDim.y + blockIdx.y] = sum;
    }
  });
}

// ---- any kernel ---------------------------------------------------------------------------------------------

// A block has a channel and an output: the planes once for every eight taps, after the first time from the caches.
constexpr int TAPS_TOGETHER = 8;
// 128 registers: left to itself, the compiler makes do with 72 on GPUs after Hopper, and spills.
constexpr int GENERAL_BLOCKS = 4;
template <class T, class Sum>
__global__ void __launch_bounds__(GENERAL_THREADS, GENERAL_BLOCKS)
    general_sums(const T* __restrict__ input, const T* __restrict__ grad_output, const int64_t* __restrict__ channels,
                 Sum* __restrict__ partial, const Conv2dChannelGrad q, const GeneralPlan plan) {
  let_next_start();
  __shared__ Sum scratch[GENERAL_THREADS / 32][SUMS_TOGETHER][32];
  const int64_t j = blockIdx.x / q.outputs, output = blockIdx.x % q.outputs;
  input += j * q.input_stride[1];
  grad_output += (first_output(q, channels[j]) + output) * q.grad_stride[1];
  partial += blockIdx.x * q.taps() * gridDim.y + blockIdx.y;

  const auto out_width = static_cast<uint32_t>(q.out_width);
  const uint32_t plane = static_cast<uint32_t>(q.out_height) * out_width;
  const int64_t begin = blockIdx.y * plan.pixels, pixels = q.batch * static_cast<int64_t>(plane);
  // Pixels counted from the beginning of the first image on: 32 bits are enough.
  const int64_t first_image = begin / plane;
  const auto first = static_cast<uint32_t>(begin - first_image * plane);
  const auto count = static_cast<uint32_t>(min(plan.pixels, pixels > begin ? pixels - begin : 0));
  const int taps = static_cast<int>(q.taps()), kernel_width = static_cast<int>(q.kernel[1]);

  for (int base = 0; base < taps; base += TAPS_TOGETHER) {
    Sum sums[TAPS_TOGETHER] = {};
    int64_t rows[TAPS_TOGETHER], columns[TAPS_TOGETHER];
#pragma unroll
    for (int t = 0; t < TAPS_TOGETHER; ++t) {
      const int tap = min(base + t, taps - 1);
      rows[t] = tap / kernel_width * q.dilation[0] - q.padding[0];
      columns[t] = tap % kernel_width * q.dilation[1] - q.padding[1];
    }
    for (uint32_t p = threadIdx.x; p < count; p += GENERAL_THREADS) {
      const uint32_t from_image = first + p, pixel = from_image % plane;
      const int64_t image = first_image + from_image / plane, row = pixel / out_width, column = pixel % out_width;
      const Sum grad =
          static_cast<Sum>(grad_output[image * q.grad_stride[0] + row * q.grad_stride[2] + column * q.grad_stride[3]]);
      const T* inputs = input + image * q.input_stride[0];
#pragma unroll
      for (int t = 0; t < TAPS_TOGETHER; ++t) {
        const int64_t h = row * q.stride[0] + rows[t], w = column * q.stride[1] + columns[t];
        if (h < 0 || h >= q.height || w < 0 || w >= q.width) continue;
        sums[t] += grad * static_cast<Sum>(inputs[h * q.input_stride[2] + w * q.input_stride[3]]);
      }
    }
    add_threads(sums, 1, scratch, [&](int i, int, Sum sum) {
      if (base + i < taps) partial[static_cast<int64_t>(base + i) * gridDim.y] = sum;
    });
  }
}

// ---- host ---------------------------------------------------------------------------------------------------

struct Call {
  const Tensor &input, &grad_output;
  const int64_t* channels;
  const Tensor& out;
  cudaStream_t stream;
  const Conv2dChannelGrad& q;
};

constexpr unsigned whole_warps(int threads) { return static_cast<unsigned>((threads + 31) / 32 * 32); }

template <class T, int K, int S, int OUTPUTS>
void usual(const Call& call) {
  const Conv2dChannelGrad& q = call.q;
  const auto* input = static_cast<const T*>(call.input.const_data_ptr());
  const auto* grad_output = static_cast<const T*>(call.grad_output.const_data_ptr());
  const int64_t passes = ceil_div(q.outputs, OUTPUTS);
  if (is_dense_plane(q.height, q.width, q.input_stride) && is_dense_plane(q.out_height, q.out_width, q.grad_stride)) {
    const StagedPlan plan = plan_staged(q, sizeof(T), OUTPUTS);
    if (plan.planes) {
      return in_two_stages<float>(call.out, plan.splits, call.stream, [&](float* partial) {
        launch(staged_sums<T, K, S, OUTPUTS>, dim3(static_cast<unsigned>(q.selected * passes), plan.splits),
               whole_warps(plan.columns * plan.slots), call.stream, input, grad_output, call.channels, partial, q,
               plan);
      });
    }
  }
  const DirectPlan plan = plan_direct(q, OUTPUTS);
  const int64_t parts = static_cast<int64_t>(plan.chunks) * plan.splits;
  in_two_stages<float>(call.out, parts, call.stream, [&](float* partial) {
    const dim3 grid(static_cast<unsigned>(ceil_div(q.selected, plan.lanes) * passes), static_cast<unsigned>(parts));
    launch(direct_sums<T, K, S, OUTPUTS>, grid, SUM_THREADS, call.stream, input, grad_output, call.channels, partial, q,
           plan);
  });
}

template <class T, int K, int S>
void usual_of(const Call& call) {
  // As many outputs as leave their sums and rows in registers.
  constexpr int OUTPUTS_TOGETHER = K == 1 ? 4 : K == 3 ? 2 : 1;
  call.q.outputs > 1 ? usual<T, K, S, OUTPUTS_TOGETHER>(call) : usual<T, K, S, 1>(call);
}

template <class T, int K>
void usual_of(const Call& call) {
  call.q.stride[0] == 1 ? usual_of<T, K, 1>(call) : usual_of<T, K, 2>(call);
}

template <class T>
void usual_of(const Call& call) {
  switch (call.q.kernel[0]) {
    case 1:
      return usual_of<T, 1>(call);
    case 3:
      return usual_of<T, 3>(call);
    case 5:
      return usual_of<T, 5>(call);
    default:
      return usual_of<T, 7>(call);
  }
}

// False where tensors are too large for it.
bool product(const Call& call) {
  Product p = product_of(call.q);
  if (sum_products(p, call.input, call.grad_output, call.out, call.stream)) return true;
  // Of a mean, say, whose gradient is one number for all pixels.
  const Tensor grad_output = torch::stable::contiguous(call.grad_output);
  p.grad_image = grad_output.stride(0);
  p.grad_channel = grad_output.stride(1);
  p.grad_row = grad_output.stride(2);
  p.grad_column = grad_output.stride(3);
  return sum_products(p, call.input, grad_output, call.out, call.stream);
}

template <class T>
void sums_of(const Call& call) {
  using Sum = computed_in<T>;
  if constexpr (std::is_same_v<T, float>) {
    if (is_product(call.q) && product(call)) return;
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (is_usual(call.q)) return usual_of<T>(call);
  }
  const GeneralPlan plan = plan_general(call.q);
  in_two_stages<Sum>(call.out, plan.splits, call.stream, [&](Sum* partial) {
    const dim3 grid(static_cast<unsigned>(call.q.selected * call.q.outputs), static_cast<unsigned>(plan.splits));
    launch(general_sums<T, Sum>, grid, GENERAL_THREADS, call.stream, static_cast<const T*>(call.input.const_data_ptr()),
           static_cast<const T*>(call.grad_output.const_data_ptr()), call.channels, partial, call.q, plan);
  });
}

Tensor conv2d_channel_grad(const Tensor& input_selected, const Tensor& grad_output, const Tensor& channels,
                           int64_t in_channels, const std::vector<int64_t>& geometry, int64_t groups) {
  check_conv2d_channel_grad(input_selected, grad_output, channels, in_channels, geometry, groups);
  const auto input = input_selected.sizes(), outputs = grad_output.sizes();
  Conv2dChannelGrad q{};
  for (int axis = 0; axis < 2; ++axis) {
    q.kernel[axis] = geometry[axis];
    q.stride[axis] = geometry[2 + axis];
    q.padding[axis] = geometry[4 + axis];
    q.dilation[axis] = geometry[6 + axis];
  }
  q.batch = input[0];
  q.selected = input[1];
  q.height = input[2];
  q.width = input[3];
  q.out_height = outputs[2];
  q.out_width = outputs[3];
  q.outputs = outputs[1] / groups;
  q.in_channels = in_channels;
  q.in_per_group = in_channels / groups;
  for (int axis = 0; axis < 4; ++axis) {
    q.input_stride[axis] = input_selected.stride(axis);
    q.grad_stride[axis] = grad_output.stride(axis);
  }
  STD_TORCH_CHECK(in_channels <= MOST_OFFSET && q.selected * q.outputs <= MOST_OFFSET && q.taps() <= MOST_OFFSET &&
                      q.out_height * q.out_width <= MOST_OFFSET,
                  "conv2d_channel_grad: expected fewer than 2^31 channels, results of a tap and pixels of a map");

  const OnDeviceOf device(input_selected);
  check_device_of(input_selected, grad_output, "grad_output");
  check_device_of(input_selected, channels, "channels");
  const std::vector<int64_t> shape{q.selected, q.outputs, q.kernel[0], q.kernel[1]};
  const auto accumulate = input_selected.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (q.elements() == 0 || grad_output.numel() == 0) return torch::stable::new_zeros(grad_output, shape, accumulate);
  const Tensor out = new_empty(grad_output, shape, accumulate);
  const Tensor index = torch::stable::contiguous(channels);
  const Call call{
      input_selected, grad_output, static_cast<const int64_t*>(index.const_data_ptr()), out, device.stream, q};
  for_floating_type(input_selected, "input_selected", [&]<class T>() { sums_of<T>(call); });
  return out;
}

}  // namespace
}  // namespace trady::cuda

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("conv2d_channel_grad", TORCH_BOX(&trady::cuda::conv2d_channel_grad));
}
