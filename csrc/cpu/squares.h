// Squared norms of a gradient's rows, which are made a block at a time. Only for <operator>.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "layout.h"
#include "parallel.h"

namespace trady {

// (k,) in the accumulation type of `like`. `gradient(first, count)` gives those rows, contiguous; no more of them exist
// at a time. Squares are added in double, each row's in order.
template <class Gradient>
torch::stable::Tensor squares_of_rows(const torch::stable::Tensor& like, int64_t k,
                                      torch::headeronly::ScalarType accumulate, const Gradient& gradient) {
  constexpr int64_t ROWS = 32;
  torch::stable::Tensor squares = new_empty(like, {k}, accumulate);
  const auto add = [&](auto type, const torch::stable::Tensor& rows, int64_t first, int64_t count) {
    using T = decltype(type);
    const int64_t length = rows.numel() / count;
    const T* values = static_cast<const T*>(rows.const_data_ptr());
    T* to = static_cast<T*>(squares.mutable_data_ptr()) + first;
    parallel_for(count, length, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        double sum = 0;
        for (int64_t i = row * length; i < (row + 1) * length; ++i) sum += static_cast<double>(values[i]) * values[i];
        to[row] = static_cast<T>(sum);
      }
    });
  };
  for (int64_t first = 0; first < k; first += ROWS) {
    const int64_t count = std::min(ROWS, k - first);
    const torch::stable::Tensor rows = gradient(first, count);
    if (accumulate == torch::headeronly::ScalarType::Double) {
      add(double{}, rows, first, count);
    } else {
      add(float{}, rows, first, count);
    }
  }
  return squares;
}

}  // namespace trady
