// conv2d_channel_grad where so many channels are selected that they fill vectors: lanes are channels, or the kernel
// columns of channels.
//
// The planes of a tile of output pixels are turned over, so that the elements under a pixel lie side by side. A
// register block holds the sums of a few vectors of them and several outputs. For each pixel the vectors are read once
// and multiplied by the outputs' elements of grad_output, broadcast from where they lie: the large operand is neither
// copied nor read in vectors that straddle cache lines, and there is nothing to reduce at the end.
#include "conv2d_channel_grad.h"
#include "conv2d_planes.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

// Equally long pieces of the turned planes and of grad_output, one an image.
struct Images {
  int64_t count, pixels;
  int64_t input_step, grad_step;
};

// sums[o * sums_step + lane] += sum over pixels of input[lane] * grad[o] for VECTORS vectors of lanes, the last of them
// `left` long. What lies `ahead` in grad_output is read next.
template <class A, int VECTORS, int OUTPUTS>
void block(const A* input, int64_t pitch, const A* grad, int64_t output_step, const Images& images, int64_t ahead,
           int left, A* sums, int64_t sums_step) {
  using V = vector_of<A>;
  constexpr int VL = LANES<A>, LINE = 64 / sizeof(A);
  // Chains of multiply-adds that do not wait for each other, as far as there are registers for their sums.
  constexpr int CHAINS = VECTORS * OUTPUTS >= VECTOR_REGISTERS / 2 ? 1 : VECTORS * OUTPUTS >= 4 ? 2 : 4;
  static_assert(CHAINS * OUTPUTS * VECTORS + VECTORS + 1 <= VECTOR_REGISTERS, "sums and operands are in registers");
  V acc[CHAINS][OUTPUTS * VECTORS];
#pragma GCC unroll 4
  for (int chain = 0; chain < CHAINS; chain++)
#pragma GCC unroll 32
    for (int a = 0; a < OUTPUTS * VECTORS; a++) acc[chain][a] = V{};
  for (int64_t n = 0; n < images.count; n++) {
    const A* x = input + n * images.input_step;
    const A* g[OUTPUTS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTPUTS; o++) g[o] = grad + n * images.grad_step + o * output_step;
    const auto step = [&](V* to, int64_t p) INLINED {
      V values[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) values[v] = keep(load(x + v * VL));
      x += pitch;
#pragma GCC unroll 8
      for (int o = 0; o < OUTPUTS; o++) {
        const V d = keep(broadcast(g[o] + p));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) to[o * VECTORS + v] += d * values[v];
      }
    };
    for (int64_t line = 0; line < images.pixels; line += LINE) {
#pragma GCC unroll 8
      for (int o = 0; o < OUTPUTS; o++) prefetch(g[o] + line + ahead);
      const int64_t stop = min(line + LINE, images.pixels);
      int64_t p = line;
      // Four at a time: moving as many pointers on as there are outputs takes units that multiply-adds need.
      for (; p + 4 <= stop; p += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) step(acc[i % CHAINS], p + i);
      }
      for (; p < stop; p++) step(acc[0], p);
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < OUTPUTS; o++) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      V sum = acc[0][o * VECTORS + v];
#pragma GCC unroll 4
      for (int chain = 1; chain < CHAINS; chain++) sum += acc[chain][o * VECTORS + v];
      A* to = sums + o * sums_step + v * VL;
      if (v + 1 < VECTORS || left == VL)
        store(to, load(to) + sum);
      else
        store_first(to, load_first(to, left) + sum, left);
    }
  }
}

template <class A>
using Block = void (*)(const A*, int64_t, const A*, int64_t, const Images&, int64_t, int, A*, int64_t);

// Register blocks: as many outputs as leave registers for the operands, 8, or 6 of four vectors, and fewer where fewer
// are left.
constexpr int kMostVectors = VECTOR_REGISTERS >= 32 ? 4 : 3;
constexpr int most_together(int64_t vectors) { return VECTOR_REGISTERS < 32 ? 4 : vectors == 4 ? 6 : 8; }
constexpr int fewer(int outputs) { return outputs > 4 ? outputs - 2 : outputs / 2; }
template <class A, int VECTORS, int OUTPUTS = most_together(VECTORS)>
Block<A> block_of_outputs(int64_t outputs) {
  if constexpr (OUTPUTS > 1)
    if (outputs < OUTPUTS) return block_of_outputs<A, VECTORS, fewer(OUTPUTS)>(outputs);
  return block<A, VECTORS, OUTPUTS>;
}
template <class A, int VECTORS = 1>
Block<A> block_of(int64_t outputs, int64_t vectors) {
  if constexpr (VECTORS < kMostVectors)
    if (vectors > VECTORS) return block_of<A, VECTORS + 1>(outputs, vectors);
  return block_of_outputs<A, VECTORS>(outputs);
}

template <class A>
struct Task : Planes<A, A, kPlane> {
  using Base = Planes<A, A, kPlane>;
  using Base::bias, Base::first_output, Base::last_output;
  using Base::channel, Base::channels, Base::first_row, Base::first_column, Base::segment, Base::shift, Base::residue;
  using Base::q, Base::planes, Base::run, Base::image, Base::images, Base::pixel, Base::pixels;
  static constexpr int VL = LANES<A>;
  A* turned;             // (slot, image, pixel, lane)
  A* partial = nullptr;  // this slice's, (C'/groups, kh, k, kw)
  // This packing.
  int64_t pitch = 0;  // from pixel to pixel

  Task(const Conv2dChannelGrad& problem, void* scratch) : Base(problem, scratch), turned(planes + kScratch) {}

  int64_t lanes() const { return channels * q.kernel[1]; }
  int64_t slot_pixels() const { return images * segment + VL; }  // turning over writes too far
  A* slot(int64_t residue) const { return turned + residue * slot_pixels() * pitch; }
  // Pixels of a point lie in the input as they do in grad_output.
  bool input_is_flat() const {
    return Base::is_plain_point() && q.input_stride[3] == 1 && q.input_stride[2] == q.width;
  }

  void pack_input() const {
    // What is written too far, behind an image and in the last lanes, is overwritten or padding.
    for (int64_t lane = 0; lane < lanes(); lane += VL) {
      const int64_t rows = min(VL, lanes() - lane);
      if (input_is_flat()) {
        for (int64_t n = 0; n < images; n++)
          turn_over<A>(Base::in_place(n, lane, 0, 0).at + pixel, q.input_stride[1], rows, pixels,
                       turned + n * segment * pitch + lane, pitch);
        continue;
      }
      uint32_t done = 0;
      for (int64_t i = 0; i < q.kernel[0]; i++) {
        if (done >> residue(i) & 1) continue;
        done |= 1u << residue(i);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t n = 0; n < images; n++)
            Base::pack_plane(planes + r * kPlane + n * segment,
                             Base::in_place(n, (lane + r) / q.kernel[1], residue(i), (lane + r) % q.kernel[1]),
                             segment);
        turn_over<A>(planes, kPlane, rows, images * segment, slot(residue(i)) + lane, pitch);
      }
    }
  }

  void add_packing() {
    pitch = ceil_div(lanes(), VL) * VL;
    pack_input();
    const Images pieces{images, pixels, segment * pitch, q.grad_stride[0]};
    const int64_t row_sums = q.selected * q.kernel[1], vectors = pitch / VL, blocks = ceil_div(vectors, kMostVectors);
    int outputs;
    for (int64_t output = first_output; output < last_output; output += outputs) {
      const int64_t left = last_output - output;
      outputs = most_together(ceil_div(vectors, blocks));
      while (outputs > left) outputs = fewer(outputs);
      const A* grad = static_cast<const A*>(q.grad_output) + image * q.grad_stride[0] +
                      (run.group * q.out_per_group + output) * q.grad_stride[1] + pixel;
      if (bias)
        for (int64_t o = 0; o < outputs; o++)
          bias[output + o] += sum_pixels(grad + o * q.grad_stride[1], images, q.grad_stride[0], pixels);
      int64_t ahead = left > outputs ? outputs * q.grad_stride[1] : 0;
      for (int64_t i = 0; i < q.kernel[0]; i++) {
        const A* input = slot(residue(i)) + shift(i) * q.out_width * pitch;
        A* sums = partial + (output * q.kernel[0] + i) * row_sums + channel * q.kernel[1];
        for (int64_t b = 0; b < blocks; b++, ahead = 0) {
          const int64_t first = vectors * b / blocks, count = vectors * (b + 1) / blocks - first;
          const int last = static_cast<int>(min(VL, lanes() - (first + count - 1) * VL));
          block_of<A>(outputs, count)(input + first * VL, pitch, grad, q.grad_stride[1], pieces, ahead, last,
                                      sums + first * VL, q.kernel[0] * row_sums);
        }
      }
    }
  }

  void add_tile() {
    first_row = pixel / q.out_width;
    first_column = pixel % q.out_width;
    segment = pixels + shift(q.kernel[0] - 1) * q.out_width;
    const int64_t slots = q.kernel[0] == 1 ? 1 : q.stride[0];
    const int64_t most_lanes = kTurnedPlanes / (slots * slot_pixels()) / VL * VL;
    const int64_t packings = ceil_div(run.end - run.begin, most_lanes / q.kernel[1]);
    for (int64_t p = 0; p < packings; p++) {
      channel = run.begin + (run.end - run.begin) * p / packings;
      channels = run.begin + (run.end - run.begin) * (p + 1) / packings - channel;
      add_packing();
      bias = nullptr;
    }
  }

  void operator()(int64_t task, A* all_partial) {
    const int64_t slice = Base::begin_task(task);
    const int64_t row_sums = q.selected * q.kernel[1];
    partial = all_partial + slice * q.out_per_group * q.kernel[0] * row_sums;
    for (int64_t row = first_output * q.kernel[0]; row < last_output * q.kernel[0]; row++)
      for (int64_t i = run.begin * q.kernel[1]; i < run.end * q.kernel[1]; i++) partial[row * row_sums + i] = 0;
    Base::for_each_tile(slice, [&] { add_tile(); });
  }
};

template <class A>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  Task<A> work(q, scratch);
  work(task, static_cast<A*>(partial));
}

// What block() has summed, (C'/groups, kh, k, kw), as (k, C'/groups, kh, kw), a vector of outputs and lanes at a time.
template <class A>
void copy_sums(const A* sums, const int64_t (&sizes)[4], int64_t begin, int64_t end, A* out) {
  constexpr int VL = LANES<A>;
  const int64_t channels = sizes[0], outputs = sizes[1], rows = sizes[2], columns = sizes[3], taps = rows * columns;
  const int64_t pitch = channels * columns, together = min(VL, end - begin);
  A block[VL * VL * VL];  // of as many taps as there are lanes
  for (int64_t channel = begin; channel < end; channel += together) {
    const int64_t count = min(together, end - channel), lanes = count * columns;
    for (int64_t output = 0; output < outputs; output += VL) {
      const A* from = sums + output * rows * pitch + channel * columns;
      A* to = out + (channel * outputs + output) * taps;
      const int64_t height = min(VL, outputs - output);
      if (height < VL || count < VL || taps > VL) {
        for (int64_t c = 0; c < count; c++)
          for (int64_t o = 0; o < height; o++)
            for (int64_t t = 0; t < taps; t++)
              to[c * outputs * taps + o * taps + t] =
                  from[(o * rows + t / columns) * pitch + c * columns + t % columns];
        continue;
      }
      if (taps == 1) {
        turn_over<A>(from, pitch, VL, VL, to, outputs);
        continue;
      }
      // (row, channel, column, output)
      for (int64_t i = 0; i < rows; i++)
        for (int64_t lane = 0; lane < lanes; lane += VL)
          turn_over<A>(from + i * pitch + lane, rows * pitch, VL, VL, block + (i * lanes + lane) * VL, VL);
      for (int64_t c = 0; c < VL; c++) {
        vector_of<A> values[VL] = {};  // by tap, then by output
        for (int64_t t = 0; t < taps; t++)
          values[t] = load(block + ((t / columns * VL + c) * columns + t % columns) * VL);
        transpose(values);
        for (int64_t o = 0; o < VL; o++) store_first(to + (c * outputs + o) * taps, values[o], static_cast<int>(taps));
      }
    }
  }
}

}  // namespace

void conv2d_channel_grad_copy_sums(const void* sums, const int64_t (&sizes)[4], int64_t begin, int64_t end, Dtype dtype,
                                   void* out) {
  if (dtype == Dtype::float64)
    return copy_sums(static_cast<const double*>(sums), sizes, begin, end, static_cast<double*>(out));
  copy_sums(static_cast<const float*>(sums), sizes, begin, end, static_cast<float*>(out));
}

void conv2d_channel_grad_many_channels(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  if (q.dtype == Dtype::float64) return run_task<double>(q, task, partial, scratch);
  return run_task<float>(q, task, partial, scratch);
}

}  // namespace trady::TRADY_ISA
