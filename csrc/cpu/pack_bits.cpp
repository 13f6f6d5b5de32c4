#include "pack_bits.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bit_words.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

Tensor pack_bits(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool, "mask: got ",
                  torch::headeronly::toString(mask.scalar_type()), ", expected bool");
  Tensor dense = mask;
  if (!is_dense(mask)) {
    dense = torch::stable::empty_like(mask);
    torch::stable::copy_(dense, mask);
  }
  Tensor bits = empty_bits(mask);
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const auto kernel = TRADY_KERNEL(pack_bits);
  parallel_for_words(mask.numel(), [&](int64_t begin, int64_t count) { kernel(from + begin, to + begin / 8, count); });
  return bits;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) { m.impl("pack_bits", TORCH_BOX(&trady::pack_bits)); }
