// conv2d_channel_grad of depthwise layers: a plane of the input against a plane of grad_output.
//
// Each plane is read once and where it lies. A strip of grad_output's rows stays in registers while the rows of the
// input that it meets go by; what padding would add is masked off. All taps are accumulated in registers over all
// images, so there is one reduction for each result.
#include "conv2d_channel_grad.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

#if defined(__AVX512F__) || defined(__AVX2__)

// Lanes [low, high).
template <class T>
struct Range;
#if defined(__AVX512F__)
template <class T>
struct Range {
  __mmask16 bits;
  TRADY_INLINE Range() : bits(0) {}
  TRADY_INLINE Range(int low, int high)
      : bits(static_cast<__mmask16>(high > low ? ((1u << high) - 1u) & ~((1u << low) - 1u) : 0)) {}
  // In a mask register from here on: on its way there it takes a unit that multiply-adds need.
  TRADY_INLINE Range kept() const {
    Range range = *this;
    asm("" : "+k"(range.bits));
    return range;
  }
};
TRADY_INLINE f32 load_where(const float* p, Range<float> lanes) { return (f32)_mm512_maskz_loadu_ps(lanes.bits, p); }
TRADY_INLINE f64 load_where(const double* p, Range<double> lanes) {
  return (f64)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.bits), p);
}
TRADY_INLINE f32 load_where(const bfloat16* p, Range<float> lanes) {
  return widen_bfloat16((u16_half)_mm256_maskz_loadu_epi16(lanes.bits, p));
}
TRADY_INLINE f32 load_where(const float16* p, Range<float> lanes) {
  return widen_float16((u16_half)_mm256_maskz_loadu_epi16(lanes.bits, p));
}
#else
template <>
struct Range<float> {
  __m256i bits;
  TRADY_INLINE Range() : bits() {}
  TRADY_INLINE Range(int low, int high) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    bits = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(low - 1)),
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane));
  }
  TRADY_INLINE Range kept() const { return *this; }
};
template <>
struct Range<double> {
  __m256i bits;
  TRADY_INLINE Range() : bits() {}
  TRADY_INLINE Range(int low, int high) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    bits = _mm256_and_si256(_mm256_cmpgt_epi64(lane, _mm256_set1_epi64x(low - 1)),
                            _mm256_cmpgt_epi64(_mm256_set1_epi64x(high), lane));
  }
  TRADY_INLINE Range kept() const { return *this; }
};
TRADY_INLINE f32 load_where(const float* p, Range<float> lanes) { return (f32)_mm256_maskload_ps(p, lanes.bits); }
TRADY_INLINE f64 load_where(const double* p, Range<double> lanes) { return (f64)_mm256_maskload_pd(p, lanes.bits); }
#endif

TRADY_INLINE int clamp_lane(int64_t value, int lanes) {
  return value < 0 ? 0 : value > lanes ? lanes : static_cast<int>(value);
}

// How a vector of output columns meets an input row: in lanes that padding, or the last output, cuts off; in all of
// them; or, at stride 2, in so few elements that two vectors hold those of all kernel columns.
enum class Reading { masked, whole, narrow };

// What a vector of output columns meets in an input row, for each kernel column.
template <class T, int KERNEL, int STRIDE>
struct Columns {
  Reading reading;
  Range<T> outputs;
  Range<T> inputs[KERNEL][STRIDE];
  TRADY_INLINE Columns() {}
  TRADY_INLINE Columns(int64_t column, const Conv2dChannelGrad& q) {
    constexpr int VL = LANES<T>;
    const int count = clamp_lane(q.out_width - column, VL);
    outputs = Range<T>(0, count);
    const int64_t left = column * STRIDE - q.padding[1];
    reading = count == VL && left >= 0 && left + (VL - 1) * STRIDE + KERNEL <= q.width ? Reading::whole
              : STRIDE == 2 && (count - 1) * STRIDE + KERNEL <= STRIDE * VL            ? Reading::narrow
                                                                                       : Reading::masked;
    for (int j = 0; j < KERNEL; j++)
      for (int part = 0; part < STRIDE; part++) {
        // Lane l reads element first + l; past the last output nothing is read, so that no value there gets in.
        const int64_t first = left + (reading == Reading::narrow ? 0 : j) + part * VL;
        const int64_t needed =
            static_cast<int64_t>(count - 1) * STRIDE + 1 - part * VL + (reading == Reading::narrow ? KERNEL - 1 : 0);
        const int64_t existing = q.width - first;
        inputs[j][part] = Range<T>(clamp_lane(-first, VL), clamp_lane(needed < existing ? needed : existing, VL));
      }
  }
};

// Lanes j, j + 2, j + 4, ... of a and then b.
template <int J, class V>
TRADY_INLINE V every_second(V a, V b) {
  index_of<V> index;
  for (int lane = 0; lane < lanes_of<V>; lane++) {
    const int from = J + 2 * lane;
    index[lane] = static_cast<decltype(+index[0])>(from < 2 * lanes_of<V> ? from : 0);  // behind the last output
  }
  return shuffle(a, b, index);
}

// Adds ROWS rows of grad_output from `row` on, at one vector of columns.
template <class T, class S, int KERNEL, int STRIDE, int ROWS, Reading READING>
TRADY_INLINE void add_strip(const S* input, const S* grad, int64_t row, const Conv2dChannelGrad& q,
                            const Columns<T, KERNEL, STRIDE>& columns, vector_of<T> (&acc)[KERNEL * KERNEL]) {
  const int64_t input_pitch = q.input_stride[2], grad_pitch = q.grad_stride[2];
  vector_of<T> d[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) d[r] = load_where(grad + (row + r) * grad_pitch, columns.outputs);
  Range<T> masks[KERNEL];
  if constexpr (READING == Reading::masked && STRIDE == 1)
#pragma GCC unroll 8
    for (int j = 0; j < KERNEL; j++) masks[j] = columns.inputs[j][0].kept();
  const int64_t top = row * STRIDE - q.padding[0];
  const S* x = input + top * input_pitch;
#pragma GCC unroll 32
  for (int t = 0; t < (ROWS - 1) * STRIDE + KERNEL; t++, x += input_pitch) {
    if (top + t < 0 || top + t >= q.height) continue;
    vector_of<T> both[STRIDE];
    if constexpr (READING == Reading::narrow)
#pragma GCC unroll 2
      for (int part = 0; part < STRIDE; part++) both[part] = load_where(x + part * LANES<T>, columns.inputs[0][part]);
    auto add_column = [&]<int J>() __attribute__((always_inline)) {
      constexpr int VL = LANES<T>;
      vector_of<T> value;
      if constexpr (READING == Reading::narrow)
        value = every_second<J>(both[0], both[STRIDE - 1]);
      else if constexpr (READING == Reading::whole && STRIDE == 1)
        value = load(x + J);
      else if constexpr (READING == Reading::whole)  // of the second vector no more than the last output needs
        value = even_lanes(load(x + J), load_first(x + J + VL, VL - 1));
      else if constexpr (STRIDE == 1)
        value = load_where(x + J, masks[J]);
      else
        value = even_lanes(load_where(x + J, columns.inputs[J][0]), load_where(x + J + VL, columns.inputs[J][1]));
      value = keep(value);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const int i = t - r * STRIDE;
        if (i >= 0 && i < KERNEL) acc[i * KERNEL + J] += d[r] * value;
      }
    };
    add_column.template operator()<0>();
    add_column.template operator()<1>();
    add_column.template operator()<2>();
    if constexpr (KERNEL > 3) {
      add_column.template operator()<3>();
      add_column.template operator()<4>();
    }
  }
}

template <class T, class S, int KERNEL, int STRIDE, int ROWS>
void add_planes(const Conv2dChannelGrad& q, const S* input, const S* grad, int64_t images, T* sums) {
  vector_of<T> acc[KERNEL * KERNEL];
#pragma GCC unroll 32
  for (int a = 0; a < KERNEL * KERNEL; a++) acc[a] = vector_of<T>{};
  // Along the rows, so that memory is read in order; maps wider than a group in several passes.
  constexpr int GROUP = 16;
  constexpr int64_t LINE = 64 / sizeof(S);
  constexpr int64_t WIDTH = GROUP * LANES<T>;
  for (int64_t left = 0; left < q.out_width; left += WIDTH) {
    Columns<T, KERNEL, STRIDE> columns[GROUP];
    int count = 0;
    for (; count < GROUP && left + count * LANES<T> < q.out_width; count++)
      columns[count] = Columns<T, KERNEL, STRIDE>(left + count * LANES<T>, q);
    for (int64_t n = 0; n < images; n++) {
      const S* x = input + n * q.input_stride[0] + left * STRIDE - q.padding[1];
      const S* d = grad + n * q.grad_stride[0] + left;
      // The planes of the next image, a few lines a step: the hardware does not follow from plane to plane.
      const S* next_x = n + 1 < images ? input + (n + 1) * q.input_stride[0] : x;
      const S* next_d = n + 1 < images ? grad + (n + 1) * q.grad_stride[0] : d;
      auto strip = [&]<int COUNT>(int64_t row) {
        for (int c = 0; c < count; c++) {
#pragma GCC unroll 8
          for (int r = 0; r < COUNT; r++) {
            prefetch(next_d + r * LINE);
#pragma GCC unroll 4
            for (int part = 0; part < STRIDE * STRIDE; part++) prefetch(next_x + (r * STRIDE * STRIDE + part) * LINE);
          }
          next_d += COUNT * LINE;
          next_x += COUNT * STRIDE * STRIDE * LINE;
          const S *from = x + c * LANES<T> * STRIDE, *to = d + c * LANES<T>;
          if (columns[c].reading == Reading::whole)
            add_strip<T, S, KERNEL, STRIDE, COUNT, Reading::whole>(from, to, row, q, columns[c], acc);
          else if (STRIDE == 2 && columns[c].reading == Reading::narrow)
            add_strip<T, S, KERNEL, STRIDE, COUNT, STRIDE == 2 ? Reading::narrow : Reading::masked>(from, to, row, q,
                                                                                                    columns[c], acc);
          else
            add_strip<T, S, KERNEL, STRIDE, COUNT, Reading::masked>(from, to, row, q, columns[c], acc);
        }
      };
      int64_t row = 0;
      for (; row + ROWS <= q.out_height; row += ROWS) strip.template operator()<ROWS>(row);
      for (; row + 2 <= q.out_height; row += 2) strip.template operator()<2>(row);
      for (; row < q.out_height; row++) strip.template operator()<1>(row);
    }
  }
#pragma GCC unroll 32
  for (int a = 0; a < KERNEL * KERNEL; a++) sums[a] = sum(acc[a]);
}

#if defined(__AVX512F__)
constexpr int ROWS_3 = 7, ROWS_5 = 4;
#else
constexpr int ROWS_3 = 4, ROWS_5 = 2;
#endif

template <class T, class S>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial) {
  const int64_t pairs = q.selected * q.out_per_group, slice = task / pairs, pair = task % pairs;
  const int64_t channel = pair / q.out_per_group;
  int64_t run = 0;  // by halves: every channel may have its own
  for (int64_t end = q.run_count - 1; run < end;) {
    const int64_t middle = (run + end) / 2;
    if (q.runs[middle].end <= channel)
      run = middle + 1;
    else
      end = middle;
  }
  const int64_t output = q.runs[run].group * q.out_per_group + pair % q.out_per_group;
  const int64_t first = q.batch * slice / q.slices, images = q.batch * (slice + 1) / q.slices - first;
  const S* input = static_cast<const S*>(q.input) + first * q.input_stride[0] + channel * q.input_stride[1];
  const S* grad = static_cast<const S*>(q.grad_output) + first * q.grad_stride[0] + output * q.grad_stride[1];
  T* sums = static_cast<T*>(partial) + task * q.kernel[0] * q.kernel[1];
  if (q.kernel[0] == 3)
    (q.stride[0] == 1 ? add_planes<T, S, 3, 1, ROWS_3> : add_planes<T, S, 3, 2, ROWS_3>)(q, input, grad, images, sums);
  else
    (q.stride[0] == 1 ? add_planes<T, S, 5, 1, ROWS_5> : add_planes<T, S, 5, 2, ROWS_5>)(q, input, grad, images, sums);
}

#endif

}  // namespace

bool conv2d_channel_grad_depthwise_fits([[maybe_unused]] const Conv2dChannelGrad& q) {
#if defined(__AVX512F__) || defined(__AVX2__)
#if !defined(__AVX512F__)
  if (q.dtype == Dtype::bfloat16 || q.dtype == Dtype::float16) return false;
#endif
  return q.out_per_group <= 2 && q.kernel[0] == q.kernel[1] && (q.kernel[0] == 3 || q.kernel[0] == 5) &&
         q.stride[0] == q.stride[1] && q.stride[0] <= 2 && q.dilation[0] == 1 && q.dilation[1] == 1 &&
         q.input_stride[3] == 1 && q.grad_stride[3] == 1;
#else
  return false;
#endif
}

void conv2d_channel_grad_depthwise([[maybe_unused]] const Conv2dChannelGrad& q, [[maybe_unused]] int64_t task,
                                   [[maybe_unused]] void* partial, void*) {
#if defined(__AVX512F__) || defined(__AVX2__)
  switch (q.dtype) {
    case Dtype::float32:
      return run_task<float, float>(q, task, partial);
    case Dtype::float64:
      return run_task<double, double>(q, task, partial);
#if defined(__AVX512F__)
    case Dtype::bfloat16:
      return run_task<float, bfloat16>(q, task, partial);
    case Dtype::float16:
      return run_task<float, float16>(q, task, partial);
#else
    default:
      return;
#endif
  }
#endif
}

}  // namespace trady::TRADY_ISA
