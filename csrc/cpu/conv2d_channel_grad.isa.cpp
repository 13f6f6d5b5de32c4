// conv2d_channel_grad where the pixels of a plane are adjacent: lanes are pixels.
//
// The input is packed into planes (conv2d_planes.h), and grad_output, the large operand, is read flat and as it is.
#include "conv2d_planes.h"

namespace trady::TRADY_ISA {
namespace {

// Equally long pieces of the input and of grad_output, one an image. Where several images of a small map leave a few
// pixels behind the last whole vector, those of all images are gathered into one more piece.
template <class P>
struct Segments {
  int64_t count, pixels;
  int64_t input_step, grad_step;
  int64_t gathered = 0;  // pixels
  const P* gathered_input = nullptr;
  const int64_t* gathered_rows = nullptr;
  const P* gathered_grad = nullptr;
};

// sums[o * TAPS + tap], or sums[tap * OUTPUTS + o] of a point, = sum over pixels of input[tap] * grad[o]. Taps are
// COLUMNS neighbouring planes for each of ROWS kernel rows, which begin at rows[]; those of a 1x1 kernel, a point, are
// a channel a row. What lies `ahead` in grad_output is read next.
template <class P, int OUTPUTS, int ROWS, int COLUMNS>
void block(const P* input, const int64_t* rows, const P* grad, int64_t output_step, Segments<P> segments, int64_t ahead,
           scalar_of<P>* sums) {
  constexpr int TAPS = ROWS * COLUMNS;
  static_assert(OUTPUTS * TAPS + (OUTPUTS < TAPS ? OUTPUTS : TAPS) + 1 <= VECTOR_REGISTERS,
                "sums and operands are in registers");
  constexpr int VL = OPERANDS<P>;
  constexpr auto at = [](int o, int t) { return COLUMNS == 1 ? t * OUTPUTS + o : o * TAPS + t; };
  vector_of<P> acc[OUTPUTS * TAPS];
#pragma GCC unroll 64
  for (int a = 0; a < OUTPUTS * TAPS; a++) acc[a] = vector_of<P>{};
  const int64_t pieces = segments.count + (segments.gathered > 0);
  for (int64_t piece = 0; piece < pieces; piece++) {
    if (piece == segments.count) {
      input = segments.gathered_input;
      rows = segments.gathered_rows;
      grad = segments.gathered_grad;
      output_step = kPlane;
      ahead = 0;
      segments.pixels = segments.gathered;
    }
    const P* x[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) x[i] = input + rows[i];
    const P* g[OUTPUTS];
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; o++) g[o] = grad + o * output_step;
    int64_t p = 0;
    // Each operand is pinned to a register: GCC would otherwise fold the load into every multiply-add that uses it.
    auto step = [&](auto load) INLINED {
      if constexpr (OUTPUTS <= TAPS) {
        operand_of<P> d[OUTPUTS];
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) d[o] = keep(load(g[o] + p));
#pragma GCC unroll 64
        for (int t = 0; t < TAPS; t++) {
          const operand_of<P> value = keep(load(x[t / COLUMNS] + t % COLUMNS * kPlane + p));
#pragma GCC unroll 16
          for (int o = 0; o < OUTPUTS; o++) acc[at(o, t)] = multiply_add(acc[at(o, t)], d[o], value);
        }
      } else {
        operand_of<P> values[TAPS];
#pragma GCC unroll 64
        for (int t = 0; t < TAPS; t++) values[t] = keep(load(x[t / COLUMNS] + t % COLUMNS * kPlane + p));
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) {
          const operand_of<P> d = keep(load(g[o] + p));
#pragma GCC unroll 64
          for (int t = 0; t < TAPS; t++) acc[at(o, t)] = multiply_add(acc[at(o, t)], d, values[t]);
        }
      }
    };
    for (; p + VL <= segments.pixels; p += VL) {
      if constexpr (TAPS > 2) {
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) prefetch_later(g[o] + p + ahead);
      }
      step([](const P* from) INLINED { return load_operand(from); });
    }
    if (p < segments.pixels) {
      const int left = static_cast<int>(segments.pixels - p);
      step([left](const P* from) INLINED { return load_first_operand(from, left); });
    }
    input += segments.input_step;
    grad += segments.grad_step;
  }
  sum_lanes(acc, sums);
}

template <class P>
using Block = void (*)(const P*, const int64_t*, const P*, int64_t, Segments<P>, int64_t, scalar_of<P>*);

// Register blocks by number of taps: as many outputs as leave registers for the operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxTaps = 8;
constexpr int kOutputsByTaps[] = {0, 8, 8, 8, 6, 5, 4, 3, 3, 3};
constexpr bool kFuses3x3 = true;
#else
constexpr int kMaxTaps = 6;
constexpr int kOutputsByTaps[] = {0, 8, 4, 4, 3, 2, 2};
constexpr bool kFuses3x3 = false;
#endif

// As many outputs as fit, one less (so that any number is cut into two neighbouring sizes), and one. Taps too are cut
// into two neighbouring sizes, so there is what the next larger number of taps asks for as well.
template <class P, int ROWS, int COLUMNS>
Block<P> block_of(int64_t outputs) {
  constexpr int taps = ROWS * COLUMNS, most = kOutputsByTaps[taps];
  constexpr int next = taps < kMaxTaps ? kOutputsByTaps[taps + 1] - 1 : 1;
  if (outputs == most) return block<P, most, ROWS, COLUMNS>;
  if (outputs == most - 1) return block<P, most - 1, ROWS, COLUMNS>;
  if (outputs == next && taps >= kMaxTaps / 2) return block < P, taps >= kMaxTaps / 2 ? next : 1, ROWS, COLUMNS > ;
  return block<P, 1, ROWS, COLUMNS>;
}
template <class P, int TAPS = 1>
Block<P> block_of_points(int64_t taps, int64_t outputs) {
  if constexpr (TAPS < kMaxTaps)
    if (taps > TAPS) return block_of_points<P, TAPS + 1>(taps, outputs);
  return block_of<P, TAPS, 1>(outputs);
}
template <class P, int TAPS = 1>
Block<P> block_of_row(int64_t taps, int64_t outputs) {
  if constexpr (TAPS < kMaxTaps)
    if (taps > TAPS) return block_of_row<P, TAPS + 1>(taps, outputs);
  return block_of<P, 1, TAPS>(outputs);
}
template <class P>
Block<P> block_of_3x3([[maybe_unused]] int64_t outputs) {
  if constexpr (kFuses3x3) return block_of<P, 3, 3>(outputs);
  return nullptr;
}

// P is what the planes hold, and S what the tensors do.
template <class P, class S>
struct Task : Planes<P, S, kPlane> {
  using Base = Planes<P, S, kPlane>;
  using A = scalar_of<P>;
  using Base::bias, Base::first_output, Base::last_output;
  using Base::channel, Base::channels, Base::segment, Base::alone, Base::columns, Base::row_start;
  using Base::is_point, Base::is_plain_point, Base::pack_input;
  using Base::q, Base::planes, Base::run, Base::image, Base::images, Base::pixel, Base::pixels, Base::taps;
  A* partial = nullptr;  // this slice's
  P* packed_grad;
  P* gathered_grad;
  int64_t from[kMaxPlanes];        // where a kernel row's planes begin, or a point's channel
  int64_t gathered[kMaxPlanes];    // and where the gathered pixels of those do
  int64_t tap_places[kMaxPlanes];  // where the sum of (channel, column) goes, in a kernel row of an output's

  Task(const Conv2dChannelGrad& problem, void* scratch)
      : Base(problem, scratch),
        packed_grad(planes + kMaxPlanes * kPlane),
        gathered_grad(packed_grad + kMostOutputs * kPlane) {}

  const S* grad_at(int64_t n, int64_t output, int64_t p) const {
    return static_cast<const S*>(q.grad_output) + (image + n) * q.grad_stride[0] +
           (run.group * q.out_per_group + output) * q.grad_stride[1] + p / q.out_width * q.grad_stride[2] +
           p % q.out_width * q.grad_stride[3];
  }
  // Pixels follow each other, and need no conversion.
  bool readable() const { return is_same<P, S> && q.grad_stride[3] == 1 && q.grad_stride[2] == q.out_width; }
  // A point's input needs no planes where its pixels are those of the output. Tails are gathered from aligned planes.
  bool input_in_place() const {
    return is_same<P, S> && is_plain_point() && q.input_stride[3] == 1 && q.input_stride[2] == q.width &&
           (images == 1 || tail() == 0);
  }
  // Pixels [pixel, pixel + pixels) of all images of `outputs` outputs, one row an output.
  void pack_grad(int64_t output, int64_t outputs) const {
    if (q.grad_stride[2] == q.out_width * q.grad_stride[3]) {
      const S* from = grad_at(0, output, pixel);
      for (int64_t o = 0; o < outputs; o++)
        for (int64_t n = 0; n < images; n++)
          copy_freely(packed_grad + o * kPlane + n * pixels, from + o * q.grad_stride[1] + n * q.grad_stride[0],
                      q.grad_stride[3], pixels);
      return;
    }
    for (int64_t o = 0; o < outputs; o++) {
      P* to = packed_grad + o * kPlane;
      for (int64_t n = 0; n < images; n++)
        for (int64_t p = pixel; p < pixel + pixels;) {
          const int64_t stop = min(pixel + pixels, (p / q.out_width + 1) * q.out_width);
          copy_freely(to, grad_at(n, output + o, p), q.grad_stride[3], stop - p);
          to += stop - p;
          p = stop;
        }
    }
  }

  // The pixels behind the last whole vector of each image.
  int64_t tail() const { return pixels % OPERANDS<P>; }
  int64_t tail_room() const { return (images * tail() + OPERANDS<P> - 1) / OPERANDS<P> * OPERANDS<P>; }
  // Whether gathering them saves more vector steps than it costs, and there is room behind the images of each plane.
  bool gathers() const {
    const int64_t rows = taps.row_end - taps.row, steps = images - tail_room() / OPERANDS<P>;
    return tail() > 0 && steps * rows * channels * columns() > 3 * images &&
           images * segment + rows * tail_room() + kSlack <= kPlane;
  }
  void gather_tails(P* to, const P* from, int64_t image_step) const {
    for (int64_t n = 0; n < images; n++, to += tail(), from += image_step)
      copy_freely(to, from + pixels - tail(), 1, tail());
  }

  bool fuses() const { return kFuses3x3 && q.kernel[0] == 3 && q.kernel[1] == 3 && !alone(); }

  void add_packing() {
    const bool point = is_point(), in_place = input_in_place(), direct = readable();
    const bool fused = fuses();
    const int64_t rows = taps.row_end - taps.row, row_taps = channels * columns(), all_taps = q.kernel[0] * q.kernel[1];
    const P* input = planes;
    Segments<P> segments{images, pixels, segment, direct ? q.grad_stride[0] : pixels};
    if (in_place) {
      input = static_cast<const P*>(q.input) + image * q.input_stride[0] + channel * q.input_stride[1] + pixel;
      segments.input_step = q.input_stride[0];
    } else {
      pack_input();
    }
    if (point) {
      for (int64_t c = 0; c < channels; c++) from[c] = c * (in_place ? q.input_stride[1] : kPlane);
    } else {
      for (int64_t i = 0; i < rows; i++) from[i] = row_start(taps.row + i);
    }
    for (int64_t t = 0; t < row_taps; t++)
      tap_places[t] = (channel + t / columns()) * q.out_per_group * all_taps + taps.column + t % columns();

    const bool gathers_tails = gathers();
    if (gathers_tails) {
      segments.pixels -= tail();
      segments.gathered = images * tail();
      segments.gathered_input = planes;
      segments.gathered_grad = gathered_grad;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t t = 0; t < row_taps; t++) {
          const int64_t row = point ? from[t] : from[i], plane = row / kPlane * kPlane;
          int64_t& to = gathered[point ? t : i];
          to = plane + images * segment + i * tail_room();
          gather_tails(planes + to + (point ? 0 : t * kPlane), planes + row + (point ? 0 : t * kPlane), segment);
        }
    }

    const int64_t blocks = fused ? channels : ceil_div(row_taps, kMaxTaps);
    const int64_t wanted = kOutputsByTaps[fused ? 9 : ceil_div(row_taps, blocks)];
    // All blocks of an output's one after another, while its pixels are in the caches; or of many kernel rows, whose
    // planes together are not, all outputs of one block.
    const int64_t calls = blocks * (fused ? 1 : rows);
    const int64_t together = direct && !gathers_tails && rows > kRowsTogether ? 1 : calls;
    for (int64_t call = 0; call < calls; call += together)
      add_blocks(input, segments, blocks, wanted, call, call + together);
  }

  // Blocks [begin, end) of all outputs: there are `blocks` in a kernel row, or in all rows of a fused kernel.
  void add_blocks(const P* input, Segments<P> segments, int64_t blocks, int64_t wanted, int64_t begin, int64_t end) {
    const bool point = is_point(), direct = readable(), fused = fuses();
    const int64_t row_taps = channels * columns(), all_taps = q.kernel[0] * q.kernel[1];
    int64_t outputs;
    for (int64_t output = first_output; output < last_output; output += outputs) {
      // Two neighbouring sizes, as far as they go.
      const int64_t left = last_output - output, pieces = ceil_div(left, wanted);
      outputs = left >= wanted && pieces * (wanted - 1) != left ? wanted : left >= wanted - 1 ? wanted - 1 : 1;
      const P* grad = packed_grad;
      int64_t output_step = kPlane, ahead = 0;
      if (direct) {
        grad = reinterpret_cast<const P*>(grad_at(0, output, pixel));
        output_step = q.grad_stride[1];
        if (output + outputs < last_output) ahead = outputs * output_step;
      } else {
        pack_grad(output, outputs);
      }
      if (segments.gathered)
        for (int64_t o = 0; o < outputs; o++)
          gather_tails(gathered_grad + o * kPlane, grad + o * output_step, segments.grad_step);
      if (bias && begin == 0)
        for (int64_t o = 0; o < outputs; o++) {
          bias[output + o] += sum_pixels(grad + o * output_step, images, segments.grad_step, segments.pixels);
          bias[output + o] += sum_pixels(gathered_grad + o * kPlane, 1, 0, segments.gathered);
        }
      for (int64_t c = begin; c < end; c++, ahead = 0) {
        const int64_t i = c / blocks, b = c % blocks;
        const int64_t first = row_taps * b / blocks, count = row_taps * (b + 1) / blocks - first;
        alignas(64) A sums[64];
        segments.gathered_rows = gathered + (point ? first : i);
        const Block<P> call = fused   ? block_of_3x3<P>(outputs)
                              : point ? block_of_points<P>(count, outputs)
                                      : block_of_row<P>(count, outputs);
        if (!point && segments.gathered_input) segments.gathered_input = planes + first * kPlane;
        call(point ? input : input + first * kPlane, from + (point ? first : i), grad, output_step, segments, ahead,
             sums);
        A* to = partial + output * all_taps + (taps.row + i) * q.kernel[1] + tap_places[first];
        if (fused)
          add(to, sums, outputs * 9);
        else if (point)
          for (int64_t t = 0; t < count; t++) add(to + t * q.out_per_group, sums + t * outputs, outputs);
        else
          for (int64_t o = 0; o < outputs; o++)
            for (int64_t t = 0; t < count; t++)
              to[o * all_taps + tap_places[first + t] - tap_places[first]] += sums[o * count + t];
      }
    }
  }
  static void add(A* to, const A* sums, int64_t count) {
    constexpr int VL = LANES<A>;
    int64_t i = 0;
    for (; i + VL <= count; i += VL) store(to + i, load(to + i) + load(sums + i));
    const int left = static_cast<int>(count - i);
    if (left) store_first(to + i, load_first(to + i, left) + load_first(sums + i, left), left);
  }

  void operator()(int64_t task, A* all_partial) {
    const int64_t slice = Base::begin_task(task);
    const int64_t all_taps = q.kernel[0] * q.kernel[1];
    partial = all_partial + slice * q.selected * q.out_per_group * all_taps;
    for (int64_t c = run.begin; c < run.end; c++) {
      A* to = partial + (c * q.out_per_group + first_output) * all_taps;
      for (int64_t i = 0; i < (last_output - first_output) * all_taps; i++) to[i] = 0;
    }
    Base::for_each_tile(slice, [&] { Base::for_each_packing([&] { add_packing(); }); });
  }
};

template <class P, class S>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  Task<P, S> work(q, scratch);
  work(task, static_cast<scalar_of<P>*>(partial));
}

}  // namespace

void conv2d_channel_grad(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  switch (q.dtype) {
    case Dtype::float32:
      return run_task<float, float>(q, task, partial, scratch);
    case Dtype::float64:
      return run_task<double, double>(q, task, partial, scratch);
    case Dtype::bfloat16:
#if defined(TRADY_MULTIPLIES_BFLOAT16)
      return run_task<bfloat16, bfloat16>(q, task, partial, scratch);
#else
      return run_task<float, bfloat16>(q, task, partial, scratch);
#endif
    case Dtype::float16:
      return run_task<float, float16>(q, task, partial, scratch);
  }
}

}  // namespace trady::TRADY_ISA
