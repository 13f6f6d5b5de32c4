// Stands in for CUDA's own header: the kernels of csrc/cuda then compile with a C++ compiler and run on the CPU, where
// tests reach every index they compute on a machine without a GPU.
//
// The blocks of a grid run one after another, the threads of a block as fibers that take turns at barriers:
// __syncthreads() and the operations of a warp. What a GPU leaves open is made unfavourable: blocks run last first, and
// threads in ascending order in one block, in descending order in the next, so that a result which depends on the
// order, or on a barrier that is missing, comes out wrong. A barrier that some threads never reach ends the process
// with a message. Of the language there is what csrc/cuda uses; shared memory is static only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = struct Stream*;
constexpr cudaError_t cudaSuccess = 0;

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

struct cudaFuncAttributes {
  int ptxVersion = 0;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {};
  return cudaSuccess;
}

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_host {

// Ends the turn until every thread of the block, or every lane of `mask` in the warp, has come here.
void wait_for_block();
void wait_for_warp(unsigned mask);
// Gives 8 bytes to the other lanes of the warp and takes those of `lane`, after all of `mask` have given theirs.
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane);
unsigned lane_id();
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);

template <class Value>
Value shuffle(unsigned mask, Value value, unsigned lane) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(Value));
  bits = exchange(mask, bits, lane);
  std::memcpy(&value, &bits, sizeof(Value));
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::wait_for_warp(mask); }

// As on a GPU, a lane beyond the group of `width` gives back the value of the lane that asks.
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  const unsigned lane = cuda_on_host::lane_id(), group = lane & ~(width - 1u);
  return cuda_on_host::shuffle(mask, value, group + (source & (width - 1)));
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  const unsigned lane = cuda_on_host::lane_id(), end = (lane & ~(width - 1u)) + width;
  return cuda_on_host::shuffle(mask, value, lane + delta < end ? lane + delta : lane);
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes, int width = 32) {
  const unsigned lane = cuda_on_host::lane_id(), end = (lane & ~(width - 1u)) + width;
  return cuda_on_host::shuffle(mask, value, (lane ^ lanes) < end ? lane ^ lanes : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned ballot = 0;
  const uint64_t mine = predicate != 0;
  // One exchange a lane: every lane sees each of the others' votes.
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (cuda_on_host::exchange(mask, mine, lane) && (mask >> lane & 1)) ballot |= 1u << lane;
  }
  return ballot;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class Value>
Value __ldg(const Value* address) {
  return *address;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
using std::max;
using std::min;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  cuda_on_host::run(config->gridDim, config->blockDim, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
