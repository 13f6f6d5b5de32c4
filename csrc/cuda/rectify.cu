#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "elements.h"
#include "launch.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// ---- kernel -------------------------------------------------------------------------------------------------

// The identity inside (min, max), the nearer bound elsewhere. No upper bound is NaN: nothing compares with it.
template <class T>
struct Clamp {
  T min, max;
  __device__ bool passes(T x) const { return !(x <= min) && !(x >= max); }
  // Not fmax and fmin, which drop NaN and may turn -0 into 0.
  __device__ T output(T x) const {
    const T raised = min > x ? min : x;
    return max < raised ? max : raised;
  }
};

// The identity above min, slope times the input elsewhere.
template <class T>
struct Leaky {
  T min, slope;
  __device__ bool passes(T x) const { return x > min; }
  __device__ T output(T x) const { return passes(x) ? x : x * slope; }
};

template <bool WHOLE, int TOGETHER, class T, class Activation>
__device__ void rectify_vectors(int vector, const T* source, T* target, uint8_t* bits, int64_t count,
                                const Activation& activation) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  Vector<T> vectors[TOGETHER];
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    const int64_t first = first_element<T>(vector + v);
    vectors[v] = load_vector<WHOLE>(source + first, count - first);
  }
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    unsigned packed = 0;
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      const auto x = static_cast<computed_in<T>>(vectors[v].element[i]);
      packed |= static_cast<unsigned>(activation.passes(x)) << i;
      vectors[v].element[i] = static_cast<T>(activation.output(x));
    }
    const int64_t first = first_element<T>(vector + v);
    store_vector<WHOLE>(target + first, vectors[v], count - first);
    store_bits<WHOLE, LENGTH>(bits, packed, first, count - first);
  }
}

// The target may be the source.
template <class T, class Activation>
__global__ void __launch_bounds__(ELEMENT_THREADS)
    rectify_elements(const T* source, T* target, uint8_t* __restrict__ bits, int64_t count, bool aligned,
                     Activation activation) {
  if (is_whole<T>(count, aligned)) {
    rectify_vectors<true, VECTORS>(0, source, target, bits, count, activation);
  } else {
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) rectify_vectors<false, 1>(v, source, target, bits, count, activation);
  }
}

// ---- host ---------------------------------------------------------------------------------------------------

// From one dense tensor to another of the same strides, or to itself; the bits are the result.
Tensor rectify_dense(const Tensor& source, Tensor& target, double min, std::optional<double> max,
                     std::optional<double> slope, cudaStream_t stream) {
  Tensor bits = empty_bits(source);
  const int64_t count = source.numel();
  for_floating_type(source, "input", [&]<class T>() {
    if (count == 0) return;
    using Computed = computed_in<T>;
    const auto run = [&](const auto& activation) {
      const auto* from = static_cast<const T*>(source.const_data_ptr());
      auto* to = static_cast<T*>(target.mutable_data_ptr());
      launch(rectify_elements<T, std::decay_t<decltype(activation)>>, blocks_for<T>(count), ELEMENT_THREADS, stream,
             from, to, static_cast<uint8_t*>(bits.mutable_data_ptr()), count, is_aligned(from) && is_aligned(to),
             activation);
    };
    // Rounded to what is compared in, not to the dtype: ATen compares with the bounds as they are.
    if (slope) {
      run(Leaky<Computed>{static_cast<Computed>(min), static_cast<Computed>(*slope)});
    } else {
      run(Clamp<Computed>{static_cast<Computed>(min), static_cast<Computed>(max.value_or(NAN))});
    }
  });
  return bits;
}

std::tuple<Tensor, Tensor> rectify(const Tensor& input, double min, std::optional<double> max,
                                   std::optional<double> slope) {
  const OnDeviceOf device(input);
  Tensor output = torch::stable::empty_like(input);
  const bool dense = is_dense(input);
  // The order of the bits is that of the output's memory, which only torch's copy knows how to fill from any strides.
  if (!dense) torch::stable::copy_(output, input);
  Tensor bits = rectify_dense(dense ? input : output, output, min, max, slope, device.stream);
  return {output, bits};
}

Tensor rectify_(Tensor input, double min, std::optional<double> max, std::optional<double> slope) {
  if (!is_dense(input)) {
    auto [output, bits] = rectify(input, min, max, slope);
    torch::stable::copy_(input, output);
    return bits;
  }
  const OnDeviceOf device(input);
  return rectify_dense(input, input, min, max, slope, device.stream);
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("rectify", TORCH_BOX(&trady::rectify));
  m.impl("rectify_", TORCH_BOX(&trady::rectify_));
}
