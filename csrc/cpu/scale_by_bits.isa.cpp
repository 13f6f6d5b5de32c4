#include "scale_by_bits.h"

#include "bits.h"

namespace trady::TRADY_ISA {
namespace {

template <bool selects_zero, class T>
void scale_elements(double on, double off, const T* source, const uint8_t* bits, T* target, int64_t count) {
  using V = vector_of<T>;
  constexpr int lanes = LANES<T>;
  const V yes = splat<V>(on), no = splat<V>(off);
  for_each_word<false>(source, target, bits, count, [&](const T* from, T* to, uint64_t& word) {
#pragma GCC unroll 32
    for (int i = 0; i < WORD; i += lanes) {
      const V x = load(from + i);
      const auto mask = mask_from<V>(word >> i);
      if constexpr (selects_zero) {
        store(to + i, select(mask, x * yes, V{}));
      } else {
        store(to + i, x * select(mask, yes, no));
      }
    }
  });
}

template <class T>
void scale_as(double on, double off, bool selects_zero, const void* source, const uint8_t* bits, void* target,
              int64_t count) {
  const auto* from = static_cast<const T*>(source);
  auto* to = static_cast<T*>(target);
  return selects_zero ? scale_elements<true>(on, off, from, bits, to, count)
                      : scale_elements<false>(on, off, from, bits, to, count);
}

}  // namespace

void scale_by_bits(Dtype dtype, double on, double off, bool selects_zero, const void* source, const uint8_t* bits,
                   void* target, int64_t count) {
  switch (dtype) {
    case Dtype::float32:
      return scale_as<float>(on, off, selects_zero, source, bits, target, count);
    case Dtype::float64:
      return scale_as<double>(on, off, selects_zero, source, bits, target, count);
    case Dtype::bfloat16:
      return scale_as<bfloat16>(on, off, selects_zero, source, bits, target, count);
    case Dtype::float16:
      return scale_as<float16>(on, off, selects_zero, source, bits, target, count);
  }
}

}  // namespace trady::TRADY_ISA
