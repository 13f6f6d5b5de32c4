#include "scale_by_bits.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "bit_words.h"
#include "dtype.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

Tensor scale_by_bits(const Tensor& input, const Tensor& bits, double on, std::optional<double> off) {
  const Dtype dtype = dtype_of(input, "input");
  STD_TORCH_CHECK(bits.scalar_type() == torch::headeronly::ScalarType::Byte && bits.is_contiguous() &&
                      bits.numel() == (input.numel() + 7) / 8,
                  "bits: got ", bits.numel(), " elements, expected ", (input.numel() + 7) / 8,
                  " of torch.uint8, contiguous");
  Tensor output = torch::stable::empty_like(input);
  const bool dense = is_dense(input);
  if (!dense) torch::stable::copy_(output, input);
  const auto element_size = static_cast<int64_t>(input.element_size());
  auto* to = static_cast<char*>(output.mutable_data_ptr());
  const auto* from = dense ? static_cast<const char*>(input.const_data_ptr()) : to;
  const auto* packed = static_cast<const uint8_t*>(bits.const_data_ptr());
  const auto kernel = TRADY_KERNEL(scale_by_bits);
  parallel_for_words(input.numel(), [&](int64_t begin, int64_t count) {
    kernel(dtype, on, off.value_or(0), !off, from + begin * element_size, packed + begin / 8, to + begin * element_size,
           count);
  });
  return output;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) { m.impl("scale_by_bits", TORCH_BOX(&trady::scale_by_bits)); }
