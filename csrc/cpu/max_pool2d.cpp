#include "max_pool2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "dtype.h"
#include "layout.h"
#include "parallel.h"

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace trady {
namespace {

using Pair = std::vector<int64_t>;

int64_t pooled_size(const MaxPool2d& pool, int axis, bool ceil_mode) {
  const int64_t size = pool.size[axis], stride = pool.stride[axis], padding = pool.padding[axis];
  const int64_t reach = size + 2 * padding - pool.dilation[axis] * (pool.kernel[axis] - 1) - 1;
  if (!ceil_mode) return reach / stride + 1;
  const int64_t count = (reach + stride - 1) / stride + 1;
  return (count - 1) * stride >= size + padding ? count - 1 : count;  // none begins behind the input
}

MaxPool2d pool_of(const Tensor& images, const Pair& size, const Pair& kernel_size, const Pair& stride,
                  const Pair& padding, const Pair& dilation) {
  MaxPool2d pool{};
  pool.dtype = dtype_of(images, "input");
  pool.channels = images.size(1);
  for (int axis : {0, 1}) {
    pool.size[axis] = size[axis];
    pool.kernel[axis] = kernel_size[axis];
    pool.stride[axis] = stride[axis];
    pool.padding[axis] = padding[axis];
    pool.dilation[axis] = dilation[axis];
  }
  return pool;
}

Tensor in_format(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// With the innermost dimension of the format adjacent; the others as they come.
Tensor readable(const Tensor& tensor, bool channels_last) {
  const int innermost = channels_last ? 1 : 3;
  return tensor.stride(innermost) == 1 || tensor.size(innermost) == 1 ? tensor : in_format(tensor, channels_last);
}

Images images_of(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

// Whether the backward adds each window's gradient to its winner, one by one, instead of asking for each vector of the
// input which of its windows it won; sums of the half types have to be rounded one by one. The rest is measured, with
// AVX-512 on one thread.
bool scatters(const MaxPool2d& pool, bool channels_last) {
  int64_t windows = 1;  // that hold an element
  for (int axis : {0, 1}) windows *= (pool.kernel[axis] + pool.stride[axis] - 1) / pool.stride[axis];
  const bool half = pool.dtype == Dtype::bfloat16 || pool.dtype == Dtype::float16;
  return windows > (half ? 1 : 9) || (!channels_last && pool.size[1] < (half ? 100 : 48));
}

std::tuple<Tensor, Tensor> max_pool2d_offsets(const Tensor& input, Pair kernel_size, Pair stride, Pair padding,
                                              Pair dilation, bool ceil_mode) {
  const int64_t batch = input.size(0), channels = input.size(1);
  MaxPool2d pool = pool_of(input, {input.size(2), input.size(3)}, kernel_size, stride, padding, dilation);
  for (int axis : {0, 1}) pool.out_size[axis] = pooled_size(pool, axis, ceil_mode);
  const bool channels_last = is_channels_last(input);
  const Pair shape{batch, channels, pool.out_size[0], pool.out_size[1]};
  Tensor output = empty(shape, input.scalar_type(), input.device(), channels_last);
  Tensor offsets = empty(shape, ScalarType::Byte, input.device(), channels_last);
  if (output.numel() == 0) return {output, offsets};

  const Tensor source = readable(input, channels_last);
  const Images images = images_of(source);
  void* values = output.mutable_data_ptr();
  auto* winners = static_cast<uint8_t*>(offsets.mutable_data_ptr());
  const int64_t window = pool.kernel[0] * pool.kernel[1];
  if (channels_last) {
    const auto kernel = TRADY_KERNEL(max_pool2d_rows);
    parallel_for(batch * pool.out_size[0], channels * pool.out_size[1] * window,
                 [&](int64_t begin, int64_t end) { kernel(pool, images, values, winners, begin, end); });
  } else {
    const auto kernel = TRADY_KERNEL(max_pool2d_planes);
    const int64_t bytes = TRADY_KERNEL(max_pool2d_scratch)(pool);
    parallel_for(batch * channels, pool.out_size[0] * pool.out_size[1] * window, [&](int64_t begin, int64_t end) {
      std::vector<char> scratch(bytes);
      kernel(pool, images, values, winners, begin, end, scratch.data());
    });
  }
  return {output, offsets};
}

Tensor max_pool2d_offsets_backward(const Tensor& grad_output, const Tensor& offsets, Pair input_size, Pair kernel_size,
                                   Pair stride, Pair padding, Pair dilation) {
  const int64_t batch = offsets.size(0), channels = offsets.size(1);
  MaxPool2d pool = pool_of(grad_output, input_size, kernel_size, stride, padding, dilation);
  for (int axis : {0, 1}) pool.out_size[axis] = offsets.size(axis + 2);
  const bool channels_last = is_channels_last(offsets);
  Tensor grad_input = empty(Pair{batch, channels, pool.size[0], pool.size[1]}, grad_output.scalar_type(),
                            grad_output.device(), channels_last);
  if (grad_input.numel() == 0) return grad_input;

  const Tensor source = readable(grad_output, channels_last), places = in_format(offsets, channels_last);
  const Images images = images_of(source);
  const auto* winners = static_cast<const uint8_t*>(places.const_data_ptr());
  void* values = grad_input.mutable_data_ptr();
  if (scatters(pool, channels_last)) {
    const auto kernel = TRADY_KERNEL(max_pool2d_backward_scatter);
    const int64_t items = batch * (channels_last ? 1 : channels);
    parallel_for(items, grad_input.numel() / items,
                 [&](int64_t begin, int64_t end) { kernel(pool, images, winners, values, channels_last, begin, end); });
    return grad_input;
  }
  const auto kernel = channels_last ? TRADY_KERNEL(max_pool2d_backward_rows) : TRADY_KERNEL(max_pool2d_backward_planes);
  const int64_t bytes = TRADY_KERNEL(max_pool2d_backward_scratch)(pool);
  const int64_t items = channels_last ? pool.size[0] : channels;
  parallel_for(batch * items, grad_input.numel() / (batch * items), [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(bytes);
    kernel(pool, images, winners, values, begin, end, scratch.data());
  });
  return grad_input;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) {
  m.impl("max_pool2d_offsets", TORCH_BOX(&trady::max_pool2d_offsets));
  m.impl("max_pool2d_offsets_backward", TORCH_BOX(&trady::max_pool2d_offsets_backward));
}
