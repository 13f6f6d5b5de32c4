// linear_channel_grad: in float32 the rows of a 1x1 convolution in channels_last, of one image.
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
  const ScalarType dtype = input_selected.scalar_type();
  STD_TORCH_CHECK(dtype == grad_output.scalar_type(), "linear_channel_grad: grad_output has dtype ",
                  torch::headeronly::toString(grad_output.scalar_type()), ", expected ",
                  torch::headeronly::toString(dtype), ", that of input_selected");
  const ScalarType accumulate = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  p.rows = input[dimensions - 1];
  p.outputs = outputs[dimensions - 1];

  const OnDeviceOf device(input_selected);
  check_device_of(input_selected, grad_output, "grad_output");
  const std::vector<int64_t> shape{p.rows, p.outputs};
  if (p.rows == 0 || grad_output.numel() == 0) return torch::stable::new_zeros(grad_output, shape, accumulate);
  const Tensor x = torch::stable::contiguous(input_selected), dy = torch::stable::contiguous(grad_output);
  if (dtype == ScalarType::Float) {
    p.input_channel = p.grad_channel = 1;
    p.input_column = p.rows;
    p.grad_column = p.outputs;
    const Tensor result = new_empty(grad_output, shape, accumulate);
    if (sum_products(p, x, dy, result, device.stream)) return result;
  }
  // What nothing here is for: other dtypes, widened, and more rows than 32 bits count.
  const Tensor rows = torch::stable::view(x, {p.width, p.rows}),
               of_rows = torch::stable::view(dy, {p.width, p.outputs});
  return torch::stable::matmul(torch::stable::transpose(torch::stable::to(rows, accumulate), 0, 1),
                               torch::stable::to(of_rows, accumulate));
}

}  // namespace
}  // namespace trady::cuda

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("linear_channel_grad", TORCH_BOX(&trady::cuda::linear_channel_grad));
}
