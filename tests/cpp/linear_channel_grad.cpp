#include "cpu/linear_channel_grad.h"

#include <algorithm>

#include "check.h"

namespace trady {
namespace {

struct Shape {
  int64_t rows, features, outputs;
  bool packs;
};
constexpr Shape SHAPES[] = {{1, 1, 1, false},    {1, 7, 40, false},   {8, 3, 129, false},  {37, 12, 33, false},
                            {50, 30, 70, false}, {17, 13, 9, true},   {33, 20, 300, true}, {600, 14, 50, true},
                            {515, 31, 65, true}, {70, 5, 131, false}, {3, 11, 17, false}};

// Rows apart, the rows of x and dy in two halves: the second adds to the first.
TRADY_TEST(linear_channel_grad) {
  for (const Dtype dtype : DTYPES) {
    const Dtype sum = accumulate_type(dtype);
    for (const auto& [rows, features, outputs, packs] : SHAPES) {
      const Case words(name_of(dtype), ", ", rows, " rows, ", features, " features, ", outputs, " outputs",
                       packs ? ", packed" : "");
      const int64_t x_stride = features + 2, dy_stride = outputs + 1;
      const Array x = random_array(dtype, (rows - 1) * x_stride + features);
      const Array dy = random_array(dtype, (rows - 1) * dy_stride + outputs);
      Array grad(sum, features * outputs), panel(sum, (rows + 1) * features),
          block(sum, BLOCK_ROWS * BLOCK_OUTPUTS + 8);
      LinearChannelGrad a{x.data(), dy.data(), nullptr, rows, features, outputs, x_stride, dy_stride, dtype, packs, 1};
      if (packs) a.groups = (features + GROUP_FEATURES - 1) / GROUP_FEATURES;
      if (packs || dtype == Dtype::bfloat16 || dtype == Dtype::float16) {
        a.panel = panel.data();
        TRADY_KERNEL(pack_features)(a, 0, rows / 4 * 2);
        TRADY_KERNEL(pack_features)(a, rows / 4 * 2, rows);
      }
      auto* scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.data()) + 63) / 64 * 64);
      // The features in two tasks too, where there are several groups.
      for (const bool second : {false, true}) {
        LinearChannelGradTask task{};
        task.group_begin = second ? a.groups / 2 : 0;
        task.group_end = second ? a.groups : a.groups / 2;
        task.end = outputs;
        task.row_end = rows / 4 * 2;
        if (task.group_begin == task.group_end) continue;
        if (task.row_end > 0) TRADY_KERNEL(linear_channel_grad)(a, task, grad.data(), scratch);
        task.add = task.row_end > 0;
        task.row_begin = task.row_end;
        task.row_end = rows;
        TRADY_KERNEL(linear_channel_grad)(a, task, grad.data(), scratch);
      }
      for (int64_t c = 0; c < features; ++c) {
        for (int64_t o = 0; o < outputs; ++o) {
          double expected = 0, magnitude = 0;
          for (int64_t r = 0; r < rows; ++r) {
            const double product = x.get(r * x_stride + c) * dy.get(r * dy_stride + o);
            expected += product;
            magnitude += std::abs(product);
          }
          expect_sum("grad", c * outputs + o, dtype, grad.get(c * outputs + o), expected, magnitude, rows);
        }
      }
    }
  }
}

TRADY_TEST(sum_parts) {
  for (const bool float64 : {false, true}) {
    const Dtype dtype = float64 ? Dtype::float64 : Dtype::float32;
    for (const int64_t size : {1, 7, 40}) {
      const Case words(name_of(dtype), ", ", size, " elements");
      const Array parts = random_array(dtype, 3 * size);
      Array total(dtype, size);
      TRADY_KERNEL(sum_parts)(parts.data(), 3, size, total.data(), 0, size / 2, float64);
      TRADY_KERNEL(sum_parts)(parts.data(), 3, size, total.data(), size / 2, size, float64);
      for (int64_t i = 0; i < size; ++i) {
        const double first = rounded(dtype, parts.get(i) + parts.get(size + i));
        expect_identical("total", i, total.get(i), rounded(dtype, first + parts.get(2 * size + i)));
      }
    }
  }
}

}  // namespace
}  // namespace trady
