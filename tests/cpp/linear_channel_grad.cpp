#include "cpu/linear_channel_grad.h"

#include <cstdlib>
#include <memory>
#include <utility>

#include "check.h"

namespace trady {
namespace {

struct Shape {
  int64_t rows, k, out_features;
};
constexpr Shape SHAPES[] = {{1, 1, 10},    {1, 7, 1},    {9, 2, 33},    {33, 5, 64},    {700, 3, 10}, {65, 12, 515},
                            {40, 13, 300}, {15, 20, 31}, {300, 31, 70}, {259, 26, 257}, {17, 6, 96},  {64, 18, 16}};

// What tests of the result need of an operand: rows with `gap` elements between them.
struct Rows {
  Array values;
  int64_t stride;
  Rows(Dtype dtype, int64_t rows, int64_t columns, int64_t gap)
      : values(random_array(dtype, (rows - 1) * (columns + gap) + columns)), stride(columns + gap) {}
  double get(int64_t row, int64_t column) const { return values.get(row * stride + column); }
};

// As the operator's host code cuts them, but in one task and in four.
TRADY_TEST(linear_channel_grad) {
  for (const Shape& shape : SHAPES) {
    for (const Dtype dtype : DTYPES) {
      for (const int64_t gap : {0, 5}) {
        for (const bool cut : {false, true}) {
          const auto& [rows, k, out_features] = shape;
          const Case words(rows, " x ", k, " and ", out_features, ", ", name_of(dtype), gap ? ", gaps" : "",
                           cut ? ", cut" : "");
          const Dtype accumulate = accumulate_type(dtype);
          const bool half = size_of(dtype) == 2;
          const Rows x(dtype, rows, k, gap), dy(dtype, rows, out_features, gap);
          LinearChannelGrad a{x.values.at(0), dy.values.at(0), nullptr, rows,   k, out_features,
                              x.stride,       dy.stride,       dtype,   k > 12, 1};
          if (a.packs) a.groups = (k + GROUP_FEATURES - 1) / GROUP_FEATURES;
          Array panel(accumulate, rows * k);
          if (a.packs || half) {
            a.panel = panel.at(0);
            const int64_t middle = rows / 4 * 2;
            TRADY_KERNEL(pack_features)(a, middle, rows);
            TRADY_KERNEL(pack_features)(a, 0, middle);
          }
          const std::unique_ptr<void, void (*)(void*)> block(
              std::aligned_alloc(64, BLOCK_ROWS * BLOCK_OUTPUTS * size_of(accumulate)), &std::free);
          Array grad(accumulate, k * out_features);
          const int64_t middle = cut ? rows / 4 * 2 : 0, outputs = cut ? out_features / 2 : 0,
                        groups = cut ? a.groups / 2 : 0;
          const auto run = [&](int64_t row_begin, int64_t row_end, bool add) {
            for (const auto& [begin, end] : {std::pair{outputs, out_features}, std::pair{int64_t{0}, outputs}}) {
              for (const auto& [group_begin, group_end] :
                   {std::pair{groups, a.groups}, std::pair{int64_t{0}, groups}}) {
                if (begin == end || group_begin == group_end) continue;
                TRADY_KERNEL(linear_channel_grad)
                (a, {row_begin, row_end, group_begin, group_end, begin, end, add}, grad.at(0), block.get());
              }
            }
          };
          if (middle > 0) run(0, middle, false);
          run(middle, rows, middle > 0);
          for (int64_t c = 0; c < k; ++c) {
            for (int64_t o = 0; o < out_features; ++o) {
              double sum = 0, magnitude = 0;
              for (int64_t r = 0; r < rows; ++r) {
                const double product = x.get(r, c) * dy.get(r, o);
                sum += product;
                magnitude += std::abs(product);
              }
              expect_sum("grad", c * out_features + o, dtype, grad.get(c * out_features + o), sum, magnitude, rows);
            }
          }
        }
      }
    }
  }
}

TRADY_TEST(sum_parts) {
  for (const bool float64 : {false, true}) {
    const Dtype dtype = float64 ? Dtype::float64 : Dtype::float32;
    for (const auto& [count, size] : {std::pair{1, 5}, std::pair{2, 64}, std::pair{5, 131}}) {
      const Case words(name_of(dtype), ", ", count, " parts of ", size);
      const Array parts = random_array(dtype, count * size);
      Array total(dtype, size);
      const auto kernel = TRADY_KERNEL(sum_parts);
      kernel(parts.at(0), count, size, total.at(0), size / 2, size, float64);
      kernel(parts.at(0), count, size, total.at(0), 0, size / 2, float64);
      for (int64_t i = 0; i < size; ++i) {
        double sum = parts.get(i);
        for (int64_t part = 1; part < count; ++part) sum = rounded(dtype, sum + parts.get(part * size + i));
        expect_identical("total", i, total.get(i), sum);
      }
    }
  }
}

}  // namespace
}  // namespace trady
