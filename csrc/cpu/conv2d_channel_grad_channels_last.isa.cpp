// conv2d_channel_grad where lanes are outputs: the channels of grad_output are adjacent, or so many taps read it that
// turning it over pays.
//
// A register block holds the sums of a few vectors of outputs and some taps. For each pixel, or each pair of pixels
// where the CPU multiplies pairs of bfloat16, the vectors are read once and multiplied by the taps' input elements,
// broadcast; there is nothing to reduce at the end. The input is packed: into planes (conv2d_planes.h), or, where the
// kernel is 1x1, into the channels of each pixel.
#include "conv2d_planes.h"

namespace trady::TRADY_ISA {
namespace {

// Pixels that one multiply-add takes: a lane of an operand holds those of an output, or of a tap.
template <class P>
constexpr int STEP = OPERANDS<P> / LANES<P>;

// Stretches of pixels. Distances in elements: of the input, and of grad_output, from stretch to stretch and from step
// to step.
struct Stretches {
  int64_t count, pixels;
  int64_t input_stretch, input_step;
  int64_t grad_stretch, grad_step;
};

template <class E>
TRADY_INLINE bool page_apart(int64_t step) {
  return step * static_cast<int64_t>(sizeof(E)) % 4096 == 0;
}

// The outputs of a step's pixels, of which there are fewer than STEP<P> only behind the last whole step. E is the
// tensor's type, or the accumulation type where they were copied, operand by operand.
template <class P, class E>
TRADY_INLINE operand_of<P> read(const E* grad, [[maybe_unused]] int64_t grad_step, [[maybe_unused]] bool whole) {
  if constexpr (STEP<P> == 2 && is_same<E, P>)
    return (operand_of<P>)interleave(load_half(grad), whole ? load_half(grad + grad_step / 2) : u16_half{});
  else
    return (operand_of<P>)load(grad);
}
template <class P, class E>
TRADY_INLINE operand_of<P> read_first(const E* grad, [[maybe_unused]] int64_t grad_step, [[maybe_unused]] bool whole,
                                      int count) {
  if constexpr (STEP<P> == 2 && is_same<E, P>)
    return (operand_of<P>)interleave(load_first_half(grad, count),
                                     whole ? load_first_half(grad + grad_step / 2, count) : u16_half{});
  else
    return (operand_of<P>)load_first(grad, count);
}

// out[tap][o] += sum over pixels of input[tap] * grad[o] for VECTORS vectors of outputs, the last of them `left` long.
// Taps are COLUMNS elements, PITCH apart, for each of ROWS kernel rows, which begin at rows[].
template <class P, class E, int VECTORS, int ROWS, int COLUMNS, int PITCH>
void block(const P* input, const int64_t* rows, const E* grad, const Stretches& stretches, int left,
           scalar_of<P>* const* out) {
  using V = vector_of<P>;
  constexpr int TAPS = ROWS * COLUMNS;
  constexpr int VL = LANES<P>;
  // Chains of multiply-adds that do not wait for each other.
  constexpr int CHAINS = VECTORS * TAPS >= 8 ? 1 : VECTORS * TAPS >= 4 ? 2 : 4;
  static_assert(CHAINS * VECTORS * TAPS + (VECTORS < TAPS ? VECTORS : TAPS) + 1 <= VECTOR_REGISTERS,
                "sums and operands are in registers");
  // Steps from one request to the use: about 200 cycles. What was copied is in the caches.
  constexpr int64_t AHEAD = 200 / (VECTORS * TAPS) + 1;
  // Of pixels a page apart, which share a set of the first cache, no more than that has room for: measured with AVX2,
  // left alone where there are 32 registers.
  constexpr int64_t NEAR = VECTOR_REGISTERS < 32 && AHEAD > 4 ? 4 : AHEAD;
  constexpr bool PREFETCHES = STEP<P> == 1 || is_same<E, P>;
  V acc[CHAINS][VECTORS * TAPS];
#pragma GCC unroll 4
  for (int chain = 0; chain < CHAINS; chain++)
#pragma GCC unroll 64
    for (int a = 0; a < VECTORS * TAPS; a++) acc[chain][a] = V{};
  auto run = [&](auto read_last) INLINED {
    for (int64_t n = 0; n < stretches.count; n++) {
      const P* x[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) x[i] = input + n * stretches.input_stretch + rows[i];
      const E* g = grad + n * stretches.grad_stretch;
      const int64_t grad_step = stretches.grad_step;
      const int64_t ahead = (page_apart<E>(grad_step) ? NEAR : AHEAD) * grad_step;
      const int64_t input_step = PITCH == kShortPlane ? STEP<P> : stretches.input_step;
      auto step = [&](V* sums, auto whole) INLINED {
        if constexpr (PITCH != kShortPlane) prefetch(x[0] + AHEAD * input_step);
        auto load_grad = [&](int v) INLINED {
          if constexpr (PREFETCHES) {
            prefetch(g + v * VL + ahead);
            if constexpr (STEP<P> == 2) prefetch(g + v * VL + ahead + grad_step / 2);
          }
          return keep(v + 1 < VECTORS ? read<P>(g + v * VL, grad_step, whole)
                                      : read_last(g + v * VL, grad_step, whole));
        };
        auto load_input = [&](int t)
                              INLINED { return keep(broadcast_operand(x[t / COLUMNS] + t % COLUMNS * PITCH, whole)); };
        if constexpr (VECTORS <= TAPS) {
          operand_of<P> d[VECTORS];
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; v++) d[v] = load_grad(v);
#pragma GCC unroll 64
          for (int t = 0; t < TAPS; t++) {
            const operand_of<P> value = load_input(t);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) sums[v * TAPS + t] = multiply_add(sums[v * TAPS + t], d[v], value);
          }
        } else {
          operand_of<P> values[ROWS * COLUMNS];  // GCC 13 does not know TAPS here
#pragma GCC unroll 64
          for (int t = 0; t < TAPS; t++) values[t] = load_input(t);
#pragma GCC unroll 16
          for (int v = 0; v < VECTORS; v++) {
            const operand_of<P> d = load_grad(v);
#pragma GCC unroll 64
            for (int t = 0; t < TAPS; t++) sums[v * TAPS + t] = multiply_add(sums[v * TAPS + t], d, values[t]);
          }
        }
        g += grad_step;
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) x[i] += input_step;
      };
      const int64_t steps = stretches.pixels / STEP<P>;
      int64_t w = 0;
      for (; w + CHAINS <= steps; w += CHAINS) {
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) step(acc[chain], Constant<true>{});
      }
      if constexpr (CHAINS > 1)
        for (; w < steps; w++) step(acc[0], Constant<true>{});
      if constexpr (STEP<P> > 1)
        if (stretches.pixels % STEP<P>) step(acc[0], Constant<false>{});
    }
  };
  if (!MASKED_LOADS && left == VL)
    run([](const E* from, int64_t step, bool whole) INLINED { return read<P>(from, step, whole); });
  else
    run([left](const E* from, int64_t step, bool whole) INLINED { return read_first<P>(from, step, whole, left); });
#pragma GCC unroll 64
  for (int t = 0; t < TAPS; t++) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) {
      V sum = acc[0][v * TAPS + t];
#pragma GCC unroll 4
      for (int chain = 1; chain < CHAINS; chain++) sum += acc[chain][v * TAPS + t];
      scalar_of<P>* to = out[t] + v * VL;
      if (v + 1 < VECTORS || left == VL)
        store(to, load(to) + sum);
      else
        store_first(to, load_first(to, left) + sum, left);
    }
  }
}

// out[o] += sum over pixels of grad[o], for one vector of outputs.
template <class P, class E>
void sum_pixels(const E* grad, const Stretches& stretches, int lanes, scalar_of<P>* out) {
  // Chains of additions that do not wait for each other.
  constexpr int CHAINS = 4;
  vector_of<P> acc[CHAINS] = {};
  const operand_of<P> one = ones<P>();
  const int64_t steps = stretches.pixels / STEP<P>, grad_step = stretches.grad_step;
  for (int64_t n = 0; n < stretches.count; n++) {
    const E* g = grad + n * stretches.grad_stretch;
    int64_t w = 0;
    for (; w + CHAINS <= steps; w += CHAINS)
      for (int chain = 0; chain < CHAINS; chain++, g += grad_step)
        acc[chain] = multiply_add(acc[chain], read_first<P>(g, grad_step, true, lanes), one);
    for (; w < steps; w++, g += grad_step) acc[0] = multiply_add(acc[0], read_first<P>(g, grad_step, true, lanes), one);
    if (stretches.pixels % STEP<P>) acc[0] = multiply_add(acc[0], read_first<P>(g, grad_step, false, lanes), one);
  }
  store_first(out, load_first(out, lanes) + ((acc[0] + acc[1]) + (acc[2] + acc[3])), lanes);
}

template <class P, class E>
using Block = void (*)(const P*, const int64_t*, const E*, const Stretches&, int, scalar_of<P>* const*);

// Register blocks by number of taps: as many vectors of outputs as leave registers for the operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxTaps = 8;
constexpr int kVectorsByTaps[] = {0, 8, 8, 8, 6, 5, 4, 3, 3, 3};
constexpr bool kFuses3x3 = true;
#else
constexpr int kMaxTaps = 6;
constexpr int kVectorsByTaps[] = {0, 8, 4, 4, 3, 2, 2};
constexpr bool kFuses3x3 = false;
#endif

// So many vectors of those that are left: pieces of about the same size. Small blocks come in powers of two alone.
TRADY_INLINE int64_t piece_of(int64_t left, int64_t most) {
  const int64_t even = ceil_div(left, ceil_div(left, most));
  if (most < 8) return even;
  int64_t power = 1;
  while (2 * power <= even) power *= 2;
  return power;
}
template <class P, class E, int PITCH, int ROWS, int COLUMNS, int VECTORS = 1>
Block<P, E> block_of(int64_t vectors) {
  constexpr int most = kVectorsByTaps[ROWS * COLUMNS];
  if constexpr (VECTORS < most)
    if (vectors > VECTORS) return block_of < P, E, PITCH, ROWS, COLUMNS, most<8 ? VECTORS + 1 : 2 * VECTORS>(vectors);
  return block<P, E, VECTORS, ROWS, COLUMNS, PITCH>;
}
template <class P, class E, int PITCH, int TAPS = 1>
Block<P, E> block_of_row(int64_t taps, int64_t vectors) {
  if constexpr (TAPS < kMaxTaps)
    if (taps > TAPS) return block_of_row<P, E, PITCH, TAPS + 1>(taps, vectors);
  return block_of<P, E, PITCH, 1, TAPS>(vectors);
}
template <class P, class E>
Block<P, E> block_of_3x3([[maybe_unused]] int64_t vectors) {
  if constexpr (kFuses3x3) return block_of<P, E, kShortPlane, 3, 3>(vectors);
  return nullptr;
}

template <class P, class S>
struct Task : Planes<P, S, kShortPlane> {
  using Base = Planes<P, S, kShortPlane>;
  using A = scalar_of<P>;
  using Base::bias, Base::first_output, Base::last_output;
  using Base::channel, Base::channels, Base::segment, Base::alone, Base::columns, Base::row_start;
  using Base::is_point, Base::is_plain_point, Base::pack_input;
  using Base::q, Base::planes, Base::run, Base::image, Base::images, Base::pixel, Base::pixels, Base::taps;
  static constexpr int64_t VL = LANES<P>;
  A* partial = nullptr;         // this slice's, (k, kh, kw, C'/groups)
  A* copied;                    // grad_output of a tile, a piece of outputs, an operand a step and vector
  int64_t from[kMaxRows] = {};  // where a kernel row's planes begin

  Task(const Conv2dChannelGrad& problem, void* scratch)
      : Base(problem, scratch), copied(static_cast<A*>(scratch) + kScratch + kTurnedSlack) {}

  bool turns_over() const { return q.grad_stride[1] != 1; }
  // Rows of pixels lie behind one another.
  bool grad_is_flat() const { return q.grad_stride[2] == q.out_width * q.grad_stride[3]; }
  // So do a point's, of the input.
  bool input_is_flat() const { return is_plain_point() && q.input_stride[2] == q.width * q.input_stride[3]; }
  // Elements of a point's input follow each other pixel by pixel, those of all channels together; of many channels a
  // block's would be far apart.
  bool input_in_place() const {
    return is_same<A, S> && input_is_flat() && q.input_stride[1] == 1 && run.end - run.begin <= kPointChannels;
  }
  // Images too lie behind one another, in whatever is read as it is.
  bool merges_images() const {
    return images > 1 && !turns_over() && grad_is_flat() && q.grad_stride[0] == pixels * q.grad_stride[3] &&
           (is_point() ? !input_in_place() || q.input_stride[0] == pixels * q.input_stride[3] : segment == pixels);
  }

  const S* grad_at(int64_t n, int64_t output, int64_t p) const {
    return static_cast<const S*>(q.grad_output) + (image + n) * q.grad_stride[0] +
           (run.group * q.out_per_group + output) * q.grad_stride[1] + p / q.out_width * q.grad_stride[2] +
           p % q.out_width * q.grad_stride[3];
  }
  // Of a point, under an output pixel; null in the padding.
  const S* input_at(int64_t n, int64_t out_row, int64_t out_column) const {
    const int64_t row = out_row * q.stride[0] - q.padding[0], column = out_column * q.stride[1] - q.padding[1];
    if (row < 0 || row >= q.height || column < 0 || column >= q.width) return nullptr;
    return static_cast<const S*>(q.input) + (image + n) * q.input_stride[0] + channel * q.input_stride[1] +
           row * q.input_stride[2] + column * q.input_stride[3];
  }
  const S* first_input(int64_t n) const { return input_at(n, pixel / q.out_width, pixel % q.out_width); }

  // The channels of a step's pixels, adjacent; null is zero.
  void pack_channels(P* out, const S* first, [[maybe_unused]] const S* second) const {
    if (q.input_stride[1] == 1) {
      for (int64_t c = 0; c < channels; c += VL) {
        const int count = static_cast<int>(min(VL, channels - c));
        if constexpr (STEP<P> == 2)
          store(reinterpret_cast<A*>(out + c * 2),
                interleave(first ? load_first_half(first + c, count) : u16_half{},
                           second ? load_first_half(second + c, count) : u16_half{}));
        else
          store(out + c, first ? load_first(first + c, count) : vector_of<P>{});
      }
      return;
    }
    for (int64_t c = 0; c < channels; c++) {
      const int64_t at = c * q.input_stride[1];
      out[c * STEP<P>] = first ? element_as<P>(first[at]) : P{};
      if constexpr (STEP<P> == 2) out[c * 2 + 1] = second ? element_as<P>(second[at]) : P{};
    }
  }
  // A point's (steps, channels) of each stretch. In order: what is written too far is overwritten.
  void pack_point(const Stretches& stretches) const {
    const int64_t each = channels * STEP<P>;
    const bool flat = input_is_flat() && (stretches.count == images || q.input_stride[0] == pixels * q.input_stride[3]);
    for (int64_t n = 0; n < stretches.count; n++) {
      P* out = planes + n * stretches.input_stretch;
      if (flat && q.input_stride[3] == 1 && channels == 1) {
        copy_freely(out, first_input(n), 1, stretches.pixels);
      } else if (flat && q.input_stride[3] == 1) {
        for (int64_t c = (channels - 1) / VL * VL; c >= 0; c -= VL)
          turn_over<P>(first_input(n) + c * q.input_stride[1], q.input_stride[1], min(VL, channels - c),
                       stretches.pixels, reinterpret_cast<A*>(out) + c, channels);
      } else if (flat) {
        const S* in = first_input(n);
        for (int64_t p = 0; p < stretches.pixels; p += STEP<P>, out += each, in += STEP<P> * q.input_stride[3])
          pack_channels(out, in, p + 1 < stretches.pixels ? in + q.input_stride[3] : nullptr);
      } else {
        int64_t at = n, row = pixel / q.out_width, column = pixel % q.out_width;
        const auto next = [&] {
          const S* in = input_at(at, row, column);
          if (++column == q.out_width) column = 0, row++;
          if (row == q.out_height) row = 0, at++;
          return in;
        };
        for (int64_t p = 0; p < stretches.pixels; p += STEP<P>, out += each) {
          const S* first = next();
          pack_channels(out, first, p + 1 < stretches.pixels && STEP<P> == 2 ? next() : nullptr);
        }
      }
    }
  }

  // `vectors` of outputs, the last of them `left` long.
  void copy_grad(const Stretches& stretches, int64_t output, int64_t vectors, int left) const {
    for (int64_t n = 0; n < stretches.count; n++) {
      A* to = copied + n * stretches.grad_stretch;
      if (turns_over()) {
        for (int64_t v = 0; v < vectors; v++)
          turn_over<P>(grad_at(n, output + v * VL, pixel), q.grad_stride[1], v + 1 < vectors ? VL : left,
                       stretches.pixels, to + v * VL, stretches.grad_step);
        continue;
      }
      const S* begin = grad_at(n, output, pixel);
      const bool flat = grad_is_flat();
      for (int64_t p = 0; p < stretches.pixels; p += STEP<P>, to += stretches.grad_step) {
        const S* first = flat ? begin + p * q.grad_stride[3] : grad_at(n, output, pixel + p);
        const bool whole = p + STEP<P> <= stretches.pixels;
        const int64_t next = flat || !whole ? q.grad_stride[3] : grad_at(n, output, pixel + p + STEP<P> - 1) - first;
        for (int64_t v = 0; v + 1 < vectors; v++)
          store(to + v * VL, (vector_of<P>)read<P>(first + v * VL, STEP<P> * next, whole));
        const int64_t last = (vectors - 1) * VL;
        store(to + last, (vector_of<P>)read_first<P>(first + last, STEP<P> * next, whole, left));
      }
    }
  }

  // Taps of a row, channel by channel, are shared out to blocks.
  bool fused() const { return kFuses3x3 && q.kernel[0] == 3 && q.kernel[1] == 3 && !alone(); }
  int64_t row_taps() const { return channels * columns(); }
  int64_t blocks() const { return fused() ? channels : ceil_div(row_taps(), kMaxTaps); }

  void add_packing() {
    const bool point = is_point(), merged = merges_images();
    Stretches stretches{images, pixels, segment, 0, q.grad_stride[0], STEP<P> * q.grad_stride[3]};
    if (merged) stretches.count = 1, stretches.pixels *= images;
    const P* input = planes;
    if (point && input_in_place()) {
      input = reinterpret_cast<const P*>(first_input(0));
      stretches.input_step = q.input_stride[3];
      stretches.input_stretch = q.input_stride[0];
    } else if (point) {
      stretches.input_step = channels * STEP<P>;
      stretches.input_stretch = ceil_div(stretches.pixels, STEP<P>) * stretches.input_step;
      pack_point(stretches);
    } else {
      pack_input();
    }
    for (int64_t i = taps.row; i < taps.row_end; i++) from[i - taps.row] = point ? 0 : row_start(i);

    const int64_t rows = taps.row_end - taps.row, calls = blocks() * (fused() ? 1 : rows);
    // Where several blocks read them, pairs are made once; and pixels a page apart, which all fall into the same few
    // sets of the caches, are brought together.
    const bool copies = turns_over() || !grad_is_flat() || (STEP<P> > 1 && calls > 1) ||
                        (page_apart<S>(q.grad_stride[3]) && calls >= 4);
    const int64_t most = kVectorsByTaps[fused() ? 9 : ceil_div(row_taps(), blocks())];
    int64_t vectors;
    for (int64_t output = first_output; output < last_output; output += vectors * VL) {
      const int64_t outputs = last_output - output;
      vectors = piece_of(ceil_div(outputs, VL), most);
      const int left = static_cast<int>(min(VL, outputs - (vectors - 1) * VL));
      if (copies) {
        stretches.grad_step = vectors * VL;
        stretches.grad_stretch = ceil_div(stretches.pixels, STEP<P>) * stretches.grad_step;
        copy_grad(stretches, output, vectors, left);
        add_piece<A>(input, copied, stretches, output, vectors, left);
      } else {
        add_piece<S>(input, grad_at(0, output, pixel), stretches, output, vectors, left);
      }
    }
  }

  // All taps of the packing for `vectors` vectors of outputs; E is the type of grad, as the tensor has it or copied.
  template <class E>
  void add_piece(const P* input, const E* grad, const Stretches& stretches, int64_t output, int64_t vectors,
                 int left) const {
    if (bias)
      for (int64_t v = 0; v < vectors; v++)
        sum_pixels<P>(grad + v * VL, stretches, static_cast<int>(v + 1 < vectors ? VL : left), bias + output + v * VL);
    for (int64_t i = taps.row; i < taps.row_end; i += fused() ? 3 : 1)
      for (int64_t b = 0; b < blocks(); b++) {
        const int64_t first = row_taps() * b / blocks(), count = row_taps() * (b + 1) / blocks() - first;
        A* out[9];
        for (int64_t t = 0; t < (fused() ? 9 : count); t++) {
          const int64_t down = i + (fused() ? t / 3 : 0), across = first + (fused() ? t % 3 : t);
          const int64_t tap =
              ((channel + across / columns()) * q.kernel[0] + down) * q.kernel[1] + taps.column + across % columns();
          out[t] = partial + tap * q.out_per_group + output;
        }
        const P* at = input + first * (is_point() ? STEP<P> : kShortPlane);
        const Block<P, E> call = fused()      ? block_of_3x3<P, E>(vectors)
                                 : is_point() ? block_of_row<P, E, STEP<P>>(count, vectors)
                                              : block_of_row<P, E, kShortPlane>(count, vectors);
        call(at, from + (i - taps.row), grad, stretches, left, out);
      }
  }

  void add_point() {
    const int64_t most = input_in_place() ? run.end - run.begin : kPointChannels;
    taps = {0, 1, 0, 1};
    for (channel = run.begin; channel < run.end; channel += channels) {
      channels = min(most, run.end - channel);
      add_packing();
      bias = nullptr;
    }
  }

  void operator()(int64_t task, A* all_partial) {
    const int64_t slice = Base::begin_task(task);
    const int64_t all_taps = q.kernel[0] * q.kernel[1];
    partial = all_partial + slice * q.selected * q.out_per_group * all_taps;
    for (int64_t i = run.begin * all_taps; i < run.end * all_taps; i++)
      for (int64_t o = first_output; o < last_output; o++) partial[i * q.out_per_group + o] = 0;
    Base::for_each_tile(slice, [&] {
      if (is_point())
        add_point();
      else
        Base::for_each_packing([&] { add_packing(); });
    });
  }
};

template <class P, class S>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  Task<P, S> work(q, scratch);
  work(task, static_cast<scalar_of<P>*>(partial));
}

}  // namespace

void conv2d_channel_grad_channels_last(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  switch (q.dtype) {
    case Dtype::float32:
      return run_task<float, float>(q, task, partial, scratch);
    case Dtype::float64:
      return run_task<double, double>(q, task, partial, scratch);
    case Dtype::bfloat16:
#if defined(TRADY_MULTIPLIES_BFLOAT16)
      if (q.pairs) return run_task<bfloat16, bfloat16>(q, task, partial, scratch);
#endif
      return run_task<float, bfloat16>(q, task, partial, scratch);
    case Dtype::float16:
      return run_task<float, float16>(q, task, partial, scratch);
  }
}

}  // namespace trady::TRADY_ISA
