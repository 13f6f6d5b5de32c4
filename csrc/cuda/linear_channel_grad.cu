// linear_channel_grad in float32: the rows of a 1x1 convolution in channels_last, of one image.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "launch.h"
#include "layout.h"
#include "sums.h"

namespace trady::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor linear_channel_grad(const Tensor& input_selected, const Tensor& grad_output) {
  const auto input = input_selected.sizes(), outputs = grad_output.sizes();
  const size_t dimensions = input.size();
  STD_TORCH_CHECK(dimensions >= 2 && outputs.size() == dimensions,
                  "linear_channel_grad: input_selected and grad_output have ", dimensions, " and ", outputs.size(),
                  " dimensions, expected (..., k) and (..., out_features), at least 2-D");
  Product p{};
  p.images = p.height = 1;
  p.width = 1;
  for (size_t d = 0; d + 1 < dimensions; ++d) {
    STD_TORCH_CHECK(input[d] == outputs[d], "linear_channel_grad: grad_output's size along dimension ", d, " is ",
                    outputs[d], ", expected ", input[d], ", that of input_selected");
    p.width *= input[d];
  }
  STD_TORCH_CHECK(input_selected.scalar_type() == ScalarType::Float && grad_output.scalar_type() == ScalarType::Float,
                  "linear_channel_grad: got ", torch::headeronly::toString(input_selected.scalar_type()), " and ",
                  torch::headeronly::toString(grad_output.scalar_type()),
                  ", expected float32: other dtypes have no kernel in CUDA C++");
  p.rows = input[dimensions - 1];
  p.outputs = outputs[dimensions - 1];

  const OnDeviceOf device(input_selected);
  check_device_of(input_selected, grad_output, "grad_output");
  const std::vector<int64_t> shape{p.rows, p.outputs};
  if (p.rows == 0 || grad_output.numel() == 0) return torch::stable::new_zeros(grad_output, shape, ScalarType::Float);
  const Tensor x = torch::stable::contiguous(input_selected), dy = torch::stable::contiguous(grad_output);
  p.input_channel = p.grad_channel = 1;
  p.input_column = p.rows;
  p.grad_column = p.outputs;
  const Tensor result = new_empty(grad_output, shape, ScalarType::Float);
  STD_TORCH_CHECK(sum_products(p, x, dy, result, device.stream), "linear_channel_grad: got ", p.width,
                  " rows, expected fewer than 2^30");
  return result;
}

}  // namespace
}  // namespace trady::cuda

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("linear_channel_grad", TORCH_BOX(&trady::cuda::linear_channel_grad));
}
