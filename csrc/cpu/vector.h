// Vectors of the instruction set that this file is compiled for, by the vector extension of GCC and clang.
//
// Only for *.isa.cpp. Everything lives in an anonymous namespace inside trady::TRADY_ISA: a function shared
// between objects of different instruction sets would be merged by the linker into any one of them.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef TRADY_ISA
#error "vector.h belongs into *.isa.cpp, which CMake compiles with -DTRADY_ISA=<instruction set>"
#endif

#define TRADY_INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda

namespace trady::TRADY_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
constexpr int VECTOR_REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int VECTOR_REGISTERS = 16;
#elif defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS > 0
constexpr int VECTOR_BYTES = __ARM_FEATURE_SVE_BITS / 8;
constexpr int VECTOR_REGISTERS = 32;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16;
constexpr int VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int VECTOR_REGISTERS = 16;
#endif

// Storage types of the half precisions.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// f32: float[LANES<float>], f64: double[LANES<double>]; +, -, *, / and broadcasting of scalars are built in.
typedef float f32 __attribute__((vector_size(VECTOR_BYTES)));
typedef double f64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t u32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t i32 __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t i64 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t u16 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t u16_half __attribute__((vector_size(VECTOR_BYTES / 2)));
#if defined(__ARM_FEATURE_SVE)
typedef __fp16 half_precision __attribute__((vector_size(VECTOR_BYTES / 2)));
#endif
// The same in memory: any alignment, any declared type.
typedef float f32_memory __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef double f64_memory __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
typedef uint16_t u16_memory __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
typedef uint16_t u16_half_memory __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

template <class V>
constexpr int lanes_of = static_cast<int>(sizeof(V) / sizeof(V{}[0]));

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

// Integers of as many lanes as V has.
template <class V>
struct Index {
  using type = i32;
};
template <>
struct Index<f64> {
  using type = i64;
};
template <>
struct Index<u16> {
  using type = u16;
};
template <class V>
using index_of = typename Index<V>::type;

// What a kernel over elements of T computes in: its scalar and its vector.
template <class T>
struct Accumulate {
  using scalar = float;
  using vector = f32;
};
template <>
struct Accumulate<double> {
  using scalar = double;
  using vector = f64;
};
template <class T>
using scalar_of = typename Accumulate<T>::scalar;
template <class T>
using vector_of = typename Accumulate<T>::vector;
// Elements of T that one vector holds once widened.
template <class T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(scalar_of<T>));

// Keeps a value in a register: without it the compiler folds one load into several FMAs and loads it again each time.
template <class V>
TRADY_INLINE V keep(V value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__) && !(defined(__clang__) && defined(__ARM_FEATURE_SVE))  // there it takes NEON's size alone
  asm("" : "+w"(value));
#endif
  return value;
}

// Known when compiled, and a value.
template <bool VALUE>
struct Constant {
  constexpr operator bool() const { return VALUE; }
};

TRADY_INLINE void prefetch(const void* address) { __builtin_prefetch(address); }
// What is needed later goes to the second level: the first has few places for requests under way.
TRADY_INLINE void prefetch_later(const void* address) { __builtin_prefetch(address, 0, 2); }

// ---- widening -------------------------------------------------------------------------------------------

TRADY_INLINE float widen(float x) { return x; }
TRADY_INLINE double widen(double x) { return x; }
TRADY_INLINE float widen(bfloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
TRADY_INLINE float widen(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude < 0x0400u) {
    // By integer, so that a CPU told to flush denormals gives the same.
    bits = __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  } else {
    bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  }
  return __builtin_bit_cast(float, bits | sign);
}

#if defined(__AVX512F__)
// Masked with every lane set, which costs nothing: GCC warns about its own unmasked forms.
constexpr __mmask16 ALL = 0xffff;
#endif

TRADY_INLINE f32 widen_bfloat16(u16_half bits) {
#if defined(__AVX512F__)
  return (f32)_mm512_maskz_slli_epi32(ALL, _mm512_maskz_cvtepu16_epi32(ALL, (__m256i)bits), 16);
#elif defined(__AVX2__)
  return (f32)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (f32)(__builtin_convertvector(bits, u32) << 16);
#endif
}

TRADY_INLINE f32 widen_float16(u16_half bits) {
#if defined(__AVX512F__)
  return (f32)_mm512_maskz_cvtph_ps(ALL, (__m256i)bits);
#elif defined(__F16C__)
  return (f32)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__ARM_FEATURE_SVE)
  return __builtin_convertvector((half_precision)bits, f32);
#elif defined(__aarch64__)
  return (f32)vcvt_f32_f16((float16x4_t)bits);
#else
  const u32 x = __builtin_convertvector(bits, u32);
  const u32 magnitude = x & 0x7fffu;
  const u32 denormal = (u32)(magnitude < 0x0400u);
  const u32 special = (u32)(magnitude >= 0x7c00u);
  const u32 small = (u32)(__builtin_convertvector((i32)magnitude, f32) * 0x1p-24f);
  const u32 large = (magnitude << 13) + (112u << 23) + (special & (112u << 23));
  return (f32)((denormal & small) | (~denormal & large) | ((x & 0x8000u) << 16));
#endif
}

// ---- narrowing ------------------------------------------------------------------------------------------

// To the nearest, ties to even, as ATen rounds; NaN stays NaN.
TRADY_INLINE u16_half narrow_bfloat16(f32 value) {
  const u32 x = (u32)value;
  const u32 nan = (u32)(value != value);
  const u32 rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  const u32 quiet = (x >> 16) | 0x40u;
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), u16_half);
}

TRADY_INLINE u16_half narrow_float16(f32 value) {
#if defined(__AVX512F__)
  return (u16_half)_mm512_maskz_cvtps_ph(ALL, (__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (u16_half)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_FEATURE_SVE)
  return (u16_half) __builtin_convertvector(value, half_precision);
#elif defined(__aarch64__)
  return (u16_half)vcvt_f16_f32((float32x4_t)value);
#else
  const u32 x = (u32)value;
  const u32 magnitude = x & 0x7fffffffu;
  const u32 nan = (u32)(value != value);
  const u32 huge = (u32)((i32)magnitude >= 0x47800000);  // 2^16
  const u32 small = (u32)((i32)magnitude < 0x38800000);  // 2^-14: a denormal, its last place is that of 0.5f
  const u32 denormal = (u32)((f32)magnitude + 0.5f) - 0x3f000000u;
  const u32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32 special = 0x7c00u | (nan & 0x0200u);
  const u32 finite = (small & denormal) | (~small & normal);
  return __builtin_convertvector((huge & special) | (~huge & finite) | ((x >> 16) & 0x8000u), u16_half);
#endif
}

// ---- loads and stores -------------------------------------------------------------------------------------

// LANES<T> elements from any address, widened.
TRADY_INLINE f32 load(const float* p) { return *reinterpret_cast<const f32_memory*>(p); }
TRADY_INLINE f64 load(const double* p) { return *reinterpret_cast<const f64_memory*>(p); }
TRADY_INLINE f32 load(const bfloat16* p) { return widen_bfloat16(*reinterpret_cast<const u16_half_memory*>(p)); }
TRADY_INLINE f32 load(const float16* p) { return widen_float16(*reinterpret_cast<const u16_half_memory*>(p)); }

TRADY_INLINE void store(float* p, f32 value) { *reinterpret_cast<f32_memory*>(p) = value; }
TRADY_INLINE void store(double* p, f64 value) { *reinterpret_cast<f64_memory*>(p) = value; }
TRADY_INLINE void store(bfloat16* p, f32 value) { *reinterpret_cast<u16_half_memory*>(p) = narrow_bfloat16(value); }
TRADY_INLINE void store(float16* p, f32 value) { *reinterpret_cast<u16_half_memory*>(p) = narrow_float16(value); }

#if defined(__AVX512F__)
constexpr bool MASKED_LOADS = true;  // load_first() costs little more than load(): on Intel a turn of a multiply-add
#else
constexpr bool MASKED_LOADS = false;
#endif

// The first `count` lanes (0 <= count <= LANES<T>); the others are zero, and their memory is not touched.
#if defined(__AVX512F__)
TRADY_INLINE f32 load_first(const float* p, int count) {
  return (f32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}
TRADY_INLINE f64 load_first(const double* p, int count) {
  return (f64)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1u), p);
}
TRADY_INLINE f32 load_first(const bfloat16* p, int count) {
  return widen_bfloat16((u16_half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p));
}
TRADY_INLINE f32 load_first(const float16* p, int count) {
  return widen_float16((u16_half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p));
}
TRADY_INLINE void store_first(float* p, f32 value, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)value);
}
TRADY_INLINE void store_first(double* p, f64 value, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1u), (__m512d)value);
}
#else
#if defined(__AVX2__)
TRADY_INLINE f32 load_first(const float* p, int count) {
  return (f32)_mm256_maskload_ps(p, (__m256i)(i32{0, 1, 2, 3, 4, 5, 6, 7} < count));
}
TRADY_INLINE f64 load_first(const double* p, int count) {
  return (f64)_mm256_maskload_pd(p, (__m256i)(i64{0, 1, 2, 3} < int64_t{count}));
}
#endif
template <class T>
TRADY_INLINE vector_of<T> load_first(const T* p, int count) {
  scalar_of<T> lanes[LANES<T>] = {};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = widen(p[lane]);
  return load(lanes);
}
template <class T>
TRADY_INLINE void store_first(T* p, vector_of<T> value, int count) {
  for (int lane = 0; lane < count; ++lane) p[lane] = value[lane];
}
#endif

// Every lane the element. (An addition to zero would stay one, for the sake of -0: on x86 it takes up both units of the
// multiply-adds, where a broadcast from memory takes none.)
TRADY_INLINE f32 broadcast(const float* p) { return *p - f32{}; }
TRADY_INLINE f64 broadcast(const double* p) { return *p - f64{}; }

// ---- permutations ---------------------------------------------------------------------------------------------

// Lane i of the result is lane index[i] of a, or of b where index[i] is past a's last. With constant indices both
// compilers make it the permutations of the instruction set.
template <class V, class I>
TRADY_INLINE V shuffle(V a, V b, I index) {
#if defined(__clang__)
  constexpr int lanes = lanes_of<V>;
  V result;
  for (int lane = 0; lane < lanes; ++lane) {
    const int from = static_cast<int>(index[lane]);
    result[lane] = from < lanes ? a[from] : b[from - lanes];
  }
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Lanes 0, 2, 4, ... of a, then those of b.
template <class V>
TRADY_INLINE V even_lanes(V a, V b) {
  index_of<V> even;
  for (int lane = 0; lane < lanes_of<V>; ++lane) even[lane] = static_cast<decltype(+even[0])>(2 * lane);
  return shuffle(a, b, even);
}

// Lanes 1, 3, 5, ... of a, then those of b.
template <class V>
TRADY_INLINE V odd_lanes(V a, V b) {
  index_of<V> odd;
  for (int lane = 0; lane < lanes_of<V>; ++lane) odd[lane] = static_cast<decltype(+odd[0])>(2 * lane + 1);
  return shuffle(a, b, odd);
}

// Lanes 0, 2, 4, ... of a, then 1, 3, 5, ... of b.
template <class V>
TRADY_INLINE V even_then_odd_lanes(V a, V b) {
  constexpr int count = lanes_of<V>;
  index_of<V> index;
  for (int lane = 0; lane < count; ++lane) index[lane] = static_cast<decltype(+index[0])>(2 * lane + 2 * lane / count);
  return shuffle(a, b, index);
}

// rows[i][j] becomes rows[j][i]: pairs of vectors are interleaved until each holds a column.
template <class V>
TRADY_INLINE void transpose(V (&rows)[lanes_of<V>]) {
  constexpr int count = lanes_of<V>;
  index_of<V> low, high;
  for (int lane = 0; lane < count; ++lane) {
    const int from = lane / 2 + lane % 2 * count;
    low[lane] = static_cast<decltype(+low[0])>(from);
    high[lane] = static_cast<decltype(+low[0])>(from + count / 2);
  }
#pragma GCC unroll 4
  for (int step = 1; step < count; step *= 2) {
    V next[count];
#pragma GCC unroll 8
    for (int i = 0; i < count / 2; ++i) {
      next[2 * i] = shuffle(rows[i], rows[i + count / 2], low);
      next[2 * i + 1] = shuffle(rows[i], rows[i + count / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) rows[i] = next[i];
  }
}

#if defined(__AVX512F__)
// Lane i of the result is lane index[i] of `from` where bit i of `lanes` is set, and that of `into` elsewhere.
TRADY_INLINE f32 permute_into(f32 into, uint32_t lanes, i32 index, f32 from) {
  return (f32)_mm512_mask_permutexvar_ps((__m512)into, static_cast<__mmask16>(lanes), (__m512i)index, (__m512)from);
}
TRADY_INLINE f64 permute_into(f64 into, uint32_t lanes, i64 index, f64 from) {
  return (f64)_mm512_mask_permutexvar_pd((__m512d)into, static_cast<__mmask8>(lanes), (__m512i)index, (__m512d)from);
}
#endif

// ---- operands of multiply-adds --------------------------------------------------------------------------------

// What a loop of multiply-adds over elements of P reads at a time: OPERANDS<P> of them in an operand_of<P>. For
// bfloat16, on CPUs that multiply pairs of them, that is as many pairs as there are lanes; otherwise a vector of
// floats.
#if defined(__AVX512BF16__) || (defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(__ARM_FEATURE_SVE))
#define TRADY_MULTIPLIES_BFLOAT16
constexpr bool MULTIPLIES_BFLOAT16 = true;
#else
constexpr bool MULTIPLIES_BFLOAT16 = false;
#endif

template <class P>
struct Operand {
  using type = vector_of<P>;
};
#if defined(TRADY_MULTIPLIES_BFLOAT16)
template <>
struct Operand<bfloat16> {
  using type = u16;
};
#endif
template <class P>
using operand_of = typename Operand<P>::type;
template <class P>
constexpr int OPERANDS = MULTIPLIES_BFLOAT16 && is_same<P, bfloat16> ? 2 * LANES<P> : LANES<P>;

template <class P>
TRADY_INLINE operand_of<P> load_operand(const P* p) {
  return load(p);
}
template <class P>
TRADY_INLINE operand_of<P> load_first_operand(const P* p, int count) {
  return load_first(p, count);
}
template <class P>
TRADY_INLINE void store_operand(P* p, operand_of<P> value) {
  store(p, value);
}
// The operand whose every lane is the element, or the pair that begins there; without its second one unless `whole`.
template <class P>
TRADY_INLINE operand_of<P> broadcast_operand(const P* p, bool) {
  return broadcast(p);
}
template <class A>
TRADY_INLINE A multiply_add(A sum, A a, A b) {
  return sum + a * b;
}
#if defined(TRADY_MULTIPLIES_BFLOAT16)
TRADY_INLINE u16 load_operand(const bfloat16* p) { return *reinterpret_cast<const u16_memory*>(p); }
TRADY_INLINE u16 load_first_operand(const bfloat16* p, int count) {
#if defined(__AVX512BF16__)
  return (u16)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
#else
  u16 value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = p[lane].bits;
  return value;
#endif
}
TRADY_INLINE void store_operand(bfloat16* p, u16 value) { *reinterpret_cast<u16_memory*>(p) = value; }
TRADY_INLINE u16 broadcast_operand(const bfloat16* p, bool whole) {
  typedef uint32_t pair_memory __attribute__((aligned(2), may_alias));
  return (u16)(u32{} + (whole ? *reinterpret_cast<const pair_memory*>(p) : p->bits));
}
// Lane i gains the products of elements 2 i and 2 i + 1. The instructions take denormals for zero.
TRADY_INLINE f32 multiply_add(f32 sum, u16 a, u16 b) {
#if defined(__AVX512BF16__)
  return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  // Kept, since GCC 12 writes a constant 1 of bfloat16 as that of float16, which as bfloat16 is 2^-7.
  return (f32)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_u16((uint16x8_t)keep(a)),
                          vreinterpretq_bf16_u16((uint16x8_t)keep(b)));
#endif
}
#endif

// The operand that multiplies by one.
template <class P>
TRADY_INLINE operand_of<P> ones() {
  if constexpr (sizeof(operand_of<P>{}[0]) == 2)
    return operand_of<P>{} + static_cast<uint16_t>(0x3f80);  // of bfloat16
  else
    return operand_of<P>{} + 1;
}

// LANES<bfloat16> elements as they are, or the first `count` of them beside zeros.
TRADY_INLINE u16_half load_half(const bfloat16* p) { return *reinterpret_cast<const u16_half_memory*>(p); }
TRADY_INLINE u16_half load_first_half(const bfloat16* p, int count) {
#if defined(__AVX512F__)
  return (u16_half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p);
#else
  u16_half value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = p[lane].bits;
  return value;
#endif
}

// Lane i holds a[i] in its low half and b[i] in its high half: a pair of rows, for dot2().
TRADY_INLINE f32 interleave(u16_half a, u16_half b) {
#if defined(__AVX512BW__)
  // One permutation instead of two widenings, a shift and an or. GCC would join the halves in memory, by stores that
  // the load after them has to wait for.
  constexpr u16 order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const u16 both = (u16)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
  return (f32)shuffle(both, both, order);
#else
  return (f32)(__builtin_convertvector(a, u32) | (__builtin_convertvector(b, u32) << 16));
#endif
}

// sum + x.low * y.low + x.high * y.high of bfloat16; x is one pair for all lanes.
TRADY_INLINE f32 dot2(f32 sum, float x, f32 y) {
  const uint32_t pair = __builtin_bit_cast(uint32_t, x);
  if constexpr (MULTIPLIES_BFLOAT16)
    return multiply_add(sum, (operand_of<bfloat16>)(u32{} + pair), (operand_of<bfloat16>)y);
  sum += __builtin_bit_cast(float, pair << 16) * (f32)((u32)y << 16);
  return sum + __builtin_bit_cast(float, pair & 0xffff0000u) * (f32)((u32)y & 0xffff0000u);
}

// OPERANDS<P> elements of S, or the first `count` of them, as an operand.
template <class P, class S>
TRADY_INLINE operand_of<P> load_as(const S* p) {
  if constexpr (is_same<P, S>)
    return load_operand(p);
  else
    return load(p);
}
template <class P, class S>
TRADY_INLINE operand_of<P> load_first_as(const S* p, int count) {
  if constexpr (is_same<P, S>)
    return load_first_operand(p, count);
  else
    return load_first(p, count);
}
template <class P, class S>
TRADY_INLINE P element_as(S x) {
  if constexpr (is_same<P, S>)
    return x;
  else
    return widen(x);
}

// Rows in[r * in_step + pixel], of `rows` <= LANES outputs or channels, become one operand a step, out_step apart, of
// all rows. Writes whole vectors, and up to LANES - 1 steps too many.
template <class P, class S>
void turn_over(const S* in, int64_t in_step, int64_t rows, int64_t pixels, scalar_of<P>* out, int64_t out_step) {
  constexpr int VL = LANES<P>;
  for (int64_t p = 0; p < pixels; p += OPERANDS<P>, out += VL * out_step) {
    const int count = static_cast<int>(pixels - p < OPERANDS<P> ? pixels - p : OPERANDS<P>);
    vector_of<P> block[VL];
    if (rows == VL && count == OPERANDS<P>) {
#pragma GCC unroll 16
      for (int r = 0; r < VL; r++) block[r] = (vector_of<P>)load_as<P>(in + r * in_step + p);
    } else {
      for (int r = 0; r < VL; r++)
        block[r] = r < rows ? (vector_of<P>)load_first_as<P>(in + r * in_step + p, count) : vector_of<P>{};
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) store(out + i * out_step, block[i]);
  }
}

// ---- reductions -----------------------------------------------------------------------------------------------

// By halves; on vectors that are no larger than what is left of them.
template <class V>
TRADY_INLINE auto sum(V value) {
  constexpr int lanes = lanes_of<V>;
  if constexpr (lanes == 2) {
    return value[0] + value[1];
  } else {
    typedef decltype(value[0] + value[0]) half __attribute__((vector_size(sizeof(V) / 2)));
    struct Halves {
      half low, high;
    };
    const auto halves = __builtin_bit_cast(Halves, value);
    return sum(halves.low + halves.high);
  }
}

// Lane i of the result is the sum of v[i]'s lanes.
template <class V, int COUNT>
TRADY_INLINE V sum_each(const V* v) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    const V a = sum_each<V, COUNT / 2>(v), b = sum_each<V, COUNT / 2>(v + COUNT / 2);
    return even_lanes(a, b) + odd_lanes(a, b);
  }
}
// sums[i] = the sum of v[i]'s lanes; up to a whole vector behind the last is written too.
template <class V, int COUNT, class T>
TRADY_INLINE void sum_lanes(const V (&v)[COUNT], T* sums) {
#pragma GCC unroll 8
  for (int first = 0; first < COUNT; first += lanes_of<V>) {
    V group[lanes_of<V>];
#pragma GCC unroll 16
    for (int i = 0; i < lanes_of<V>; i++) group[i] = first + i < COUNT ? v[first + i] : V{};
    store(sums + first, sum_each<V, lanes_of<V>>(group));
  }
}

}  // namespace
}  // namespace trady::TRADY_ISA
