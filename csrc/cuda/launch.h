// What every CUDA operator needs around its launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

// Device assertions are how indices on the GPU are checked: they stay in release builds.
#undef NDEBUG
#include <cassert>

// The library that the operators of this folder join, and for which device. Tests run them on the CPU, in one of their
// own.
#ifndef TRADY_LIBRARY
#define TRADY_LIBRARY trady
#define TRADY_DISPATCH_KEY CUDA
#endif

namespace trady {

// Makes the tensor's device current while it lives; `stream` is torch's current stream there, never the default one.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
                    "no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

// Refuses an argument on another device than `first`, which a kernel would read all the same, or fault on.
inline void check_device_of(const torch::stable::Tensor& first, const torch::stable::Tensor& argument,
                            const char* name) {
  STD_TORCH_CHECK(argument.device() == first.device(), name,
                  ": got a tensor on another device, expected the device of the first argument");
}

// One launch; what goes wrong with it is raised here, what goes wrong in the kernel at a later call.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// From compute capability 9 on a kernel can start while the one before it on the stream ends, which hides most of a
// launch: every block of the one before says that the next may start, and the next waits, before its first look at
// memory, until the one before has written all of its own.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of a kernel that calls wait_for_previous(), after one whose blocks call let_next_start().
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                  const Arguments&... arguments) {
  cudaFuncAttributes code{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &early;
  // Code that was compiled for an older GPU does not wait, on a newer one either.
  config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace trady
