#include "linear_channel_grad.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dtype.h"
#include "layout.h"
#include "parallel.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// (..., n) as (rows, n) with adjacent elements in a row; copies only what is laid out otherwise.
Tensor as_rows(const Tensor& tensor) {
  const Tensor rows = tensor.dim() == 2 ? tensor : torch::stable::flatten(tensor, 0, -2);
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : torch::stable::contiguous(rows);
}

Tensor linear_channel_grad(const Tensor& input_selected, const Tensor& grad_output) {
  STD_TORCH_CHECK(input_selected.dim() >= 2 && grad_output.dim() == input_selected.dim(), "grad_output: got ",
                  grad_output.dim(), " dimensions, expected those of input_selected, at least 2");
  const auto dtype = dtype_of(grad_output, "grad_output");
  const auto accumulate = accumulate_type(grad_output);
  const Tensor dy = as_rows(grad_output);
  // x is small beside dy: widened once, not in the loop.
  const Tensor x = as_rows(input_selected.scalar_type() == accumulate ? input_selected
                                                                      : torch::stable::to(input_selected, accumulate));
  const int64_t rows = dy.size(0), k = x.size(1), out_features = dy.size(1);
  STD_TORCH_CHECK(x.size(0) == rows, "grad_output: got ", rows, " rows, expected ", x.size(0));

  Tensor grad = empty({k, out_features}, accumulate, grad_output.device());
  if (rows == 0) return torch::stable::zero_(grad);
  if (k == 0 || out_features == 0) return grad;

  // Outputs are split among threads first; rows only where outputs are few, in parts that the shape alone decides.
  constexpr int64_t WIDTH = 128, WANTED = 16;
  const int64_t columns = (out_features + WIDTH - 1) / WIDTH;
  const int64_t cycles_per_row = std::min(out_features, WIDTH) * (k + 2) / 16;
  const int64_t parts = reduction_parts(rows, cycles_per_row * columns, (WANTED + columns - 1) / columns);
  const Tensor sums = parts == 1 ? grad : empty({parts, k, out_features}, accumulate, grad_output.device());

  const LinearChannelGrad a{x.const_data_ptr(), dy.const_data_ptr(), k, out_features, x.stride(0), dy.stride(0), dtype};
  const int64_t size = k * out_features;
  const bool float64 = dtype == Dtype::float64;
  auto* target = static_cast<char*>(sums.mutable_data_ptr());
  const auto kernel = TRADY_KERNEL(linear_channel_grad);
  parallel_for(parts * columns, rows / parts * cycles_per_row, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {
      const int64_t part = item / columns, next = std::min(end, (part + 1) * columns);
      kernel(a, target + part * size * (float64 ? 8 : 4), part_begin(rows, parts, part),
             part_begin(rows, parts, part + 1), item % columns * WIDTH,
             std::min(out_features, (item % columns + next - item) * WIDTH));
      item = next;
    }
  });
  if (parts > 1) {
    const auto add = TRADY_KERNEL(sum_parts);
    parallel_for(size, parts, [&](int64_t begin, int64_t end) {
      add(target, parts, size, grad.mutable_data_ptr(), begin, end, float64);
    });
  }
  return grad;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) { m.impl("linear_channel_grad", TORCH_BOX(&trady::linear_channel_grad)); }
