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
// input.
template <class T>
struct Scale {
  computed_in<T> on, off;
  bool selects_zero;
  __device__ T of(T x, bool set) const {
    const auto product = static_cast<computed_in<T>>(x) * (set ? on : off);
    return static_cast<T>(set || !selects_zero ? product : computed_in<T>{0});
  }
};

template <bool WHOLE, int TOGETHER, class T>
__device__ void scale_vectors(int vector, const T* source, const uint8_t* __restrict__ bits, T* target, int64_t count,
                              const Scale<T>& scale) {
  Vector<T> vectors[TOGETHER];
  unsigned packed[TOGETHER];
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    const int64_t first = first_element<T>(vector + v);
    packed[v] = WHOLE || first < count ? bits[first / 8] >> first % 8 : 0u;
    vectors[v] = load_vector<WHOLE>(source + first, count - first);
  }
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
#pragma unroll
    for (int i = 0; i < Vector<T>::LENGTH; ++i) {
      vectors[v].element[i] = scale.of(vectors[v].element[i], packed[v] >> i & 1);
    }
    const int64_t first = first_element<T>(vector + v);
    store_vector<WHOLE>(target + first, vectors[v], count - first);
  }
}

// The target may be the source.
template <class T>
__global__ void __launch_bounds__(ELEMENT_THREADS)
    scale_elements(const T* source, const uint8_t* __restrict__ bits, T* target, int64_t count, bool aligned,
                   Scale<T> scale) {
  if (is_whole<T>(count, aligned)) {
    scale_vectors<true, VECTORS>(0, source, bits, target, count, scale);
  } else {
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) scale_vectors<false, 1>(v, source, bits, target, count, scale);
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
           static_cast<const uint8_t*>(bits.const_data_ptr()), to, count, is_aligned(from) && is_aligned(to),
           Scale<T>{static_cast<computed_in<T>>(on), static_cast<computed_in<T>>(off.value_or(0)), !off});
  });
  return output;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("scale_by_bits", TORCH_BOX(&trady::scale_by_bits));
}
