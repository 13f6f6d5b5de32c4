// What every CUDA operator needs around its launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

// Device assertions are how indices on the GPU are checked: they stay in release builds.
#undef NDEBUG
#include <cassert>

namespace trady {

// Makes the tensor's device current while it lives; `stream` is torch's current stream there, never the default one.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

}  // namespace trady
