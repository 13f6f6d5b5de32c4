// What conv2d_channel_grad asks of its arguments, on the CPU and with CUDA alike: a kernel may run before Python has
// looked at them, and would read past what it was given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace trady {

// geometry: kernel_size, stride, padding and dilation, each (height, width).
inline void check_conv2d_channel_grad(const torch::stable::Tensor& input_selected,
                                      const torch::stable::Tensor& grad_output, const torch::stable::Tensor& channels,
                                      int64_t in_channels, const std::vector<int64_t>& geometry, int64_t groups) {
  const auto input = input_selected.sizes(), outputs = grad_output.sizes();
  STD_TORCH_CHECK(input.size() == 4 && outputs.size() == 4, "conv2d_channel_grad: input_selected and grad_output have ",
                  input.size(), " and ", outputs.size(),
                  " dimensions, expected (N, k, H, W) and (N, out_channels, H', W')");
  STD_TORCH_CHECK(channels.dim() == 1 && channels.scalar_type() == torch::headeronly::ScalarType::Long &&
                      channels.size(0) == input[1],
                  "conv2d_channel_grad: channels must be a 1-D int64 tensor with one index for each of the ", input[1],
                  " channels of input_selected");
  STD_TORCH_CHECK(input_selected.scalar_type() == grad_output.scalar_type(),
                  "conv2d_channel_grad: grad_output must have the dtype of input_selected");
  STD_TORCH_CHECK(geometry.size() == 8,
                  "conv2d_channel_grad: kernel_size, stride, padding and dilation must be pairs (height, width)");
  STD_TORCH_CHECK(groups > 0 && in_channels % groups == 0 && outputs[1] % groups == 0,
                  "conv2d_channel_grad: groups = ", groups, " must divide in_channels = ", in_channels,
                  " and grad_output's channels = ", outputs[1]);
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t kernel = geometry[axis], stride = geometry[2 + axis], padding = geometry[4 + axis],
                  dilation = geometry[6 + axis];
    STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0 && padding >= 0,
                    "conv2d_channel_grad: kernel_size, stride and dilation must be positive, padding not negative");
    const int64_t room = input[axis + 2] + 2 * padding - dilation * (kernel - 1) - 1;
    STD_TORCH_CHECK(input[0] == outputs[0] && room >= 0 && outputs[axis + 2] == room / stride + 1,
                    "conv2d_channel_grad: grad_output's size along dimension ", axis + 2, " is ", outputs[axis + 2],
                    ", which is not what this convolution gives for input_selected, batch ", input[0]);
  }
}

}  // namespace trady
