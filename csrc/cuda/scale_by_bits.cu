#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "elements.h"
#include "launch.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// `on` times the input where the bit is set; elsewhere 0 (`selects_zero`, whatever the input), or `off` times the
// input. The target may be the source.
template <class T>
__global__ void __launch_bounds__(ELEMENT_THREADS)
    scale_elements(const T* source, const uint8_t* __restrict__ bits, T* target, int64_t count, bool aligned,
                   computed_in<T> on, computed_in<T> off, bool selects_zero) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  Vector<T> vectors[VECTORS];
  unsigned packed[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t first = first_element<T>(v);
    packed[v] = first < count ? bits[first / 8] >> first % 8 : 0u;
    vectors[v] = load_vector(source + first, count - first, aligned);
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      const bool set = packed[v] >> i & 1;
      const auto product = static_cast<computed_in<T>>(vectors[v].element[i]) * (set ? on : off);
      vectors[v].element[i] = static_cast<T>(set || !selects_zero ? product : computed_in<T>{0});
    }
    const int64_t first = first_element<T>(v);
    store_vector(target + first, vectors[v], count - first, aligned);
  }
}

Tensor scale_by_bits(const Tensor& input, const Tensor& bits, double on, std::optional<double> off) {
  const OnDeviceOf device(input);
  check_device_of(input, bits, "bits");
  STD_TORCH_CHECK(bits.scalar_type() == torch::headeronly::ScalarType::Byte && bits.is_contiguous() &&
                      bits.numel() == (input.numel() + 7) / 8,
                  "bits: got ", bits.numel(), " elements, expected ", (input.numel() + 7) / 8,
                  " of torch.uint8, contiguous");
  Tensor output = torch::stable::empty_like(input);
  const bool dense = is_dense(input);
  // The order of the bits is that of the output's memory, which only torch's copy knows how to fill from any strides.
  if (!dense) torch::stable::copy_(output, input);
  const int64_t count = input.numel();
  for_floating_type(input, "input", [&]<class T>() {
    if (count == 0) return;
    auto* to = static_cast<T*>(output.mutable_data_ptr());
    const auto* from = dense ? static_cast<const T*>(input.const_data_ptr()) : to;
    launch(scale_elements<T>, blocks_for<T>(count), ELEMENT_THREADS, device.stream, from,
           static_cast<const uint8_t*>(bits.const_data_ptr()), to, count, is_aligned(from) && is_aligned(to), on,
           off.value_or(0), !off);
  });
  return output;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("scale_by_bits", TORCH_BOX(&trady::scale_by_bits));
}
