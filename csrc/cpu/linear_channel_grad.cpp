#include "linear_channel_grad.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "conv2d_channel_grad.h"
#include "dtype.h"
#include "layout.h"
#include "parallel.h"
#include "scratch.h"
#include "squares.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// (..., n) as (rows, n) with adjacent elements in a row; copies only what is laid out otherwise.
Tensor as_rows(const Tensor& tensor) {
  const Tensor rows = tensor.dim() == 2 ? tensor : torch::stable::flatten(tensor, 0, -2);
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : torch::stable::contiguous(rows);
}

// Sums over rows are cut into parts, and the result into blocks, by the shape alone.
struct Cut {
  int64_t columns, column_width;  // of outputs
  int64_t blocks, block_groups;   // of features
  int64_t parts;                  // of the rows, each summed by itself; only where the result alone is too few blocks
};

Cut cut(const LinearChannelGrad& a, int64_t cycles_per_row) {
  // A part costs one more result written and read: it has to be worth that.
  constexpr int64_t WIDTH = 128, GROUPS = 8, WANTED = 16, PART_ROWS = 128;
  Cut result{};
  result.column_width = a.packs ? BLOCK_OUTPUTS : WIDTH;
  result.columns = (a.out_features + result.column_width - 1) / result.column_width;
  result.block_groups = std::min(a.groups, GROUPS);
  result.blocks = (a.groups + result.block_groups - 1) / result.block_groups;
  const int64_t items = result.columns * result.blocks;
  result.parts = reduction_parts((a.rows + 1) / 2, 2 * cycles_per_row,
                                 std::min((WANTED + items - 1) / items, std::max<int64_t>(1, a.rows / PART_ROWS)));
  return result;
}

// By matrix tiles, on CPUs that have them and where they pay: a 1x1 convolution of one image whose pixels are the rows.
bool by_tiles(const LinearChannelGrad& a, const Tensor& grad) {
  Conv2dChannelGrad q{};
  const ChannelRun all{0, a.k, 0};
  q.input = a.x;
  q.grad_output = a.dy;
  q.dtype = a.dtype;
  q.batch = q.height = q.out_height = 1;
  q.width = q.out_width = a.rows;
  q.selected = a.k;
  q.out_per_group = a.out_features;
  for (int axis = 0; axis < 4; axis++) {
    q.input_stride[axis] = axis == 1 ? 1 : axis == 3 ? a.x_stride : a.rows * a.x_stride;
    q.grad_stride[axis] = axis == 1 ? 1 : axis == 3 ? a.dy_stride : a.rows * a.dy_stride;
  }
  for (int axis = 0; axis < 2; axis++) q.kernel[axis] = q.stride[axis] = q.dilation[axis] = 1;
  q.runs = &all;
  q.run_count = 1;
  if (!TRADY_KERNEL(conv2d_channel_grad_amx_plan)(q)) return false;
  const int64_t size = a.k * a.out_features;
  const Tensor parts = q.slices == 1 ? grad : new_empty(grad, {q.slices, size}, torch::headeronly::ScalarType::Float);
  void* target = parts.mutable_data_ptr();
  const auto loop = TRADY_KERNEL(conv2d_channel_grad_amx);
  parallel_for(q.tasks, a.rows * size / 64 / q.tasks, [&](int64_t begin, int64_t end) {
    void* room = scratch(q.scratch * sizeof(float));
    for (int64_t task = begin; task < end; task++) loop(q, task, target, room);
  });
  if (q.slices > 1) {
    const auto add = TRADY_KERNEL(sum_parts);
    parallel_for(size, q.slices, [&](int64_t begin, int64_t end) {
      add(target, q.slices, size, grad.mutable_data_ptr(), begin, end, false);
    });
  }
  return true;
}

Tensor linear_channel_grad(const Tensor& input_selected, const Tensor& grad_output) {
  STD_TORCH_CHECK(input_selected.dim() >= 2 && grad_output.dim() == input_selected.dim(), "grad_output: got ",
                  grad_output.dim(), " dimensions, expected those of input_selected, at least 2");
  for (int64_t axis = 0; axis < input_selected.dim() - 1; ++axis)  // as many rows of another shape are other rows
    STD_TORCH_CHECK(grad_output.size(axis) == input_selected.size(axis), "grad_output: got size ",
                    grad_output.size(axis), " along dimension ", axis, ", expected ", input_selected.size(axis));
  const auto scalar_type = grad_output.scalar_type();
  const auto dtype = dtype_of(grad_output, "grad_output");
  STD_TORCH_CHECK(input_selected.scalar_type() == scalar_type, "grad_output: got dtype ",
                  torch::headeronly::toString(scalar_type), ", expected that of input_selected");
  const bool float64 = dtype == Dtype::float64, half = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
  const auto accumulate = float64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
  const int64_t element = float64 ? sizeof(double) : sizeof(float);
  const Tensor dy = as_rows(grad_output), x = as_rows(input_selected);
  const int64_t rows = dy.size(0), k = x.size(1), out_features = dy.size(1);

  Tensor grad = new_empty(grad_output, {k, out_features}, accumulate);
  if (rows == 0) return torch::stable::zero_(grad);
  if (k == 0 || out_features == 0) return grad;

  LinearChannelGrad a{x.const_data_ptr(),
                      dy.const_data_ptr(),
                      nullptr,
                      rows,
                      k,
                      out_features,
                      x.stride(0),
                      dy.stride(0),
                      dtype,
                      k > 12 && rows > 16,
                      1};
  if (by_tiles(a, grad)) return grad;
  if (a.packs) a.groups = (k + GROUP_FEATURES - 1) / GROUP_FEATURES;
  const int64_t cycles_per_row = out_features * (k + 2) / 16;
  const Cut c = cut(a, cycles_per_row);
  const int64_t size = k * out_features;
  const Tensor sums = c.parts == 1 ? grad : new_empty(grad_output, {c.parts, k, out_features}, accumulate);
  auto* target = static_cast<char*>(sums.mutable_data_ptr());

  // Rows of x that are packed at a time, so that the copy of a large x stays small and in the caches.
  const bool panel = a.packs || half;
  const int64_t blocks = c.parts * BLOCK_ROWS, most = std::max<int64_t>(1, (1 << 20) / (k * element * blocks)) * blocks;
  const int64_t chunk = panel ? std::min(rows, most) : rows;
  const Tensor room = panel ? new_empty(grad_output, {chunk, k}, accumulate) : grad;
  if (panel) a.panel = room.mutable_data_ptr();

  const auto pack = TRADY_KERNEL(pack_features);
  const auto kernel = TRADY_KERNEL(linear_channel_grad);
  const int64_t items = c.columns * c.blocks;
  const auto* x_data = static_cast<const char*>(a.x);
  const auto* dy_data = static_cast<const char*>(a.dy);
  const int64_t element_in = half ? 2 : element;
  for (int64_t first = 0; first < rows; first += chunk) {
    a.rows = std::min(chunk, rows - first);
    a.x = x_data + first * a.x_stride * element_in;
    a.dy = dy_data + first * a.dy_stride * element_in;
    const int64_t pairs = (a.rows + 1) / 2;  // rows of bfloat16 are taken two by two
    if (panel) {
      parallel_for(pairs, 2 * k, [&](int64_t begin, int64_t end) { pack(a, 2 * begin, std::min(a.rows, 2 * end)); });
    }
    parallel_for(c.parts * items, a.rows * cycles_per_row / (c.parts * items), [&](int64_t begin, int64_t end) {
      void* block = a.packs ? scratch(BLOCK_ROWS * BLOCK_OUTPUTS * element) : nullptr;
      for (int64_t item = begin; item < end;) {
        // Neighbouring items as one task: the rest of a column's features, or whole columns.
        const int64_t part = item / items, column = item % items / c.blocks, at = item % c.blocks;
        const int64_t left = std::min(end, (part + 1) * items) - item;
        const bool whole = at == 0 && left >= c.blocks;
        const int64_t columns = whole ? left / c.blocks : 1, blocks = whole ? c.blocks : std::min(left, c.blocks - at);
        LinearChannelGradTask task{};
        task.row_begin = 2 * part_begin(pairs, c.parts, part);
        task.row_end = std::min(a.rows, 2 * part_begin(pairs, c.parts, part + 1));
        task.group_begin = at * c.block_groups;
        task.group_end = std::min(a.groups, (at + blocks) * c.block_groups);
        task.begin = column * c.column_width;
        task.end = std::min(out_features, (column + columns) * c.column_width);
        task.add = first > 0;
        kernel(a, task, target + part * size * element, block);
        item += columns * blocks;
      }
    });
  }
  if (c.parts > 1) {
    const auto add = TRADY_KERNEL(sum_parts);
    parallel_for(size, c.parts, [&](int64_t begin, int64_t end) {
      add(target, c.parts, size, grad.mutable_data_ptr(), begin, end, float64);
    });
  }
  return grad;
}

Tensor linear_channel_grad_squares(const Tensor& input_selected, const Tensor& grad_output) {
  STD_TORCH_CHECK(input_selected.dim() >= 2, "input_selected: got ", input_selected.dim(),
                  " dimensions, expected at least 2");
  const int64_t last = input_selected.dim() - 1, k = input_selected.size(last);
  Tensor input = input_selected;  // narrow() takes no constant
  return squares_of_rows(grad_output, k, accumulate_type(grad_output), [&](int64_t first, int64_t count) {
    return linear_channel_grad(torch::stable::narrow(input, last, first, count), grad_output);
  });
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) {
  m.impl("linear_channel_grad", TORCH_BOX(&trady::linear_channel_grad));
  m.impl("linear_channel_grad_squares", TORCH_BOX(&trady::linear_channel_grad_squares));
}
