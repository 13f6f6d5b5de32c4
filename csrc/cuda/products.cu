// grad_output, of which there is by far the most, comes from memory once for up to MOST_ROWS rows, each element to the
// one thread that multiplies it, while the step before is multiplied. The input comes through shared memory, two steps
// ahead: that of many rows would not fit into registers, and several threads want it.
//
// In the time in which an H200's memory delivers a float, 4.1 TB/s, its 132 multiprocessors can do 25 multiply-adds: as
// many as there are rows are bound by memory if the rest costs little.
#include "products.h"

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "elements.h"
#include "launch.h"
#include "sums.h"

namespace trady::cuda {
namespace {

using torch::stable::Tensor;

constexpr int STAGES = 3;

__device__ __forceinline__ void take(const float4& four, float (&elements)[EACH]) {
  elements[0] = four.x;
  elements[1] = four.y;
  elements[2] = four.z;
  elements[3] = four.w;
}

// Four elements side by side, or zeros.
__device__ __forceinline__ void copy_four(float4* shared, const float* global, bool exist) {
  if (exist) {
    copy_later(reinterpret_cast<uint4*>(shared), reinterpret_cast<const uint4*>(global), VECTOR_BYTES);
  } else {
    *shared = float4{0, 0, 0, 0};
  }
}
__device__ __forceinline__ void copy_one(float* shared, const float* global, bool exist) {
  if (exist) {
    copy_later(shared, global);
  } else {
    *shared = 0;
  }
}

// ---- planes -------------------------------------------------------------------------------------------------

// Where a thread's pixels of a step lie in a plane: one after the other, or one in each of the warp's next 32.
template <bool VECTORS>
struct Pixels {
  static constexpr int PLACES = VECTORS ? 1 : EACH;
  uint32_t input[PLACES], grad[PLACES];
  bool exist[PLACES];

  __device__ __forceinline__ Pixels(const Product& p, int step) {
    const auto plane = static_cast<uint32_t>(p.plane()), width = static_cast<uint32_t>(p.width);
    const auto count = static_cast<uint32_t>(p.pixels());
    const uint32_t first = static_cast<uint32_t>(step) * POINT_PIXELS + threadIdx.x % 32 * (VECTORS ? EACH : 1);
#pragma unroll
    for (int i = 0; i < PLACES; ++i) {
      exist[i] = first + i * 32 < count;
      const uint32_t pixel = min(first + i * 32, count - 1), image = pixel / plane, place = pixel - image * plane;
      grad[i] = image * static_cast<uint32_t>(p.grad_image) + place;
      input[i] = image * static_cast<uint32_t>(p.input_image);
      if (VECTORS || p.is_flat_input()) {
        input[i] += place * static_cast<uint32_t>(p.input_column);
      } else {
        const uint32_t row = place / width, column = place - row * width;
        input[i] += row * static_cast<uint32_t>(p.input_row) + column * static_cast<uint32_t>(p.input_column);
      }
    }
  }

  // Of the plane of grad_output at `channel` elements. Zeros for pixels that do not exist.
  __device__ __forceinline__ void load(const float* grad_output, uint32_t channel, float (&elements)[EACH]) const {
    if constexpr (VECTORS) {
      float4 four{0, 0, 0, 0};
      if (exist[0]) four = *reinterpret_cast<const float4*>(grad_output + (channel + grad[0]));
      take(four, elements);
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i) elements[i] = exist[i] ? grad_output[channel + grad[i]] : 0;
    }
  }

  // Of a plane of the input into shared memory, and later from there.
  __device__ __forceinline__ void copy(const float* tensor, uint32_t channel, float4 (&row)[POINT_PIXELS / 4],
                                       int lane) const {
    if constexpr (VECTORS) {
      copy_four(row + lane, tensor + (channel + input[0]), exist[0]);
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        copy_one(reinterpret_cast<float*>(row) + i * 32 + lane, tensor + (channel + input[i]), exist[i]);
      }
    }
  }
  __device__ __forceinline__ static void copied(const float4 (&row)[POINT_PIXELS / 4], int lane,
                                                float (&elements)[EACH]) {
    if constexpr (VECTORS) {
      take(row[lane], elements);
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i) elements[i] = reinterpret_cast<const float*>(row)[i * 32 + lane];
    }
  }
};

// Elements that are loaded one by one, whose number or place is no multiple of a vector's, take registers of their own,
// and so do copies where there is nothing that makes them beside the thread.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int COPIES_IN_REGISTERS = 1;
#else
constexpr int COPIES_IN_REGISTERS = 0;
#endif
__device__ constexpr int resident(int rows, bool vectors) {
  const int blocks = resident_products(rows) - !vectors - COPIES_IN_REGISTERS;
  return blocks < 1 ? 1 : blocks;
}

template <int ROWS, bool VECTORS>
__global__ void __launch_bounds__(SUM_THREADS, resident(ROWS, VECTORS))
    point_sums(const float* __restrict__ input, const float* __restrict__ grad_output, float* __restrict__ partial,
               const Product p, const PointPlan plan) {
  let_next_start();
  __shared__ float4 stages[STAGES][MOST_PIXEL_WARPS][ROWS][POINT_PIXELS / 4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pixel_warp = warp / plan.output_warps, output_warp = warp % plan.output_warps;
  const int outputs = static_cast<int>(p.outputs), rows = static_cast<int>(p.rows);
  const int first_row = blockIdx.x % plan.row_tiles * ROWS;
  const int first_output = (blockIdx.x / plan.row_tiles * plan.output_warps + output_warp) * EACH;
  const int part = blockIdx.y * plan.pixel_warps + pixel_warp;
  const int first_step = part * plan.share;

  // Rows and outputs that do not exist are others' again, and are not stored.
  const int last = max(0, min(EACH, outputs - first_output) - 1);
  const uint32_t first_plane = min(first_output, outputs - 1) * static_cast<uint32_t>(p.grad_channel);
  const auto copy = [&](int n) {
    if (n < plan.share) {
      const Pixels<VECTORS> pixels(p, first_step + n);
      for (int r = output_warp; r < ROWS; r += plan.output_warps) {
        const uint32_t channel = min(first_row + r, rows - 1) * static_cast<uint32_t>(p.input_channel);
        pixels.copy(input, channel, stages[n % STAGES][pixel_warp][r], lane);
      }
    }
    end_of_copies();
  };
  float sums[ROWS * EACH] = {}, next[EACH][EACH];
  const auto load = [&](int n) {
    const Pixels<VECTORS> pixels(p, first_step + n);
#pragma unroll
    for (int o = 0; o < EACH; ++o) {
      pixels.load(grad_output, first_plane + min(o, last) * static_cast<uint32_t>(p.grad_channel), next[o]);
    }
  };
  copy(0);
  copy(1);
  load(0);
  for (int n = 0; n < plan.share; ++n) {
    float grad[EACH][EACH];
#pragma unroll
    for (int o = 0; o < EACH; ++o) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) grad[o][i] = next[o][i];
    }
    wait_for_copies<1>();
    __syncthreads();  // and nobody looks at step n - 1 any more, in whose place n + 2 comes
    copy(n + 2);
    if (n + 1 < plan.share) load(n + 1);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float x[EACH];
      Pixels<VECTORS>::copied(stages[n % STAGES][pixel_warp][r], lane, x);
#pragma unroll
      for (int o = 0; o < EACH; ++o) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) sums[r * EACH + o] += x[i] * grad[o][i];
      }
    }
  }
  const int first = add_lanes<ROWS * EACH>(sums, lane);
  constexpr int HELD = ROWS * EACH > 32 ? ROWS * EACH / 32 : 1;
  constexpr int SAME = ROWS * EACH < 32 ? 32 / (ROWS * EACH) : 1;  // lanes that have the same sum
  if (lane % SAME != 0) return;
  const int parts = plan.splits * plan.pixel_warps;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int row = first_row + (first + i) / EACH, output = first_output + (first + i) % EACH;
    if (row < rows && output < outputs) {
      partial[(static_cast<int64_t>(row) * outputs + output) * parts + part] = sums[i];
    }
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------

template <int ROWS, bool VECTORS>
__global__ void __launch_bounds__(SUM_THREADS, resident(ROWS, VECTORS))
    row_sums(const float* __restrict__ input, const float* __restrict__ grad_output, float* __restrict__ partial,
             const Product p, const RowPlan plan, bool input_vectors) {
  let_next_start();
  // In the end the same memory adds up the threads' sums.
  using Scratch = float[SUM_THREADS / 32][SUMS_TOGETHER][32];
  constexpr int STAGE = MOST_STEP_PIXELS * ROWS / 4, SCRATCH = sizeof(Scratch) / sizeof(float4);
  __shared__ float4 shared[STAGES * STAGE > SCRATCH ? STAGES * STAGE : SCRATCH];
  const int lane = threadIdx.x % plan.lanes, slot = threadIdx.x / plan.lanes, slots = SUM_THREADS / plan.lanes;
  const int outputs = static_cast<int>(p.outputs), rows = static_cast<int>(p.rows);
  const int first_row = blockIdx.x % plan.row_tiles * ROWS;
  const int first_output = blockIdx.x / plan.row_tiles * plan.lanes * EACH;
  const int first_step = blockIdx.y * plan.share;
  const auto count = static_cast<uint32_t>(p.pixels()), plane = static_cast<uint32_t>(p.plane());
  const auto width = static_cast<uint32_t>(p.width);
  const bool flat = p.is_flat_input() && (p.images == 1 || p.input_image == p.plane() * p.input_column);

  const auto output_of = [&](int of_lane, int i) {
    return first_output + (VECTORS ? of_lane * EACH + i : i * plan.lanes + of_lane);
  };
  const auto input_of = [&](uint32_t pixel) {
    if (flat) return input + pixel * p.input_column;
    const uint32_t image = pixel / plane, place = pixel - image * plane, row = place / width;
    return input + image * p.input_image + row * p.input_row + (place - row * width) * p.input_column;
  };
  // Rows that do not exist are zeros.
  const auto copy = [&](int n) {
    if (n < plan.share) {
      float4* const stage = shared + n % STAGES * STAGE;
      const uint32_t first = static_cast<uint32_t>(first_step + n) * plan.step_pixels;
      if constexpr (ROWS >= 4) {
        if (input_vectors) {
          for (int e = threadIdx.x; e < plan.step_pixels * (ROWS / 4); e += SUM_THREADS) {
            const uint32_t pixel = first + e / (ROWS / 4);
            const int row = first_row + e % (ROWS / 4) * 4;
            const bool exists = pixel < count && row < rows;
            copy_four(stage + e, exists ? input_of(pixel) + row : input, exists);
          }
          end_of_copies();
          return;
        }
      }
      for (int e = threadIdx.x; e < plan.step_pixels * ROWS; e += SUM_THREADS) {
        const uint32_t pixel = first + e / ROWS;
        const int row = first_row + e % ROWS;
        const bool exists = pixel < count && row < rows;
        copy_one(reinterpret_cast<float*>(stage) + e, exists ? input_of(pixel) + row * p.input_channel : input, exists);
      }
    }
    end_of_copies();
  };
  float sums[ROWS * EACH] = {}, next[EACH][EACH];
  // The next step to load: this thread's first pixel in it, and where its outputs lie.
  uint32_t ahead = static_cast<uint32_t>(first_step) * plan.step_pixels + slot;
  const float* of_ahead = grad_output + ahead * p.grad_column + (VECTORS ? min(output_of(lane, 0), outputs - EACH) : 0);
  const auto load = [&](int u) {
    const bool exists = ahead + u * slots < count;
    const float* const of_pixel = of_ahead + u * slots * p.grad_column;
    if constexpr (VECTORS) {
      float4 four{0, 0, 0, 0};
      if (exists) four = *reinterpret_cast<const float4*>(of_pixel);
      take(four, next[u]);
    } else {
#pragma unroll
      for (int i = 0; i < EACH; ++i) next[u][i] = exists ? of_pixel[min(output_of(lane, i), outputs - 1)] : 0;
    }
  };
  const auto advance = [&] {
    ahead += plan.step_pixels;
    of_ahead += plan.step_pixels * p.grad_column;
  };
  copy(0);
  copy(1);
#pragma unroll
  for (int u = 0; u < EACH; ++u) load(u);
  for (int n = 0; n < plan.share; ++n) {
    wait_for_copies<1>();
    __syncthreads();  // and nobody looks at step n - 1 any more, in whose place n + 2 comes
    copy(n + 2);
    advance();
    const float* const stage = reinterpret_cast<const float*>(shared + n % STAGES * STAGE) + slot * ROWS;
#pragma unroll
    for (int u = 0; u < EACH; ++u) {
      float grad[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) grad[i] = next[u][i];
      if (n + 1 < plan.share) load(u);
      const float* const x = stage + u * slots * ROWS;
      if constexpr (ROWS < 4) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int i = 0; i < EACH; ++i) sums[r * EACH + i] += x[r] * grad[i];
        }
      } else {
#pragma unroll
        for (int r = 0; r < ROWS; r += 4) {
          float four[4];
          take(*reinterpret_cast<const float4*>(x + r), four);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < EACH; ++i) sums[(r + j) * EACH + i] += four[j] * grad[i];
          }
        }
      }
    }
  }
  add_threads(sums, plan.lanes, reinterpret_cast<Scratch&>(shared), [&](int index, int of_lane, float sum) {
    const int row = first_row + index / EACH, output = output_of(of_lane, index % EACH);
    if (row < rows && output < outputs) {
      partial[(static_cast<int64_t>(row) * outputs + output) * gridDim.y + blockIdx.y] = sum;
    }
  });
}

// ---- host ---------------------------------------------------------------------------------------------------

constexpr bool all_by_four(std::initializer_list<int64_t> numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](int64_t number) { return number % 4 == 0; });
}

// Calls f.operator()<ROWS>().
template <class F>
void with_rows(int rows, const F& f) {
  switch (rows) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 4:
      return f.template operator()<4>();
    case 8:
      return f.template operator()<8>();
    default:
      return f.template operator()<16>();
  }
}

}  // namespace

bool sum_products(const Product& p, const Tensor& input, const Tensor& grad_output, const Tensor& result,
                  cudaStream_t stream) {
  const auto* x = static_cast<const float*>(input.const_data_ptr());
  const auto* dy = static_cast<const float*>(grad_output.const_data_ptr());
  const auto grid = [&](const auto& plan) {
    return dim3(static_cast<unsigned>(plan.row_tiles) * static_cast<unsigned>(plan.output_tiles),
                static_cast<unsigned>(plan.splits));
  };
  if (is_along_outputs(p)) {
    const RowPlan plan = plan_rows(p);
    const bool input_vectors =
        p.input_channel == 1 && is_aligned(x) && all_by_four({p.rows, p.input_image, p.input_row, p.input_column});
    const bool vectors = is_aligned(dy) && all_by_four({p.outputs, p.grad_column});
    in_two_stages<float>(result, plan.splits, stream, [&](float* partial) {
      with_rows(plan.rows, [&]<int ROWS>() {
        const auto kernel = vectors ? row_sums<ROWS, true> : row_sums<ROWS, false>;
        launch(kernel, grid(plan), SUM_THREADS, stream, x, dy, partial, p, plan, input_vectors);
      });
    });
    return true;
  }
  if (is_along_pixels(p)) {
    const PointPlan plan = plan_points(p);
    const bool vectors = is_aligned(x) && is_aligned(dy) && p.is_flat_input() && p.input_column == 1 &&
                         all_by_four({p.plane(), p.input_image, p.input_channel, p.grad_image, p.grad_channel});
    in_two_stages<float>(result, plan.parts(), stream, [&](float* partial) {
      with_rows(plan.rows, [&]<int ROWS>() {
        const auto kernel = vectors ? point_sums<ROWS, true> : point_sums<ROWS, false>;
        launch(kernel, grid(plan), static_cast<unsigned>(32 * plan.output_warps * plan.pixel_warps), stream, x, dy,
               partial, p, plan);
      });
    });
    return true;
  }
  return false;
}

}  // namespace trady::cuda
