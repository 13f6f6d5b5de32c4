// conv2d_channel_grad: checks, allocation, registration.
#include "conv2d_channel_grad.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "conv2d_checks.h"
#include "dtype.h"
#include "layout.h"
#include "parallel.h"
#include "scratch.h"
#include "squares.h"

namespace trady {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<ChannelRun> runs_of(const int64_t* channels, int64_t stride, int64_t selected, int64_t in_channels,
                                int64_t groups) {
  const int64_t in_per_group = in_channels / groups;
  std::vector<ChannelRun> runs;
  for (int64_t i = 0; i < selected; i++, channels += stride) {
    STD_TORCH_CHECK(*channels >= 0 && *channels < in_channels, "channels: got index ", *channels,
                    ", expected 0 <= index < in_channels = ", in_channels);
    const int64_t group = *channels / in_per_group;
    if (runs.empty() || runs.back().group != group) runs.push_back({i, i, group});
    runs.back().end = i + 1;
  }
  return runs;
}

// to = the sum of the slices, in order; `to` may be the first of them.
template <class T>
void add_slices(const Conv2dChannelGrad& q, int64_t elements, const T* partial, T* to) {
  parallel_for(elements, q.slices, [&](int64_t begin, int64_t end) {
    if (to != partial) std::memcpy(to + begin, partial + begin, (end - begin) * sizeof(T));
    for (int64_t slice = 1; slice < q.slices; slice++) {
      const T* from = partial + slice * elements;
      for (int64_t i = begin; i < end; i++) to[i] += from[i];
    }
  });
}

// The sums, as a loop has laid them out, as `sizes` (k, C'/groups, kh, kw).
template <class T>
void copy_sums(const Conv2dChannelGrad& q, const int64_t (&sizes)[4], const T* sums, T* out) {
  const int64_t channels = sizes[0], outputs = sizes[1], taps = sizes[2] * sizes[3], size = outputs * taps;
  if (q.sum_stride[1] != 1) {  // lanes were channels
    const auto copy = TRADY_KERNEL(conv2d_channel_grad_copy_sums);
    constexpr int64_t TOGETHER = 16;
    parallel_for((channels + TOGETHER - 1) / TOGETHER, TOGETHER * size, [&](int64_t begin, int64_t end) {
      copy(sums, sizes, begin * TOGETHER, std::min(channels, end * TOGETHER), q.dtype, out);
    });
    return;
  }
  parallel_for(channels, size, [&](int64_t begin, int64_t end) {
    T* to = out + begin * size;
    for (int64_t c = begin; c < end; c++)
      for (int64_t o = 0; o < outputs; o++)
        for (int64_t tap = 0; tap < taps; tap++) *to++ = sums[(c * taps + tap) * outputs + o];
  });
}
// Whether they already lie so.
bool sums_in_order(const Conv2dChannelGrad& q, const int64_t (&sizes)[4]) {
  int64_t stride = 1;
  for (int axis = 3; axis >= 0; axis--) {
    if (sizes[axis] > 1 && q.sum_stride[axis] != stride) return false;
    stride *= sizes[axis];
  }
  return true;
}

// The weight gradient, and where `bias` is given that of the bias too, from the same pass.
Tensor gradients(const Tensor& input_selected, const Tensor& grad_output, const Tensor& channels, int64_t in_channels,
                 const std::vector<int64_t>& geometry, int64_t groups, Tensor* bias) {
  check_conv2d_channel_grad(input_selected, grad_output, channels, in_channels, geometry, groups);
  const auto input = input_selected.sizes(), outputs = grad_output.sizes();
  const int64_t *kernel_size = geometry.data(), *stride = kernel_size + 2, *padding = stride + 2,
                *dilation = padding + 2;

  Conv2dChannelGrad q{};
  q.dtype = dtype_of(input_selected, "input_selected");
  const bool wide = q.dtype == Dtype::float64;
  q.selected = input[1];
  q.groups = groups;
  q.out_per_group = outputs[1] / groups;
  const int64_t shape[]{q.selected, q.out_per_group, kernel_size[0], kernel_size[1]};
  const auto accumulate = wide ? ScalarType::Double : ScalarType::Float;
  if (q.selected == 0 || grad_output.numel() == 0) {
    if (bias) *bias = torch::stable::new_zeros(grad_output, std::vector<int64_t>{q.out_per_group}, accumulate);
    return torch::stable::new_zeros(grad_output, shape, accumulate);
  }
  Tensor out = new_empty(grad_output, shape, accumulate);

  const std::vector<ChannelRun> runs = runs_of(static_cast<const int64_t*>(channels.const_data_ptr()),
                                               channels.stride(0), q.selected, in_channels, groups);
  q.runs = runs.data();
  q.run_count = static_cast<int64_t>(runs.size());
  q.input = input_selected.const_data_ptr();
  q.grad_output = grad_output.const_data_ptr();
  q.batch = input[0];
  q.height = input[2];
  q.width = input[3];
  q.out_height = outputs[2];
  q.out_width = outputs[3];
  std::ranges::copy(input_selected.strides(), q.input_stride);
  std::ranges::copy(grad_output.strides(), q.grad_stride);
  for (int axis = 0; axis < 2; axis++) {
    q.kernel[axis] = kernel_size[axis];
    q.stride[axis] = stride[axis];
    q.padding[axis] = padding[axis];
    q.dilation[axis] = dilation[axis];
  }
  q.with_bias = bias != nullptr;
  const auto loop = plan(q);

  const int64_t taps = kernel_size[0] * kernel_size[1], elements = q.selected * q.out_per_group * taps;
  const bool in_order = sums_in_order(q, shape), in_place = q.slices == 1 && in_order;
  Tensor partial = in_place ? out : new_empty(grad_output, {q.slices, elements}, accumulate);
  void* sums = partial.mutable_data_ptr();
  Tensor bias_partial;
  if (bias) {
    *bias = new_empty(grad_output, {q.out_per_group}, accumulate);
    bias_partial = q.slices == 1 ? *bias : new_empty(grad_output, {q.slices, q.out_per_group}, accumulate);
    q.bias = bias_partial.mutable_data_ptr();
  }
  const int64_t cost = q.batch * q.out_height * q.out_width * elements / q.tasks;
  parallel_for(q.tasks, cost, [&](int64_t begin, int64_t end) {
    void* room = scratch(q.scratch * (wide ? sizeof(double) : sizeof(float)));
    for (int64_t task = begin; task < end; task++) loop(q, task, sums, room);
  });
  const auto finish = [&](auto zero) {
    using T = decltype(zero);
    T *first = static_cast<T*>(sums), *result = static_cast<T*>(out.mutable_data_ptr());
    if (q.slices > 1) add_slices(q, elements, first, in_order ? result : first);
    if (!in_order) copy_sums(q, shape, first, result);
    if (!bias || q.slices == 1) return;
    const T* from = static_cast<const T*>(q.bias);
    T* to = static_cast<T*>(bias->mutable_data_ptr());
    for (int64_t o = 0; o < q.out_per_group; o++) to[o] = from[o];
    for (int64_t slice = 1; slice < q.slices; slice++)
      for (int64_t o = 0; o < q.out_per_group; o++) to[o] += from[slice * q.out_per_group + o];
  };
  if (wide)
    finish(double{});
  else
    finish(float{});
  return out;
}

Tensor conv2d_channel_grad(Tensor input_selected, Tensor grad_output, Tensor channels, int64_t in_channels,
                           std::vector<int64_t> geometry, int64_t groups) {
  return gradients(input_selected, grad_output, channels, in_channels, geometry, groups, nullptr);
}

std::tuple<Tensor, Tensor> conv2d_channel_grad_with_bias(Tensor input_selected, Tensor grad_output, Tensor channels,
                                                         int64_t in_channels, std::vector<int64_t> geometry,
                                                         int64_t groups) {
  STD_TORCH_CHECK(groups == 1 && channels.numel() > 0,
                  "conv2d_channel_grad_with_bias: expected groups = 1 and at least one channel, got groups = ", groups,
                  " and ", channels.numel(), " channels");
  Tensor bias;
  Tensor grad = gradients(input_selected, grad_output, channels, in_channels, geometry, groups, &bias);
  return {grad, bias};
}

Tensor conv2d_channel_grad_squares(Tensor input_selected, Tensor grad_output, Tensor channels, int64_t in_channels,
                                   std::vector<int64_t> geometry, int64_t groups) {
  STD_TORCH_CHECK(input_selected.dim() == 4 && channels.dim() == 1 && channels.size(0) == input_selected.size(1),
                  "channels: expected one index for each channel of input_selected");
  return squares_of_rows(
      grad_output, channels.size(0), accumulate_type(grad_output), [&](int64_t first, int64_t count) {
        return gradients(torch::stable::narrow(input_selected, 1, first, count), grad_output,
                         torch::stable::narrow(channels, 0, first, count), in_channels, geometry, groups, nullptr);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) {
  m.impl("conv2d_channel_grad", TORCH_BOX(&conv2d_channel_grad));
  m.impl("conv2d_channel_grad_with_bias", TORCH_BOX(&conv2d_channel_grad_with_bias));
  m.impl("conv2d_channel_grad_squares", TORCH_BOX(&conv2d_channel_grad_squares));
}

}  // namespace trady
