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
  __mmask32 bits;  // as wide as the compiler likes them: narrower ones it extends
  TRADY_INLINE Range() : bits(0) {}
  TRADY_INLINE Range(int low, int high) : bits(high > low ? ((1u << high) - 1u) & ~((1u << low) - 1u) : 0) {}
  // In a mask register from here on: on its way there it takes a unit that multiply-adds need.
  TRADY_INLINE Range kept() const {
    Range range = *this;
    asm("" : "+k"(range.bits));
    return range;
  }
};
TRADY_INLINE f32 load_where(const float* p, Range<float> lanes) {
  return (f32)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.bits), p);
}
TRADY_INLINE f64 load_where(const double* p, Range<double> lanes) {
  return (f64)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes.bits), p);
}
TRADY_INLINE f32 load_where(const bfloat16* p, Range<float> lanes) {
  return widen_bfloat16((u16_half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes.bits), p));
}
TRADY_INLINE f32 load_where(const float16* p, Range<float> lanes) {
  return widen_float16((u16_half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes.bits), p));
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

// Where the elements of both tensors lie, the selected and the others.
template <class S>
struct Tensors {
  const S *input, *input_end, *grad_end;
  explicit Tensors(const Conv2dChannelGrad& q) : input(static_cast<const S*>(q.input)) {
    const auto size = [&](const int64_t (&stride)[4], int64_t channels, int64_t height, int64_t width) {
      return (q.batch - 1) * stride[0] + (channels - 1) * stride[1] + (height - 1) * stride[2] + width;
    };
    input_end = input + size(q.input_stride, q.selected, q.height, q.width);
    grad_end = static_cast<const S*>(q.grad_output) +
               size(q.grad_stride, q.groups * q.out_per_group, q.out_height, q.out_width);
  }
};

// How a strip is read: by whole vectors where they lie in the tensors, `easy` ones fewer of them, or under masks.
enum class Loads { easy, plain, masked };

// A vector of output columns, and what it meets in an input row.
#if defined(__AVX512F__)

// Lanes N, N + 1, ... of low and then high.
template <int N, class V>
TRADY_INLINE V shift_lanes(V low, V high) {
  if constexpr (N == 0)
    return low;
  else if constexpr (lanes_of<V> == 16)
    return (V)_mm512_maskz_alignr_epi32(0xffff, (__m512i)high, (__m512i)low, N);
  else
    return (V)_mm512_maskz_alignr_epi64(0xff, (__m512i)high, (__m512i)low, N);
}
// Not by intrinsics, for which GCC takes the masks through general registers, on units that multiply-adds need.
TRADY_INLINE f32 multiply_add_where(f32 sum, f32 a, f32 b, Range<float> lanes) {
  asm("vfmadd231ps %2, %1, %0%{%3%}" : "+v"(sum) : "v"(a), "v"(b), "Yk"(lanes.bits));
  return sum;
}
TRADY_INLINE f64 multiply_add_where(f64 sum, f64 a, f64 b, Range<double> lanes) {
  asm("vfmadd231pd %2, %1, %0%{%3%}" : "+v"(sum) : "v"(a), "v"(b), "Yk"(lanes.bits));
  return sum;
}

// Multiply-adds leave out what padding would add: a mask costs them nothing, and a load the turn of a multiply-add.
template <class T, int KERNEL, int STRIDE>
struct Columns {
  bool easy;  // without what sticks out of STRIDE vectors of the input
  Range<T> outputs;
  Range<T> met[KERNEL];        // outputs that meet an input at a kernel column
  Range<T> parts[STRIDE + 1];  // of the input
  TRADY_INLINE Columns() {}
  TRADY_INLINE Columns(int64_t column, const Conv2dChannelGrad& q) {
    constexpr int VL = LANES<T>;
    const int count = clamp_lane(q.out_width - column, VL);
    outputs = Range<T>(0, count);
    easy = (count - 1) * STRIDE + KERNEL <= STRIDE * VL;
    const int64_t left = column * STRIDE - q.padding[1];
    for (int j = 0; j < KERNEL; j++) {
      // Lane l meets element left + j + l * STRIDE. Counts below zero are clamped, whichever way they were rounded.
      const int64_t missing = -left - j + STRIDE - 1, existing = q.width - left - j + STRIDE - 1;
      met[j] = Range<T>(clamp_lane(missing / STRIDE, VL), clamp_lane(existing / STRIDE, count));
    }
    for (int part = 0; part <= STRIDE; part++) {
      const int64_t first = left + part * VL;
      parts[part] = Range<T>(clamp_lane(-first, VL), clamp_lane(q.width - first, VL));
    }
  }
  TRADY_INLINE Range<T> lanes(int j) const { return met[j]; }
  TRADY_INLINE Columns kept() const {
    Columns columns = *this;
    for (int j = 0; j < KERNEL; j++) columns.met[j] = met[j].kept();
    return columns;
  }
};

// Few loads, since most straddle cache lines: kernel columns are made by shifting.
template <class T, class S, Loads LOADS, int KERNEL, int STRIDE>
struct Row {
  vector_of<T> low[STRIDE], high[STRIDE];  // by the first element's remainder
  TRADY_INLINE Row(const S* x, const Columns<T, KERNEL, STRIDE>& columns) {
    constexpr int VL = LANES<T>;
    vector_of<T> parts[STRIDE + 1];
#pragma GCC unroll 4
    for (int part = 0; part < STRIDE + (LOADS != Loads::easy); part++)
      parts[part] = keep(LOADS == Loads::masked ? load_where(x + part * VL, columns.parts[part]) : load(x + part * VL));
    if constexpr (STRIDE == 1) {
      low[0] = parts[0];
      high[0] = LOADS == Loads::easy ? parts[0] : parts[1];
    } else {
      low[0] = even_lanes(parts[0], parts[1]);
      low[1] = odd_lanes(parts[0], parts[1]);
      if constexpr (LOADS == Loads::easy) {
        high[0] = low[0];
        high[1] = low[1];
      } else {
        high[0] = KERNEL == 3 ? parts[2] : even_lanes(parts[2], parts[2]);
        high[1] = shift_lanes<1>(parts[2], parts[2]);  // one element of it is used
      }
    }
  }
  template <int J>
  TRADY_INLINE vector_of<T> column() const {
    return shift_lanes<J / STRIDE>(low[J % STRIDE], high[J % STRIDE]);
  }
};

#else

TRADY_INLINE f32 multiply_add_where(f32 sum, f32 a, f32 b, Range<float>) { return sum + a * b; }
TRADY_INLINE f64 multiply_add_where(f64 sum, f64 a, f64 b, Range<double>) { return sum + a * b; }

// A load for each kernel column; `easy` ones need no masks.
template <class T, int KERNEL, int STRIDE>
struct Columns {
  bool easy;
  Range<T> outputs;
  Range<T> inputs[KERNEL][STRIDE];
  TRADY_INLINE Columns() {}
  TRADY_INLINE Columns(int64_t column, const Conv2dChannelGrad& q) {
    constexpr int VL = LANES<T>;
    const int count = clamp_lane(q.out_width - column, VL);
    outputs = Range<T>(0, count);
    const int64_t left = column * STRIDE - q.padding[1];
    easy = count == VL && left >= 0 && left + (VL - 1) * STRIDE + KERNEL <= q.width;
    for (int j = 0; j < KERNEL; j++)
      for (int part = 0; part < STRIDE; part++) {
        // Lane l reads element first + l; past the last output nothing is read, so that no value there gets in.
        const int64_t first = left + j + part * VL, needed = static_cast<int64_t>(count - 1) * STRIDE + 1 - part * VL;
        const int64_t existing = q.width - first;
        inputs[j][part] = Range<T>(clamp_lane(-first, VL), clamp_lane(needed < existing ? needed : existing, VL));
      }
  }
  TRADY_INLINE Range<T> lanes(int) const { return outputs; }
  TRADY_INLINE const Columns& kept() const { return *this; }
};

template <class T, class S, Loads LOADS, int KERNEL, int STRIDE>
struct Row {
  const S* x;
  const Columns<T, KERNEL, STRIDE>& columns;
  TRADY_INLINE Row(const S* from, const Columns<T, KERNEL, STRIDE>& at) : x(from), columns(at) {}
  template <int J>
  TRADY_INLINE vector_of<T> column() const {
    constexpr int VL = LANES<T>;
    if constexpr (LOADS == Loads::easy && STRIDE == 1)
      return load(x + J);
    else if constexpr (LOADS == Loads::easy)  // the second vector ends with what the last output needs
      return even_then_odd_lanes(load(x + J), load(x + J + VL - 1));
    else if constexpr (STRIDE == 1)
      return load_where(x + J, columns.inputs[J][0]);
    else
      return even_lanes(load_where(x + J, columns.inputs[J][0]), load_where(x + J + VL, columns.inputs[J][1]));
  }
};

#endif

// Rows of grad_output, and those of the input that they meet: MET, some of which may be padding. Padding is less than
// the kernel, so that every row of grad_output meets one, and only the outermost KERNEL - 1 may be missing.
template <int KERNEL, int STRIDE, int ROWS>
struct Strip {
  static constexpr int MET = (ROWS - 1) * STRIDE + KERNEL;
  int first, end;  // of MET
  TRADY_INLINE Strip(int64_t top, int64_t height)
      : first(top < 0 ? static_cast<int>(-top) : 0), end(height - top < MET ? static_cast<int>(height - top) : MET) {}
  TRADY_INLINE bool meets(int t) const { return (t >= KERNEL - 1 || t >= first) && (t <= MET - KERNEL || t < end); }
};

// Adds a strip at one vector of columns: x and d lie in its first rows.
template <class T, class S, Loads LOADS, int KERNEL, int STRIDE, int ROWS>
TRADY_INLINE void add_strip(const S* x, const S* d, const Conv2dChannelGrad& q,
                            const Strip<KERNEL, STRIDE, ROWS>& strip, const Columns<T, KERNEL, STRIDE>& all_columns,
                            vector_of<T> (&acc)[KERNEL * KERNEL]) {
  const auto& columns = all_columns.kept();
  vector_of<T> grad[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++, d += q.grad_stride[2])
    grad[r] = LOADS == Loads::masked ? load_where(d, columns.outputs) : load(d);
  // Those of one remainder by the stride after another, so that fewer vectors are alive.
  const auto each_column = [](auto add) INLINED {
    add.template operator()<0>();
    if constexpr (STRIDE == 1) add.template operator()<1>();
    add.template operator()<2>();
    if constexpr (KERNEL > 3) {
      if constexpr (STRIDE == 1) add.template operator()<3>();
      add.template operator()<4>();
    }
    if constexpr (STRIDE == 2) {
      add.template operator()<1>();
      if constexpr (KERNEL > 3) add.template operator()<3>();
    }
  };
  const auto add = [&]<int J>(int t, vector_of<T> value) INLINED {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const int i = t - r * STRIDE;
      if (i >= 0 && i < KERNEL)
        acc[i * KERNEL + J] = multiply_add_where(acc[i * KERNEL + J], grad[r], value, columns.lanes(J));
    }
  };
  using MetRow = Row<T, S, LOADS, KERNEL, STRIDE>;
  if constexpr (KERNEL * KERNEL + ROWS < VECTOR_REGISTERS) {
#pragma GCC unroll 32
    for (int t = 0; t < strip.MET; t++, x += q.input_stride[2]) {
      if (!strip.meets(t)) continue;
      const MetRow met(x, columns);
      each_column([&]<int J>() INLINED { add.template operator()<J>(t, keep(met.template column<J>())); });
    }
  } else {  // the sums of one kernel column have registers, those of all have not
    each_column([&]<int J>() INLINED {
      const S* row = x;
#pragma GCC unroll 32
      for (int t = 0; t < strip.MET; t++, row += q.input_stride[2])
        if (strip.meets(t)) add.template operator()<J>(t, keep(MetRow(row, columns).template column<J>()));
    });
  }
}

// A selected channel and an output of its group: planes of an image.
template <class S>
struct Pair {
  const S* input;
  const S* grad;
};

// A task's pairs, one after another.
template <class S>
struct Pairs {
  const Conv2dChannelGrad& q;
  int64_t pair, image, run;
  Pairs(const Conv2dChannelGrad& problem, int64_t first, int64_t first_image)
      : q(problem), pair(first), image(first_image), run(0) {
    // By halves: every channel may have a run of its own.
    for (int64_t end = q.run_count - 1; run < end;) {
      const int64_t middle = (run + end) / 2;
      if (q.runs[middle].end <= pair / q.out_per_group)
        run = middle + 1;
      else
        end = middle;
    }
  }
  Pair<S> next() {
    const int64_t channel = q.out_per_group == 1 ? pair : pair / q.out_per_group;
    if (q.runs[run].end <= channel) run++;
    const int64_t output = q.runs[run].group * q.out_per_group + pair - channel * q.out_per_group;
    pair++;
    return {static_cast<const S*>(q.input) + image * q.input_stride[0] + channel * q.input_stride[1],
            static_cast<const S*>(q.grad_output) + image * q.grad_stride[0] + output * q.grad_stride[1]};
  }
};

template <class T, class S, int KERNEL, int STRIDE, int ROWS>
void add_pairs(const Conv2dChannelGrad& q, int64_t first, int64_t count, int64_t first_image, int64_t images, T* sums) {
  constexpr int TAPS = KERNEL * KERNEL;
  // Along the rows, so that memory is read in order; maps wider than a group in several passes.
  constexpr int GROUP = 16;
  constexpr int64_t LINE = 64 / sizeof(S);
  constexpr int64_t WIDTH = GROUP * LANES<T>;
  const Tensors<S> tensors(q);
  const int64_t all_pairs = q.selected * q.out_per_group;
  for (int64_t left = 0; left < q.out_width; left += WIDTH) {
    Columns<T, KERNEL, STRIDE> columns[GROUP];
    int vectors = 0;
    for (; vectors < GROUP && left + vectors * LANES<T> < q.out_width; vectors++)
      columns[vectors] = Columns<T, KERNEL, STRIDE>(left + vectors * LANES<T>, q);
    const int64_t width = vectors * LANES<T>, across = left * STRIDE - q.padding[1];
    Pairs<S> pairs(q, first, first_image);
    Pair<S> following = pairs.next();
    for (int64_t pair = 0; pair < count; pair++) {
      const Pair<S> planes = following;
      if (pairs.pair < all_pairs) following = pairs.next();  // of the next task too: it may be ours
      vector_of<T> acc[TAPS];
#pragma GCC unroll 32
      for (int a = 0; a < TAPS; a++) acc[a] = vector_of<T>{};
      const S* x = planes.input - q.padding[0] * q.input_stride[2] + across;
      const S* d = planes.grad + left;
      const S *following_x = following.input, *following_d = following.grad;
      int64_t top = -q.padding[0], rows = q.out_height;
      // All images, so that there is little else to do for each.
      auto add = [&]<int COUNT>() INLINED {
        constexpr int64_t AREA = STRIDE * STRIDE;
        const Strip<KERNEL, STRIDE, COUNT> strip(top, q.height);
        // Images whose whole vectors lie in the tensors begin in these.
        const S* const x_begin = tensors.input - strip.first * q.input_stride[2];
        const S* const x_end = tensors.input_end - (strip.end - 1) * q.input_stride[2] - width * STRIDE - LANES<T>;
        const S* const d_end = tensors.grad_end - (COUNT - 1) * q.grad_stride[2] - width;
        const S *const below_x = x + COUNT * STRIDE * q.input_stride[2], *const below_d = d + COUNT * q.grad_stride[2];
        for (int64_t n = 0; n < images; n++) {
          const S *from = x + n * q.input_stride[0], *to = d + n * q.grad_stride[0];
          const bool inside = from >= x_begin && from <= x_end && to <= d_end;
          // A few lines a vector are fetched ahead, since the hardware does not follow from plane to plane: of narrow
          // maps the next pair's, of others the same rows of the next image, without those that strips share.
          const S *then_from = following_x + n * q.input_stride[0], *then_to = following_d + n * q.grad_stride[0];
          if (vectors > 1) {
            const bool last = n + 1 == images;
            then_from = (last ? below_x : from + q.input_stride[0]) + (KERNEL - STRIDE) * q.input_stride[2];
            then_to = last ? below_d : to + q.grad_stride[0];
          }
          for (int c = 0; c < vectors; c++) {
#pragma GCC unroll 8
            for (int line = 0; line < COUNT; line++) prefetch(then_to + line * LINE);
#pragma GCC unroll 32
            for (int line = 0; line < COUNT * AREA; line++) prefetch(then_from + line * LINE);
            if (inside && columns[c].easy)
              add_strip<T, S, Loads::easy>(from, to, q, strip, columns[c], acc);
#if defined(__AVX512F__)
            else if (inside)
              add_strip<T, S, Loads::plain>(from, to, q, strip, columns[c], acc);
#endif
            else
              add_strip<T, S, Loads::masked>(from, to, q, strip, columns[c], acc);
            from += LANES<T> * STRIDE;
            to += LANES<T>;
            then_from += COUNT * AREA * LINE;
            then_to += COUNT * LINE;
          }
        }
        top += COUNT * STRIDE;
        rows -= COUNT;
        x = below_x;
        d = below_d;
        following_x += COUNT * AREA * LINE;
        following_d += COUNT * LINE;
      };
      while (rows >= ROWS) add.template operator()<ROWS>();
      if constexpr (KERNEL > 3 && STRIDE == 1)
        while (rows >= 3) add.template operator()<3>();
      while (rows >= 2) add.template operator()<2>();
      while (rows >= 1) add.template operator()<1>();
      T sum[TAPS + LANES<T>];
      sum_lanes(acc, sum);
      for (int a = 0; a < TAPS; a++) sums[pair * TAPS + a] = left > 0 ? sums[pair * TAPS + a] + sum[a] : sum[a];
    }
  }
}

constexpr int ROWS_3 = VECTOR_REGISTERS == 32 ? 7 : 4, ROWS_5 = 4;

template <class T, class S>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial) {
  const int64_t pairs = q.selected * q.out_per_group, slice = task / q.ranges,
                first = task % q.ranges * q.range_outputs;
  const int64_t count = first + q.range_outputs < pairs ? q.range_outputs : pairs - first;
  const int64_t image = q.batch * slice / q.slices, images = q.batch * (slice + 1) / q.slices - image;
  T* sums = static_cast<T*>(partial) + (slice * pairs + first) * q.kernel[0] * q.kernel[1];
  const auto add = q.kernel[0] == 3
                       ? (q.stride[0] == 1 ? add_pairs<T, S, 3, 1, ROWS_3> : add_pairs<T, S, 3, 2, ROWS_3>)
                       : (q.stride[0] == 1 ? add_pairs<T, S, 5, 1, ROWS_5> : add_pairs<T, S, 5, 2, ROWS_5>);
  add(q, first, count, image, images, sums);
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
         q.padding[0] < q.kernel[0] && q.input_stride[3] == 1 && q.grad_stride[3] == 1;
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
