#include "rectify.h"

#include "bits.h"

namespace trady::TRADY_ISA {
namespace {

template <Outside outside, class T>
void rectify_elements(const Rectifier& rectifier, const T* source, T* target, uint8_t* bits, int64_t count) {
  using V = vector_of<T>;
  constexpr int lanes = LANES<T>;
  const V min = splat<V>(rectifier.min), max = splat<V>(rectifier.max);
  const V slope = splat<V>(rectifier.slope);
  // The bounds are not rounded to T: ATen compares with them as they are, and the output is rounded by its store.
  for_each_word<true>(source, target, bits, count, [&](const T* from, T* to, uint64_t& word) {
#pragma GCC unroll 32
    for (int i = 0; i < WORD; i += lanes) {
      const V x = load(from + i);
      if constexpr (outside == Outside::slope) {
        const auto inside = above(x, min);
        store(to + i, select(inside, x, x * slope));
        word |= bits_of(inside) << i;
      } else if constexpr (outside == Outside::lower_bound) {
        store(to + i, clamp_min(x, min));
        word |= bits_of(not_at_most(x, min)) << i;
      } else {
        store(to + i, clamp_max(clamp_min(x, min), max));
        word |= bits_of(static_cast<mask_of<V>>(not_at_most(x, min) & not_at_least(x, max))) << i;
      }
    }
  });
}

template <class T>
void rectify_as(const Rectifier& rectifier, const void* source, void* target, uint8_t* bits, int64_t count) {
  const auto* from = static_cast<const T*>(source);
  auto* to = static_cast<T*>(target);
  switch (rectifier.outside) {
    case Outside::lower_bound:
      return rectify_elements<Outside::lower_bound>(rectifier, from, to, bits, count);
    case Outside::bounds:
      return rectify_elements<Outside::bounds>(rectifier, from, to, bits, count);
    case Outside::slope:
      return rectify_elements<Outside::slope>(rectifier, from, to, bits, count);
  }
}

}  // namespace

void rectify(Dtype dtype, const Rectifier& rectifier, const void* source, void* target, uint8_t* bits, int64_t count) {
  switch (dtype) {
    case Dtype::float32:
      return rectify_as<float>(rectifier, source, target, bits, count);
    case Dtype::float64:
      return rectify_as<double>(rectifier, source, target, bits, count);
    case Dtype::bfloat16:
      return rectify_as<bfloat16>(rectifier, source, target, bits, count);
    case Dtype::float16:
      return rectify_as<float16>(rectifier, source, target, bits, count);
  }
}

}  // namespace trady::TRADY_ISA
