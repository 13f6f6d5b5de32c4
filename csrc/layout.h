// Allocation of results, and the one rule by which an operator decides their memory format; the same as in
// trady_kernels/ops/layout.py. For the CPU and the CUDA operators.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace trady {

inline bool is_channels_last(const torch::stable::Tensor& input) {
  return input.dim() == 4 && input.stride(1) == 1 && input.stride(3) != 1;
}

// Whether the elements fill a block of memory without gaps or overlaps, in any order of the dimensions.
inline bool is_dense(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dimensions.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return tensor.numel() == 0;
    expected *= size;
  }
  return true;
}

// Through torch's own allocator and dispatcher, so that deterministic mode fills it.
inline torch::stable::Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, torch::headeronly::ScalarType dtype,
                                   torch::stable::Device device, bool channels_last = false) {
  return torch::stable::empty(
      shape, dtype, torch::headeronly::Layout::Strided, device, std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

// Contiguous, on the device of `like`. What torch::stable's own does since 2.10 looks the operator up by its name at
// every call, and costs as much as a small kernel.
inline torch::stable::Tensor new_empty(const torch::stable::Tensor& like,
                                       torch::headeronly::IntHeaderOnlyArrayRef shape,
                                       torch::headeronly::ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()), &type,
                                                   &layout, &device_type, like.get_device_index(), nullptr, &result));
  return torch::stable::Tensor(result);
}

}  // namespace trady
