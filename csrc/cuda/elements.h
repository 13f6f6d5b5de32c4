// One pass over the elements of dense tensors: every thread takes vectors of 16 bytes, several in flight, and the
// threads that share a byte of bits put it together.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.h"
#include "layout.h"

namespace trady {

// What elements of T are compared and multiplied in.
template <class T>
using computed_in = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 16 bytes of elements.
template <class T>
struct Vector {
  static constexpr int LENGTH = 16 / static_cast<int>(sizeof(T));
  T element[LENGTH];
};

constexpr unsigned ELEMENT_THREADS = 256;
// Loads in flight a thread: full multiprocessors then wait for 64 KiB each, and 1 MiB still makes work for 128 of them.
constexpr int VECTORS = 2;

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0; }

template <class T>
constexpr int64_t ELEMENTS_OF_BLOCK = int64_t{ELEMENT_THREADS} * VECTORS * Vector<T>::LENGTH;

// Blocks of ELEMENT_THREADS for `count` > 0 elements.
template <class T>
dim3 blocks_for(int64_t count) {
  return dim3(static_cast<unsigned>((count + ELEMENTS_OF_BLOCK<T> - 1) / ELEMENTS_OF_BLOCK<T>));
}

// Whether all vectors of this block exist and may be loaded as such. Asked once: a test around each load would make it
// wait for the one before.
template <class T>
__device__ bool is_whole(int64_t count, bool aligned) {
  return aligned && (int64_t{blockIdx.x} + 1) * ELEMENTS_OF_BLOCK<T> <= count;
}

// First element of this thread's vector number `v`; neighbouring threads have neighbouring vectors.
template <class T>
__device__ int64_t first_element(int v) {
  return int64_t{blockIdx.x} * ELEMENTS_OF_BLOCK<T> + (v * ELEMENT_THREADS + threadIdx.x) * Vector<T>::LENGTH;
}

// A vector in a whole block, or one of which `remaining` elements exist, any number; the others are zeros.
template <bool WHOLE, class T>
__device__ Vector<T> load_vector(const T* source, int64_t remaining) {
  Vector<T> vector;
  uint4 bytes{0, 0, 0, 0};
  if constexpr (WHOLE) bytes = *reinterpret_cast<const uint4*>(source);
  memcpy(&vector, &bytes, sizeof(bytes));
  if constexpr (!WHOLE) {
#pragma unroll
    for (int i = 0; i < Vector<T>::LENGTH; ++i) {
      if (i < remaining) vector.element[i] = source[i];
    }
  }
  return vector;
}

template <bool WHOLE, class T>
__device__ void store_vector(T* target, const Vector<T>& vector, int64_t remaining) {
  if constexpr (WHOLE) {
    uint4 bytes;
    memcpy(&bytes, &vector, sizeof(bytes));
    *reinterpret_cast<uint4*>(target) = bytes;
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::LENGTH; ++i) {
      if (i < remaining) target[i] = vector.element[i];
    }
  }
}

// Bit i of `packed` goes to element `first` + i, for `LENGTH` elements a thread of which `remaining` exist, or all in a
// whole block. The whole warp calls it: several threads share a byte where an element is longer than 2.
template <bool WHOLE, int LENGTH>
__device__ void store_bits(uint8_t* bits, unsigned packed, int64_t first, int64_t remaining) {
  if (!WHOLE && remaining < LENGTH) packed &= (1u << max(remaining, int64_t{0})) - 1;
#pragma unroll
  for (int places = LENGTH; places < 8; places *= 2) {
    packed |= __shfl_down_sync(0xffffffffu, packed, places / LENGTH) << places;
  }
  if (first % 8 != 0 || (!WHOLE && remaining <= 0)) return;
  if (LENGTH > 8 && (WHOLE || remaining > 8)) {
    *reinterpret_cast<uint16_t*>(bits + first / 8) = static_cast<uint16_t>(packed);
  } else {
    bits[first / 8] = static_cast<uint8_t>(packed);
  }
}

// Calls f.operator()<T>() for the type of the tensor's elements.
template <class F>
void for_floating_type(const torch::stable::Tensor& tensor, const char* argument, const F& f) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return f.template operator()<float>();
    case torch::headeronly::ScalarType::Double:
      return f.template operator()<double>();
    case torch::headeronly::ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    case torch::headeronly::ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    default:
      STD_TORCH_CHECK(false, argument, ": got dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      ", expected float32, float64, bfloat16 or float16");
  }
}

// Bytes for one bit an element.
inline torch::stable::Tensor empty_bits(const torch::stable::Tensor& tensor) {
  return new_empty(tensor, {(tensor.numel() + 7) / 8}, torch::headeronly::ScalarType::Byte);
}

}  // namespace trady
