#include "max_pool2d.h"

#include <string.h>

#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

// Integers of the width of a lane, in which a window's offsets travel beside the values.
template <class T>
struct OffsetsOf {
  typedef int32_t type __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct OffsetsOf<double> {
  typedef int64_t type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T>
using offsets_of = typename OffsetsOf<T>::type;
typedef offsets_of<double> i64;

constexpr int64_t LARGEST_WINDOW = 256;
constexpr double INFINITE = __builtin_inf();

// ---- vectors -------------------------------------------------------------------------------------------

// A later value wins if it is larger or NaN, which is ATen's rule: the first maximum, and the last NaN.
TRADY_INLINE void challenge(f32& best, i32& winner, f32 value, i32 offset) {
#if defined(__AVX512F__)
  const __mmask16 wins = static_cast<__mmask16>(_mm512_cmp_ps_mask((__m512)value, (__m512)best, _CMP_GT_OQ) |
                                                _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q));
  best = (f32)_mm512_mask_mov_ps((__m512)best, wins, (__m512)value);
  winner = (i32)_mm512_mask_mov_epi32((__m512i)winner, wins, (__m512i)offset);
#else
  const i32 wins = (i32)(value > best) | (i32)(value != value);
  best = (f32)((wins & (i32)value) | (~wins & (i32)best));
  winner = (wins & offset) | (~wins & winner);
#endif
}
TRADY_INLINE void challenge(f64& best, i64& winner, f64 value, i64 offset) {
#if defined(__AVX512F__)
  const __mmask8 wins = static_cast<__mmask8>(_mm512_cmp_pd_mask((__m512d)value, (__m512d)best, _CMP_GT_OQ) |
                                              _mm512_cmp_pd_mask((__m512d)value, (__m512d)value, _CMP_UNORD_Q));
  best = (f64)_mm512_mask_mov_pd((__m512d)best, wins, (__m512d)value);
  winner = (i64)_mm512_mask_mov_epi64((__m512i)winner, wins, (__m512i)offset);
#else
  const i64 wins = (i64)(value > best) | (i64)(value != value);
  best = (f64)((wins & (i64)value) | (~wins & (i64)best));
  winner = (wins & offset) | (~wins & winner);
#endif
}

// Offsets to bytes. GCC's own conversions go element by element.
TRADY_INLINE void store_bytes(uint8_t* p, i32 offsets) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(ALL, (__m512i)offsets);
  memcpy(p, &bytes, 16);
#elif defined(__AVX2__)
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128((__m256i)offsets), _mm256_extracti128_si256((__m256i)offsets, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  memcpy(p, &bytes, 8);
#else
  for (int lane = 0; lane < LANES<float>; ++lane) p[lane] = static_cast<uint8_t>(offsets[lane]);
#endif
}
TRADY_INLINE void store_bytes(uint8_t* p, i64 offsets) {
  for (int lane = 0; lane < LANES<double>; ++lane) p[lane] = static_cast<uint8_t>(offsets[lane]);
}

template <class T>
TRADY_INLINE void store_some(T* p, vector_of<T> value, int count) {
  if (count == LANES<T>) return store(p, value);
  T all[LANES<T>];
  store(all, value);
  memcpy(p, all, static_cast<size_t>(count) * sizeof(T));
}
template <class T>
TRADY_INLINE void store_some_bytes(uint8_t* p, offsets_of<scalar_of<T>> offsets, int count) {
  if (count == LANES<T>) return store_bytes(p, offsets);
  uint8_t all[LANES<T>];
  store_bytes(all, offsets);
  memcpy(p, all, static_cast<size_t>(count));
}
template <class T>
TRADY_INLINE vector_of<T> load_some(const T* p, int count) {
  return count == LANES<T> ? load(p) : load_first(p, count);
}

// The gradients of those windows whose winner is at `offset`, zero for the others.
template <class T>
TRADY_INLINE vector_of<T> won(const T* gradients, const uint8_t* offsets, int offset) {
  using V = vector_of<T>;
  using I = offsets_of<scalar_of<T>>;
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_of<T>) == 4) {
    __m128i bytes;
    memcpy(&bytes, offsets, 16);
    const __mmask16 wins = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(offset)));
    return (V)_mm512_maskz_mov_ps(wins, (__m512)load(gradients));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(scalar_of<T>) == 4) {
    int64_t bytes;
    memcpy(&bytes, offsets, 8);
    const i32 wide = (i32)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
    return (V)((I)(wide == offset) & (I)load(gradients));
  }
#endif
  I wide;
  for (int lane = 0; lane < LANES<T>; ++lane) wide[lane] = offsets[lane];
  return (V)((I)(wide == offset) & (I)load(gradients));
}

// f(i, LANES<T>) for vectors that cover [0, count), the last two of which may overlap; f(0, count) where none fits.
template <class T, class F>
TRADY_INLINE void over(int64_t count, const F& f) {
  constexpr int L = LANES<T>;
  if (count < L) return f(int64_t{0}, static_cast<int>(count));
  int64_t i = 0;
  for (; i + L <= count; i += L) f(i, L);
  if (i < count) f(count - L, L);
}

TRADY_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TRADY_INLINE int64_t ceiling(int64_t a, int64_t b) { return b == 1 ? a : (a + b - 1) / b; }  // a > -b

// The part [begin, end) of a window's rows or columns that lies in the input, for the window at `out`.
struct Range {
  int64_t begin, end;
};
TRADY_INLINE Range inside(const MaxPool2d& pool, int axis, int64_t out) {
  const int64_t start = out * pool.stride[axis] - pool.padding[axis];
  const int64_t begin = start < 0 ? ceiling(-start, pool.dilation[axis]) : 0;
  const int64_t end = ceiling(pool.size[axis] - start, pool.dilation[axis]);
  return {begin, smaller(end, pool.kernel[axis])};
}

// A window along one axis that holds some element: where it is, and as which of its rows or columns.
struct Holder {
  int64_t out;
  int64_t at;
};
// For each element of an axis, first to last window: holders[first[i]] to holders[first[i + 1] - 1].
struct Holders {
  int64_t* first;
  Holder* holders;
};
TRADY_INLINE int64_t holders_bytes(const MaxPool2d& pool, int axis) {
  return (pool.size[axis] + 1) * static_cast<int64_t>(sizeof(int64_t)) +
         pool.out_size[axis] * pool.kernel[axis] * static_cast<int64_t>(sizeof(Holder));
}
Holders holders_of(const MaxPool2d& pool, int axis, char*& scratch) {
  Holders result;
  result.first = reinterpret_cast<int64_t*>(scratch);
  result.holders = reinterpret_cast<Holder*>(result.first + pool.size[axis] + 1);
  scratch += holders_bytes(pool, axis);
  int64_t count = 0;
  for (int64_t i = 0; i < pool.size[axis]; ++i) {
    result.first[i] = count;
    const int64_t last = i + pool.padding[axis];
    const int64_t before = last - pool.dilation[axis] * (pool.kernel[axis] - 1);
    const int64_t begin = before <= 0 ? 0 : ceiling(before, pool.stride[axis]);
    const int64_t end = smaller(last / pool.stride[axis] + 1, pool.out_size[axis]);
    for (int64_t out = begin; out < end; ++out) {
      const int64_t distance = last - out * pool.stride[axis];
      if (distance % pool.dilation[axis] == 0) result.holders[count++] = {out, distance / pool.dilation[axis]};
    }
  }
  result.first[pool.size[axis]] = count;
  return result;
}

// ---- channels innermost ---------------------------------------------------------------------------------

template <class T>
void rows(const MaxPool2d& pool, const Images& input, T* output, uint8_t* offsets, int64_t begin, int64_t end) {
  using V = vector_of<T>;
  using I = offsets_of<scalar_of<T>>;
  const int64_t channels = pool.channels, height = pool.out_size[0], width = pool.out_size[1];
  const int64_t down = input.row * pool.dilation[0], right = input.column * pool.dilation[1];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / height, y = i % height;
    const Range vertical = inside(pool, 0, y);
    for (int64_t x = 0; x < width; ++x) {
      const Range horizontal = inside(pool, 1, x);
      const T* corner = static_cast<const T*>(input.data) + n * input.batch +
                        (y * pool.stride[0] - pool.padding[0]) * input.row +
                        (x * pool.stride[1] - pool.padding[1]) * input.column;
      T* to = output + (i * width + x) * channels;
      uint8_t* to_offsets = offsets + (i * width + x) * channels;
      const int first = static_cast<int>(vertical.begin * pool.kernel[1] + horizontal.begin);
      over<T>(channels, [&](int64_t c, int count) INLINED {
        V best = V{} - static_cast<scalar_of<T>>(INFINITE);
        I winner = I{} + first;
        for (int64_t ky = vertical.begin; ky < vertical.end; ++ky) {
          const T* from = corner + ky * down + c;
          const int offset = static_cast<int>(ky * pool.kernel[1]);
          for (int64_t kx = horizontal.begin; kx < horizontal.end; ++kx) {
            challenge(best, winner, load_some(from + kx * right, count), I{} + (offset + static_cast<int>(kx)));
          }
        }
        store_some(to + c, best, count);
        store_some_bytes<T>(to_offsets + c, winner, count);
      });
    }
  }
}

// Gathers: each input element is written once, its windows added in their order.
template <class T>
void backward_rows(const MaxPool2d& pool, const Images& grad_output, const uint8_t* offsets, T* grad_input,
                   int64_t begin, int64_t end, char* scratch) {
  using V = vector_of<T>;
  constexpr int L = LANES<T>;
  const int64_t channels = pool.channels, height = pool.size[0], width = pool.size[1];
  const Holders vertical = holders_of(pool, 0, scratch), horizontal = holders_of(pool, 1, scratch);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / height, y = i % height;
    const Holder *above = vertical.holders + vertical.first[y], *below = vertical.holders + vertical.first[y + 1];
    const T* image = static_cast<const T*>(grad_output.data) + n * grad_output.batch;
    const uint8_t* places = offsets + n * pool.out_size[0] * pool.out_size[1] * channels;
    for (int64_t x = 0; x < width; ++x) {
      const Holder *left = horizontal.holders + horizontal.first[x],
                   *right = horizontal.holders + horizontal.first[x + 1];
      T* to = grad_input + (i * width + x) * channels;
      over<T>(channels, [&](int64_t c, int count) INLINED {
        V sum = {};
        for (const Holder* row = above; row < below; ++row) {
          for (const Holder* column = left; column < right; ++column) {
            const T* gradients = image + row->out * grad_output.row + column->out * grad_output.column + c;
            const uint8_t* winners = places + (row->out * pool.out_size[1] + column->out) * channels + c;
            const int offset = static_cast<int>(row->at * pool.kernel[1] + column->at);
            if (count == L) {
              sum += won(gradients, winners, offset);
            } else {
              T some[L] = {};
              uint8_t some_winners[L] = {};
              memcpy(some, gradients, static_cast<size_t>(count) * sizeof(T));
              memcpy(some_winners, winners, static_cast<size_t>(count));
              sum += won(some, some_winners, offset);
            }
          }
        }
        store_some(to + c, sum, count);
      });
    }
  }
}

// ---- columns innermost ----------------------------------------------------------------------------------

// Where a forward over planes keeps what it reads: an input row split by the remainder of its columns (padding
// counted, infinitely small) modulo the stride, so that the windows' column kx lies at adjacent places; and for
// `slots` input rows the best of each window in that row.
template <class T>
struct Scratch {
  using S = scalar_of<T>;
  int64_t width;  // of a row of windows, whole vectors
  int64_t part;   // of the split row
  int64_t slots;
  TRADY_INLINE explicit Scratch(const MaxPool2d& pool) {
    constexpr int L = LANES<T>;
    const int64_t stride = pool.stride[1], reach = pool.dilation[1] * (pool.kernel[1] - 1);
    width = ceiling(pool.out_size[1], L) * L;
    part = larger(width + reach / stride, (pool.size[1] + pool.padding[1]) / stride) + 2 * L;
    slots = pool.dilation[0] * (pool.kernel[0] - 1) + 1;
  }
  TRADY_INLINE int64_t bytes(const MaxPool2d& pool) const {
    return (pool.stride[1] * part + slots * width * 2 + width) * static_cast<int64_t>(sizeof(S)) +
           slots * static_cast<int64_t>(sizeof(int64_t));
  }
};

template <class T>
TRADY_INLINE void deinterleave(const T* from, scalar_of<T>* even_to, scalar_of<T>* odd_to) {
  constexpr int L = LANES<T>;
  offsets_of<scalar_of<T>> even, odd;
  for (int lane = 0; lane < L; ++lane) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
  const vector_of<T> low = load(from), high = load(from + L);
  store(even_to, shuffle(low, high, even));
  store(odd_to, shuffle(low, high, odd));
}

template <class T>
TRADY_INLINE void split_row(const MaxPool2d& pool, const T* from, scalar_of<T>* parts, int64_t part) {
  constexpr int L = LANES<T>;
  const int64_t width = pool.size[1], stride = pool.stride[1], padding = pool.padding[1];
  if (stride == 1) {
    over<T>(width,
            [&](int64_t i, int count) INLINED { store_some(parts + padding + i, load_some(from + i, count), count); });
    return;
  }
  int64_t i = 0;
  if (stride == 2 && width > 2 * L) {
    if (padding % 2 == 1) parts[part + padding / 2] = widen(from[i++]);
    scalar_of<T>*even = parts + (padding + i) / 2, *odd = even + part;
    const int64_t start = i, end = width - 2 * L;
    for (; i <= end; i += 2 * L) deinterleave(from + i, even + (i - start) / 2, odd + (i - start) / 2);
    if (i < width) {
      i = start + (end - start) / 2 * 2;
      deinterleave(from + i, even + (i - start) / 2, odd + (i - start) / 2);
      i += 2 * L;
    }
  }
  int64_t remainder = (padding + i) % stride, at = (padding + i) / stride;
  for (; i < width; ++i) {
    parts[remainder * part + at] = widen(from[i]);
    if (++remainder == stride) remainder = 0, ++at;
  }
}

template <class T>
void planes(const MaxPool2d& pool, const Images& input, T* output, uint8_t* offsets, int64_t begin, int64_t end,
            char* memory) {
  using S = scalar_of<T>;
  using V = vector_of<T>;
  using I = offsets_of<S>;
  constexpr int L = LANES<T>;
  const Scratch<T> scratch(pool);
  const int64_t width = scratch.width, stride = pool.stride[1];
  const int64_t out_height = pool.out_size[0], out_width = pool.out_size[1];
  int64_t* held = reinterpret_cast<int64_t*>(memory);  // input row of each slot
  S* parts = reinterpret_cast<S*>(held + scratch.slots);
  S* best_in_row = parts + stride * scratch.part;
  S* winner_in_row = best_in_row + scratch.slots * width;   // holds integers
  S* first_column = winner_in_row + scratch.slots * width;  // too
  for (int64_t i = 0; i < stride * scratch.part; ++i) parts[i] = static_cast<S>(-INFINITE);
  int64_t columns[LARGEST_WINDOW];  // where a split row has the windows' column kx
  for (int64_t kx = 0; kx < pool.kernel[1]; ++kx) {
    columns[kx] = kx * pool.dilation[1] % stride * scratch.part + kx * pool.dilation[1] / stride;
  }
  for (int64_t x = 0; x < width; x += L) {
    I first;
    for (int lane = 0; lane < L; ++lane) {
      const int64_t start = (x + lane) * stride - pool.padding[1];
      first[lane] = static_cast<int>(start < 0 ? ceiling(-start, pool.dilation[1]) : 0);
    }
    store(first_column + x, (V)first);
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / pool.channels, c = plane % pool.channels;
    const T* from = static_cast<const T*>(input.data) + n * input.batch + c * input.channel;
    for (int64_t slot = 0; slot < scratch.slots; ++slot) held[slot] = -1;
    for (int64_t y = 0; y < out_height; ++y) {
      const Range vertical = inside(pool, 0, y);
      const int64_t start = y * pool.stride[0] - pool.padding[0];
      int64_t at[LARGEST_WINDOW];  // of each of the window's rows
      for (int64_t ky = vertical.begin; ky < vertical.end; ++ky) {
        const int64_t row = start + ky * pool.dilation[0], slot = row % scratch.slots;
        at[ky] = slot * width;
        if (held[slot] == row) continue;
        held[slot] = row;
        split_row(pool, from + row * input.row, parts, scratch.part);
        for (int64_t x = 0; x < width; x += L) {
          V best = V{} - static_cast<S>(INFINITE);
          I winner = (I)load(first_column + x);
          for (int64_t kx = 0; kx < pool.kernel[1]; ++kx) {
            challenge(best, winner, load(parts + columns[kx] + x), I{} + static_cast<int>(kx));
          }
          store(best_in_row + slot * width + x, best);
          store(winner_in_row + slot * width + x, (V)winner);
        }
      }
      T* to = output + (plane * out_height + y) * out_width;
      uint8_t* to_offsets = offsets + (plane * out_height + y) * out_width;
      over<T>(out_width, [&](int64_t x, int count) INLINED {
        V best = load(best_in_row + at[vertical.begin] + x);
        I winner = (I)load(winner_in_row + at[vertical.begin] + x) + static_cast<int>(vertical.begin * pool.kernel[1]);
        for (int64_t ky = vertical.begin + 1; ky < vertical.end; ++ky) {
          const I offset = (I)load(winner_in_row + at[ky] + x) + static_cast<int>(ky * pool.kernel[1]);
          challenge(best, winner, load(best_in_row + at[ky] + x), offset);
        }
        store_some(to + x, best, count);
        store_some_bytes<T>(to_offsets + x, winner, count);
      });
    }
  }
}

// Columns of the input that leave the same remainder modulo the stride are met by the same columns of windows.
struct Column {
  int64_t kx, shift;  // in a row of windows, the i-th column of the remainder is column kx of window i + shift
};

// A window that may be an element's: where its gradient and its winner are, and which winner the element would be.
struct Term {
  int64_t at, offset;
};

// The backward over planes copies the rows of windows that hold an input row to places with room on both sides where
// gradients are zero, so that whole vectors of columns ask which of their windows they won.
template <class T>
struct BackwardScratch {
  int64_t before, row, slots;
  TRADY_INLINE explicit BackwardScratch(const MaxPool2d& pool) {
    const int64_t stride = pool.stride[1];
    before = pool.dilation[1] * (pool.kernel[1] - 1) / stride + 1;
    row = before + larger(pool.out_size[1], (pool.size[1] + pool.padding[1]) / stride + 1) + 2 * LANES<T>;
    slots = pool.dilation[0] * (pool.kernel[0] - 1) / pool.stride[0] + 1;
  }
  TRADY_INLINE int64_t bytes(const MaxPool2d& pool) const {
    return holders_bytes(pool, 0) + pool.kernel[1] * static_cast<int64_t>(sizeof(Column)) +
           (pool.stride[1] + 1 + slots) * static_cast<int64_t>(sizeof(int64_t)) +
           slots * row * static_cast<int64_t>(sizeof(T) + 1);
  }
};

// A row of the input's gradient: for each remainder and vector of its columns sum(remainder, i), put in its place.
template <class T, class F>
TRADY_INLINE void join(T* to, int64_t width, int64_t stride, const F& sum) {
  constexpr int L = LANES<T>;
  using V = vector_of<T>;
  if (stride == 1) {
    over<T>(width, [&](int64_t i, int count) INLINED { store_some(to + i, sum(0, i), count); });
  } else if (stride == 2) {
    offsets_of<scalar_of<T>> low, high;
    for (int lane = 0; lane < L; ++lane) {
      low[lane] = lane / 2 + lane % 2 * L;
      high[lane] = low[lane] + L / 2;
    }
    for (int64_t i = 0; 2 * i < width; i += L) {
      const V even = sum(0, i), odd = sum(1, i);
      T all[2 * L];
      const bool whole = 2 * (i + L) <= width;
      T* place = whole ? to + 2 * i : all;
      store(place, shuffle(even, odd, low));
      store(place + L, shuffle(even, odd, high));
      if (!whole) memcpy(to + 2 * i, all, static_cast<size_t>(width - 2 * i) * sizeof(T));
    }
  } else {
    for (int64_t remainder = 0; remainder < smaller(stride, width); ++remainder) {
      for (int64_t i = 0; i * stride + remainder < width; i += L) {
        T all[L];
        store(all, sum(remainder, i));
        for (int lane = 0; lane < L && (i + lane) * stride + remainder < width; ++lane) {
          to[(i + lane) * stride + remainder] = all[lane];
        }
      }
    }
  }
}

template <class T>
void backward_planes(const MaxPool2d& pool, const Images& grad_output, const uint8_t* offsets, T* grad_input,
                     int64_t begin, int64_t end, char* memory) {
  using V = vector_of<T>;
  const BackwardScratch<T> scratch(pool);
  const Holders vertical = holders_of(pool, 0, memory);
  const int64_t height = pool.size[0], width = pool.size[1], stride = pool.stride[1];
  const int64_t out_height = pool.out_size[0], out_width = pool.out_size[1];
  Column* columns = reinterpret_cast<Column*>(memory);
  int64_t* first = reinterpret_cast<int64_t*>(columns + pool.kernel[1]);  // column of each remainder
  int64_t* held = first + stride + 1;                                     // row of windows of each slot
  T* gradients = reinterpret_cast<T*>(held + scratch.slots);
  uint8_t* winners = reinterpret_cast<uint8_t*>(gradients + scratch.slots * scratch.row);
  memset(gradients, 0, static_cast<size_t>(scratch.slots * scratch.row) * (sizeof(T) + 1));
  int64_t count = 0;
  for (int64_t remainder = 0; remainder < stride; ++remainder) {
    first[remainder] = count;
    for (int64_t kx = pool.kernel[1] - 1; kx >= 0; --kx) {  // later columns are those of earlier windows
      const int64_t distance = remainder + pool.padding[1] - kx * pool.dilation[1];
      if (distance % stride == 0) columns[count++] = {kx, distance / stride};
    }
  }
  first[stride] = count;
  Term terms[LARGEST_WINDOW];
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t n = plane / pool.channels, c = plane % pool.channels;
    const T* from = static_cast<const T*>(grad_output.data) + n * grad_output.batch + c * grad_output.channel;
    for (int64_t slot = 0; slot < scratch.slots; ++slot) held[slot] = -1;
    for (int64_t y = 0; y < height; ++y) {
      const Holder *above = vertical.holders + vertical.first[y], *below = vertical.holders + vertical.first[y + 1];
      const int64_t held_by = below - above;
      for (const Holder* row = above; row < below; ++row) {
        const int64_t slot = row->out % scratch.slots, start = slot * scratch.row + scratch.before;
        for (int64_t remainder = 0; remainder < stride; ++remainder) {
          const int64_t some = first[remainder + 1] - first[remainder];
          Term* to = terms + first[remainder] * held_by + (row - above) * some;
          for (int64_t k = 0; k < some; ++k) {
            const Column& column = columns[first[remainder] + k];
            to[k] = {start + column.shift, row->at * pool.kernel[1] + column.kx};
          }
        }
        if (held[slot] == row->out) continue;
        held[slot] = row->out;
        memcpy(gradients + start, from + row->out * grad_output.row, static_cast<size_t>(out_width) * sizeof(T));
        memcpy(winners + start, offsets + (plane * out_height + row->out) * out_width, static_cast<size_t>(out_width));
      }
      join(grad_input + (plane * height + y) * width, width, stride, [&](int64_t remainder, int64_t i) INLINED {
        V sum = {};
        const Term* end = terms + first[remainder + 1] * held_by;
        for (const Term* term = terms + first[remainder] * held_by; term < end; ++term) {
          const int64_t at = term->at + i;
          sum += won(gradients + at, winners + at, static_cast<int>(term->offset));
        }
        return sum;
      });
    }
  }
}

// ---- windows that overlap much --------------------------------------------------------------------------

TRADY_INLINE void add(float* sum, float value) { *sum += value; }
TRADY_INLINE void add(double* sum, double value) { *sum += value; }
TRADY_INLINE void add(bfloat16* sum, bfloat16 value) {
  const float wide = widen(*sum) + widen(value);
  const uint32_t bits = __builtin_bit_cast(uint32_t, wide);
  sum->bits = static_cast<uint16_t>(wide != wide ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
TRADY_INLINE void add(float16* sum, float16 value) {
#if defined(__F16C__)
  sum->bits = _cvtss_sh(_cvtsh_ss(sum->bits) + _cvtsh_ss(value.bits), _MM_FROUND_TO_NEAREST_INT);
#else
  sum->bits = narrow_float16(f32{} + (widen(*sum) + widen(value)))[0];
#endif
}

// Adds each gradient where its window's winner is: one addition for each, however many windows hold an element. An
// item has `inner` channels side by side. Offsets may be anybody's: what would fall outside is dropped.
template <class T, bool CHANNELS_LAST>
void backward_scatter(const MaxPool2d& pool, const Images& grad_output, const uint8_t* offsets, T* grad_input,
                      int64_t begin, int64_t end) {
  const int64_t inner = CHANNELS_LAST ? pool.channels : 1, outer = CHANNELS_LAST ? 1 : pool.channels;
  const int64_t width = pool.size[1], out_width = pool.out_size[1];
  const uint64_t count = static_cast<uint64_t>(pool.size[0] * width * inner);
  int64_t places[LARGEST_WINDOW] = {};
  for (int64_t offset = 0, ky = 0; ky < pool.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < pool.kernel[1]; ++kx, ++offset) {
      places[offset] = (ky * pool.dilation[0] * width + kx * pool.dilation[1]) * inner;
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* item =
        static_cast<const T*>(grad_output.data) + i / outer * grad_output.batch + i % outer * grad_output.channel;
    const uint8_t* winners = offsets + i * pool.out_size[0] * out_width * inner;
    T* to = grad_input + i * static_cast<int64_t>(count);
    memset(to, 0, count * sizeof(T));
    for (int64_t y = 0; y < pool.out_size[0]; ++y) {
      int64_t corner = ((y * pool.stride[0] - pool.padding[0]) * width - pool.padding[1]) * inner;
      const T* from = item + y * grad_output.row;
      for (int64_t x = 0; x < out_width; ++x) {
        for (int64_t c = 0; c < inner; ++c) {
          const int64_t at = corner + places[winners[c]] + c;
          if (static_cast<uint64_t>(at) < count) add(to + at, from[c]);
        }
        winners += inner;
        from += grad_output.column;
        corner += pool.stride[1] * inner;
      }
    }
  }
}

}  // namespace

#define TRADY_FOR_DTYPE(dtype, call) \
  switch (dtype) {                   \
    case Dtype::float32:             \
      call(float);                   \
      break;                         \
    case Dtype::float64:             \
      call(double);                  \
      break;                         \
    case Dtype::bfloat16:            \
      call(bfloat16);                \
      break;                         \
    case Dtype::float16:             \
      call(float16);                 \
      break;                         \
  }

int64_t max_pool2d_scratch(const MaxPool2d& pool) {
  int64_t bytes = 0;
#define TRADY_CALL(T) bytes = Scratch<T>(pool).bytes(pool)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
  return bytes;
}

int64_t max_pool2d_backward_scratch(const MaxPool2d& pool) {
  int64_t bytes = 0;
#define TRADY_CALL(T) bytes = BackwardScratch<T>(pool).bytes(pool)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
  return larger(bytes, holders_bytes(pool, 0) + holders_bytes(pool, 1));
}

void max_pool2d_planes(const MaxPool2d& pool, const Images& input, void* output, uint8_t* offsets, int64_t begin,
                       int64_t end, char* scratch) {
#define TRADY_CALL(T) planes(pool, input, static_cast<T*>(output), offsets, begin, end, scratch)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
}

void max_pool2d_rows(const MaxPool2d& pool, const Images& input, void* output, uint8_t* offsets, int64_t begin,
                     int64_t end) {
#define TRADY_CALL(T) rows(pool, input, static_cast<T*>(output), offsets, begin, end)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
}

void max_pool2d_backward_planes(const MaxPool2d& pool, const Images& grad_output, const uint8_t* offsets,
                                void* grad_input, int64_t begin, int64_t end, char* scratch) {
#define TRADY_CALL(T) backward_planes(pool, grad_output, offsets, static_cast<T*>(grad_input), begin, end, scratch)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
}

void max_pool2d_backward_rows(const MaxPool2d& pool, const Images& grad_output, const uint8_t* offsets,
                              void* grad_input, int64_t begin, int64_t end, char* scratch) {
#define TRADY_CALL(T) backward_rows(pool, grad_output, offsets, static_cast<T*>(grad_input), begin, end, scratch)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
}

void max_pool2d_backward_scatter(const MaxPool2d& pool, const Images& grad_output, const uint8_t* offsets,
                                 void* grad_input, bool channels_last, int64_t begin, int64_t end) {
#define TRADY_CALL(T)                                                                                  \
  (channels_last ? backward_scatter<T, true> : backward_scatter<T, false>)(pool, grad_output, offsets, \
                                                                           static_cast<T*>(grad_input), begin, end)
  TRADY_FOR_DTYPE(pool.dtype, TRADY_CALL)
#undef TRADY_CALL
}

}  // namespace trady::TRADY_ISA
