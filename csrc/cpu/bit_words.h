// Bits of tensors, and threads over them. Only for <operator>.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "layout.h"
#include "parallel.h"

namespace trady {

inline torch::stable::Tensor empty_bits(const torch::stable::Tensor& tensor) {
  return empty({(tensor.numel() + 7) / 8}, torch::headeronly::ScalarType::Byte, tensor.device());
}

// Calls f(begin, count) on parts of [0, elements) that begin at multiples of 64, so that no two parts share a byte.
template <class F>
void parallel_for_words(int64_t elements, const F& f) {
  parallel_for((elements + 63) / 64, 64,
               [&](int64_t begin, int64_t end) { f(begin * 64, std::min(end * 64, elements) - begin * 64); });
}

}  // namespace trady
