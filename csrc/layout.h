// Allocation of results, and the one rule by which an operator decides their memory format; the same as in
// trady_kernels/ops/layout.py. For the CPU and the CUDA operators.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace trady {

inline bool is_channels_last(const torch::stable::Tensor& input) {
  return input.dim() == 4 && input.stride(1) == 1 && input.stride(3) != 1;
}

// Through torch's own allocator and dispatcher, so that deterministic mode fills it.
inline torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, torch::headeronly::ScalarType dtype,
                                   torch::stable::Device device, bool channels_last = false) {
  return torch::stable::empty(
      shape, dtype, torch::headeronly::Layout::Strided, device, std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace trady
