#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "elements.h"
#include "launch.h"
#include "layout.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace trady {
namespace {

// Which channel the elements of a tensor belong to, in the order of its memory: `inner` neighbours share one.
enum class Vectors { ONE_CHANNEL, CONSECUTIVE_CHANNELS, ANY };

template <class T, class Index>
struct Shift {
  const computed_in<T>* of_channel;
  Index channels, inner;
};

template <bool WHOLE, int TOGETHER, Vectors VECTORS_ARE, class T, class Index>
__device__ void shift_vectors(int vector, T* data, int64_t count, const Shift<T, Index>& shift) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  Vector<T> vectors[TOGETHER];
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    const int64_t first = first_element<T>(vector + v);
    vectors[v] = load_vector<WHOLE>(data + first, count - first);
  }
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    const int64_t first = first_element<T>(vector + v);
    if (!WHOLE && first >= count) return;
    const Index at = static_cast<Index>(first);
    const Index channel = (VECTORS_ARE == Vectors::ONE_CHANNEL ? at / shift.inner : at) % shift.channels;
#pragma unroll
    for (int i = 0; i < LENGTH; ++i) {
      const Index c = VECTORS_ARE == Vectors::ONE_CHANNEL            ? channel
                      : VECTORS_ARE == Vectors::CONSECUTIVE_CHANNELS ? channel + i
                                                                     : (at + i) / shift.inner % shift.channels;
      const auto x = static_cast<computed_in<T>>(vectors[v].element[i]);
      vectors[v].element[i] = static_cast<T>(x + shift.of_channel[c]);
    }
    store_vector<WHOLE>(data + first, vectors[v], count - first);
  }
}

template <class T, class Index, Vectors VECTORS_ARE>
__global__ void __launch_bounds__(ELEMENT_THREADS)
    shift_elements(T* data, int64_t count, bool aligned, Shift<T, Index> shift) {
  // An element at a time, the divisions cost more than waiting for a load, and registers.
  if (VECTORS_ARE != Vectors::ANY && is_whole<T>(count, aligned)) {
    shift_vectors<true, VECTORS, VECTORS_ARE>(0, data, count, shift);
  } else {
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) shift_vectors<false, 1, VECTORS_ARE>(v, data, count, shift);
  }
}

template <class T, class Index>
void shift_dense(T* data, const computed_in<T>* of_channel, int64_t count, int64_t channels, int64_t inner,
                 cudaStream_t stream) {
  constexpr int LENGTH = Vector<T>::LENGTH;
  const Shift<T, Index> shift{of_channel, static_cast<Index>(channels), static_cast<Index>(inner)};
  const auto run = [&](auto kernel) {
    launch(kernel, blocks_for<T>(count), ELEMENT_THREADS, stream, data, count, is_aligned(data), shift);
  };
  if (inner == 1 && channels % LENGTH == 0) return run(shift_elements<T, Index, Vectors::CONSECUTIVE_CHANNELS>);
  if (inner % LENGTH == 0) return run(shift_elements<T, Index, Vectors::ONE_CHANNEL>);
  run(shift_elements<T, Index, Vectors::ANY>);
}

// ---- host ---------------------------------------------------------------------------------------------------

void shift_channels_(Tensor input, const Tensor& shift) {
  const OnDeviceOf device(input);
  check_device_of(input, shift, "shift");
  STD_TORCH_CHECK(input.dim() >= 2 && shift.dim() == 1 && shift.size(0) == input.size(1),
                  "shift: expected a value for each channel of input");
  const bool ordered = input.is_contiguous();
  STD_TORCH_CHECK(ordered || (is_channels_last(input) && is_dense(input)),
                  "input: expected a dense tensor, contiguous or channels_last");
  const int64_t count = input.numel(), channels = input.size(1);
  if (count == 0) return;
  const int64_t inner = ordered ? count / (input.size(0) * channels) : 1;
  const Tensor values = torch::stable::contiguous(shift);
  for_floating_type(input, "input", [&]<class T>() {
    using Computed = computed_in<T>;
    STD_TORCH_CHECK(shift.scalar_type() == (std::is_same_v<Computed, double> ? ScalarType::Double : ScalarType::Float),
                    "shift: expected float32, or float64 for an input of float64");
    auto* data = static_cast<T*>(input.mutable_data_ptr());
    const auto* of_channel = static_cast<const Computed*>(values.const_data_ptr());
    // 32-bit division is several times cheaper.
    if (count < int64_t{1} << 31) {
      shift_dense<T, uint32_t>(data, of_channel, count, channels, inner, device.stream);
    } else {
      shift_dense<T, uint64_t>(data, of_channel, count, channels, inner, device.stream);
    }
  });
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("shift_channels_", TORCH_BOX(&trady::shift_channels_));
}
