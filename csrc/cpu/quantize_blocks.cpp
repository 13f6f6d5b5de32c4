#include "quantize_blocks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "dtype.h"
#include "layout.h"
#include "parallel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace trady {
namespace {

// Operations a block: 64 elements read twice, written once.
constexpr int64_t BLOCK_COST = 192;

std::tuple<Tensor, Tensor> quantize_blocks(const Tensor& input) {
  const auto dtype = dtype_of(input, "input");
  STD_TORCH_CHECK(is_dense(input), "input: got strides that leave gaps or overlap, expected a dense tensor");
  const int64_t elements = input.numel(), blocks = (elements + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
  Tensor codes = empty({elements}, ScalarType::Char, input.device());
  Tensor scales = empty({blocks}, ScalarType::Float, input.device());
  const auto* source = static_cast<const char*>(input.const_data_ptr());
  auto* code = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scale = static_cast<float*>(scales.mutable_data_ptr());
  const auto element_size = static_cast<int64_t>(input.element_size());
  const auto kernel = TRADY_KERNEL(quantize_blocks);
  parallel_for(blocks, BLOCK_COST, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * QUANTIZED_BLOCK, last = std::min(elements, end * QUANTIZED_BLOCK);
    kernel(source + first * element_size, last - first, code + first, scale + begin, dtype);
  });
  return {codes, scales};
}

Tensor dequantize_blocks(const Tensor& codes, const Tensor& scales, ScalarType type) {
  const int64_t elements = codes.numel(), blocks = (elements + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
  STD_TORCH_CHECK(codes.dim() == 1 && codes.scalar_type() == ScalarType::Char && codes.is_contiguous(),
                  "codes: expected a contiguous 1-D int8 tensor");
  STD_TORCH_CHECK(scales.dim() == 1 && scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                      scales.numel() == blocks,
                  "scales: expected a contiguous 1-D float32 tensor of ", blocks, " elements");
  Tensor output = empty({elements}, type, codes.device());
  const auto dtype = dtype_of(output, "dtype");
  const auto* code = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* scale = static_cast<const float*>(scales.const_data_ptr());
  auto* target = static_cast<char*>(output.mutable_data_ptr());
  const auto element_size = static_cast<int64_t>(output.element_size());
  const auto kernel = TRADY_KERNEL(dequantize_blocks);
  parallel_for(blocks, BLOCK_COST, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * QUANTIZED_BLOCK, last = std::min(elements, end * QUANTIZED_BLOCK);
    kernel(code + first, scale + begin, last - first, target + first * element_size, dtype);
  });
  return output;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) {
  m.impl("quantize_blocks", TORCH_BOX(&trady::quantize_blocks));
  m.impl("dequantize_blocks", TORCH_BOX(&trady::dequantize_blocks));
}
