// How gradients are summed over the pixels of a batch: threads add up what they have, blocks write parts, and a second
// kernel adds those in a fixed order. And copies into shared memory that a thread does not wait for.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "launch.h"
#include "layout.h"
#include "products.h"

namespace trady::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

// Adds up `sums` of the threads that are equal modulo `lanes`, a power of two up to 32, in a fixed order, and hands
// them to store(index, lane, sum). All threads of the block call it; nobody else uses `scratch` by then.
constexpr int SUMS_TOGETHER = 9;
template <int COUNT, int MOST_WARPS, class Sum, class Store>
__device__ __forceinline__ void add_threads(const Sum (&sums)[COUNT], int lanes,
                                            Sum (&scratch)[MOST_WARPS][SUMS_TOGETHER][32], const Store& store) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int base = 0; base < COUNT; base += SUMS_TOGETHER) {
    Sum of_warp[SUMS_TOGETHER];
    const int count = min(SUMS_TOGETHER, COUNT - base);
#pragma unroll
    for (int i = 0; i < count; ++i) of_warp[i] = sums[base + i];
    for (int apart = 16; apart >= lanes; apart /= 2) {
#pragma unroll
      for (int i = 0; i < count; ++i) of_warp[i] += __shfl_xor_sync(ALL_LANES, of_warp[i], apart);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (lane < lanes) scratch[warp][i][lane] = of_warp[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * lanes; i += blockDim.x) {
      Sum sum = scratch[0][i / lanes][i % lanes];
#pragma unroll
      for (int w = 1; w < MOST_WARPS; ++w) {
        if (w < warps) sum += scratch[w][i / lanes][i % lanes];
      }
      store(base + i / lanes, i % lanes, sum);
    }
  }
}

// Adds up each of `values` over the warp, in a fixed order: lanes exchange halves of what they hold until each has one
// part of them alone, and then add up what several have. Returns the first that this lane has the sum of.
template <int HELD, int APART = 16, int COUNT>
__device__ __forceinline__ int add_lanes(float (&values)[COUNT], int lane) {
  if constexpr (APART == 0) {
    return 0;
  } else if constexpr (HELD == 1) {
    values[0] += __shfl_xor_sync(ALL_LANES, values[0], APART);
    return add_lanes<1, APART / 2>(values, lane);
  } else {
    constexpr int HALF = HELD / 2;
    const bool upper = lane & APART;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float kept = upper ? values[i + HALF] : values[i], given = upper ? values[i] : values[i + HALF];
      values[i] = kept + __shfl_xor_sync(ALL_LANES, given, APART);
    }
    return (upper ? HALF : 0) + add_lanes<HALF, APART / 2>(values, lane);
  }
}

// A vector, of which the first `bytes`, an even number, are read: memory may end there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_later(uint4* shared, const uint4* global, unsigned bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_later(float* shared, const float* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
}
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Of this thread; those of the last groups may still be under way.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(GROUPS) : "memory");
}
#else
__device__ __forceinline__ void copy_later(uint4* shared, const uint4* global, unsigned bytes) {
  if (bytes == VECTOR_BYTES) {
    *shared = *global;
    return;
  }
  for (unsigned i = 0; i < bytes / sizeof(uint16_t); ++i) {
    reinterpret_cast<uint16_t*>(shared)[i] = reinterpret_cast<const uint16_t*>(global)[i];
  }
}
__device__ __forceinline__ void copy_later(float* shared, const float* global) { *shared = *global; }
__device__ __forceinline__ void end_of_copies() {}
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {}
#endif

// A row of threads, up to a warp and a power of two, for each element, whose parts lie side by side. They are not
// __restrict__: the kernel that writes them may still run when this one starts.
constexpr int PARTS_TOGETHER = 16;  // loads on their way
template <class Sum>
__global__ void add_parts(const Sum* partial, Sum* out, int64_t elements, int parts) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int adders = static_cast<int>(blockDim.x);
  Sum sum = 0;
  wait_for_previous();
  if (element < elements) {
    partial += element * parts;
    for (int part = static_cast<int>(threadIdx.x); part < parts; part += PARTS_TOGETHER * adders) {
      Sum of_part[PARTS_TOGETHER];
#pragma unroll
      for (int i = 0; i < PARTS_TOGETHER; ++i) {
        const int there = part + i * adders;
        of_part[i] = there < parts ? partial[there] : 0;
      }
#pragma unroll
      for (int i = 0; i < PARTS_TOGETHER; ++i) sum += of_part[i];
    }
  }
  for (int apart = adders / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, apart);
  if (threadIdx.x == 0 && element < elements) out[element] = sum;
}

// Runs first(buffer) with room for `parts` of the result, and adds them up.
template <class Sum, class First>
void in_two_stages(const torch::stable::Tensor& result, int64_t parts, cudaStream_t stream, const First& first) {
  auto* out = static_cast<Sum*>(result.mutable_data_ptr());
  if (parts == 1) return first(out);
  const int64_t elements = result.numel();
  const torch::stable::Tensor partial = new_empty(result, std::vector<int64_t>{elements, parts}, result.scalar_type());
  first(static_cast<Sum*>(partial.mutable_data_ptr()));
  unsigned adders = 1;
  while (adders < 32 && adders < parts) adders *= 2;
  const dim3 block(adders, SUM_THREADS / adders);
  launch_early(add_parts<Sum>, static_cast<unsigned>(ceil_div(elements, block.y)), block, stream,
               static_cast<const Sum*>(partial.const_data_ptr()), out, elements, parts);
}

// The kernels of products.cu, of float32. False where the strides are none that they take, and nothing was done.
bool sum_products(const Product& p, const torch::stable::Tensor& input, const torch::stable::Tensor& grad_output,
                  const torch::stable::Tensor& result, cudaStream_t stream);

}  // namespace trady::cuda
