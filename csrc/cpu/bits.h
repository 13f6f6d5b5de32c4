// Masks of vector lanes, and loops that handle 64 elements and their 64 bits at a time. Only for *.isa.cpp.
#pragma once

#include "vector.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace trady::TRADY_ISA {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bit i of byte j is bit 8j + i of a word");

constexpr int WORD = 64;

// ---- one truth value a lane -------------------------------------------------------------------------------

#if defined(__AVX512F__)
template <class V>
struct MaskOf {
  using type = __mmask16;
};
template <>
struct MaskOf<f64> {
  using type = __mmask8;
};
#else
template <class V>
struct MaskOf {
  using type = decltype(V{} < V{});
};
#endif
template <class V>
using mask_of = typename MaskOf<V>::type;

#if defined(__AVX512F__)
// Also true for NaN: !(x <= bound), !(x >= bound).
TRADY_INLINE __mmask16 not_at_most(f32 x, f32 bound) {
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_NLE_UQ);
}
TRADY_INLINE __mmask8 not_at_most(f64 x, f64 bound) {
  return _mm512_cmp_pd_mask((__m512d)x, (__m512d)bound, _CMP_NLE_UQ);
}
TRADY_INLINE __mmask16 not_at_least(f32 x, f32 bound) {
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_NGE_UQ);
}
TRADY_INLINE __mmask8 not_at_least(f64 x, f64 bound) {
  return _mm512_cmp_pd_mask((__m512d)x, (__m512d)bound, _CMP_NGE_UQ);
}
TRADY_INLINE __mmask16 above(f32 x, f32 bound) { return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_GT_OQ); }
TRADY_INLINE __mmask8 above(f64 x, f64 bound) { return _mm512_cmp_pd_mask((__m512d)x, (__m512d)bound, _CMP_GT_OQ); }
TRADY_INLINE f32 select(__mmask16 mask, f32 yes, f32 no) {
  return (f32)_mm512_mask_blend_ps(mask, (__m512)no, (__m512)yes);
}
TRADY_INLINE f64 select(__mmask8 mask, f64 yes, f64 no) {
  return (f64)_mm512_mask_blend_pd(mask, (__m512d)no, (__m512d)yes);
}
template <class M>
TRADY_INLINE uint64_t bits_of(M mask) {
  return mask;
}
template <class V>
TRADY_INLINE mask_of<V> mask_from(uint64_t bits) {
  return static_cast<mask_of<V>>(bits);
}
#else
template <class V>
TRADY_INLINE mask_of<V> not_at_most(V x, V bound) {
  return ~(x <= bound);
}
template <class V>
TRADY_INLINE mask_of<V> not_at_least(V x, V bound) {
  return ~(x >= bound);
}
template <class V>
TRADY_INLINE mask_of<V> above(V x, V bound) {
  return x > bound;
}
template <class V>
TRADY_INLINE V select(mask_of<V> mask, V yes, V no) {
  return mask ? yes : no;
}
template <class M>
TRADY_INLINE M lane_bits() {
  M bits = {};
  for (int lane = 0; lane < static_cast<int>(sizeof(M) / sizeof(bits[0])); ++lane) bits[lane] = 1 << lane;
  return bits;
}
template <class M>
TRADY_INLINE uint64_t bits_of(M mask) {
  constexpr int lanes = static_cast<int>(sizeof(M) / sizeof(mask[0]));
#if defined(__AVX2__)
  if constexpr (lanes == 8) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  if constexpr (lanes == 4) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  if constexpr (lanes == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  if constexpr (lanes == 2) return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#endif
  mask &= lane_bits<M>();
#if defined(__aarch64__) && !defined(__ARM_FEATURE_SVE)
  if constexpr (lanes == 4) return vaddvq_u32((uint32x4_t)mask);
  if constexpr (lanes == 2) return vaddvq_u64((uint64x2_t)mask);
#endif
  uint64_t bits = 0;
  for (int lane = 0; lane < lanes; ++lane) bits |= static_cast<uint64_t>(mask[lane]);
  return bits;
}
template <class V>
TRADY_INLINE mask_of<V> mask_from(uint64_t bits) {
  using M = mask_of<V>;
  using element = decltype(M{}[0] + 0);
  return ((M{} + static_cast<element>(bits & 0xff)) & lane_bits<M>()) != 0;
}
#endif

// The scalar in every lane, -0.0 too.
template <class V>
TRADY_INLINE V splat(double value) {
  return static_cast<decltype(V{}[0] + 0)>(value) - V{};
}

// x, but not below (above) the bound; x where both are zeros or x is NaN.
template <class V>
TRADY_INLINE V clamp_min(V x, V bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_maskz_max_ps(ALL, (__m512)bound, (__m512)x);
  if constexpr (sizeof(x[0]) == 8) return (V)_mm512_maskz_max_pd(0xff, (__m512d)bound, (__m512d)x);
#endif
  return bound > x ? bound : x;
}
template <class V>
TRADY_INLINE V clamp_max(V x, V bound) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_maskz_min_ps(ALL, (__m512)bound, (__m512)x);
  if constexpr (sizeof(x[0]) == 8) return (V)_mm512_maskz_min_pd(0xff, (__m512d)bound, (__m512d)x);
#endif
  return bound < x ? bound : x;
}

// ---- words --------------------------------------------------------------------------------------------------

TRADY_INLINE uint64_t load_word(const uint8_t* p, int bytes = 8) {
  uint64_t word = 0;
  __builtin_memcpy(&word, p, bytes);
  return word;
}
TRADY_INLINE void store_word(uint8_t* p, uint64_t word, int bytes = 8) { __builtin_memcpy(p, &word, bytes); }

// step(source, target, word) on every 64 elements and their bits, `word` read or written, and on the rest by way of
// a buffer. The target may be the source.
//
// Both are prefetched: without it, 9.9 ms for the ReLU6 of 9.6 million floats out of place, with it 6.8 (a store
// stream that misses the cache holds up the loads behind it).
template <bool writes_bits, class T, class B, class F>
TRADY_INLINE void for_each_word(const T* source, T* target, B* bits, int64_t count, F step) {
  constexpr int ahead = 2048 / static_cast<int>(sizeof(T)), line = 64 / static_cast<int>(sizeof(T));
  for (; count >= WORD; count -= WORD, source += WORD, target += WORD, bits += 8) {
#pragma GCC unroll 8
    for (int i = 0; i < WORD; i += line) {
      if (source != target) prefetch(source + i + ahead);  // in place once is enough
      prefetch(target + i + ahead);
    }
    if constexpr (writes_bits) {
      uint64_t word = 0;
      step(source, target, word);
      store_word(bits, word);
    } else {
      uint64_t word = load_word(bits);
      step(source, target, word);
    }
  }
  if (count == 0) return;
  const int bytes = static_cast<int>(count + 7) / 8;
  T rest[WORD] = {};
  __builtin_memcpy(rest, source, count * sizeof(T));
  if constexpr (writes_bits) {
    uint64_t word = 0;
    step(rest, rest, word);
    store_word(bits, word & ((uint64_t{1} << count) - 1), bytes);
  } else {
    uint64_t word = load_word(bits, bytes);
    step(rest, rest, word);
  }
  __builtin_memcpy(target, rest, count * sizeof(T));
}

}  // namespace
}  // namespace trady::TRADY_ISA
