#include "rectify.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "bit_words.h"
#include "dtype.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// From one dense tensor to another of the same strides, or to itself; the bits are the result.
Tensor rectify_dense(const Tensor& source, Tensor& target, double min, std::optional<double> max,
                     std::optional<double> slope) {
  const Dtype dtype = dtype_of(source, "input");
  const Rectifier rectifier{slope ? Outside::slope
                            : max ? Outside::bounds
                                  : Outside::lower_bound,
                            min, max.value_or(0), slope.value_or(0)};
  Tensor bits = empty_bits(source);
  const auto element_size = static_cast<int64_t>(source.element_size());
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(target.mutable_data_ptr());
  auto* packed = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const auto kernel = TRADY_KERNEL(rectify);
  parallel_for_words(source.numel(), [&](int64_t begin, int64_t count) {
    kernel(dtype, rectifier, from + begin * element_size, to + begin * element_size, packed + begin / 8, count);
  });
  return bits;
}

std::tuple<Tensor, Tensor> rectify(const Tensor& input, double min, std::optional<double> max,
                                   std::optional<double> slope) {
  Tensor output = torch::stable::empty_like(input);
  const bool dense = is_dense(input);
  if (!dense) torch::stable::copy_(output, input);
  Tensor bits = rectify_dense(dense ? input : output, output, min, max, slope);
  return {output, bits};
}

Tensor rectify_(Tensor input, double min, std::optional<double> max, std::optional<double> slope) {
  if (is_dense(input)) return rectify_dense(input, input, min, max, slope);
  auto [output, bits] = rectify(input, min, max, slope);
  torch::stable::copy_(input, output);
  return bits;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) {
  m.impl("rectify", TORCH_BOX(&trady::rectify));
  m.impl("rectify_", TORCH_BOX(&trady::rectify_));
}
