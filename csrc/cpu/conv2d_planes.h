// conv2d_channel_grad: a tile's input, packed into planes.
//
// The selected channels of the input are few and are read once for each tile of output pixels: they are packed into
// planes that hold, for one kernel column, the input under every output pixel, padding included. Kernel rows then are
// offsets into a plane, strides and dilation are gone, and grad_output, the large operand, is read flat.
//
// Only for *.isa.cpp, as vector.h.
#pragma once

#include "conv2d_channel_grad.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

TRADY_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
TRADY_INLINE int64_t clamp(int64_t a, int64_t low, int64_t high) { return max(low, min(a, high)); }
// Mostly by 1, and a division takes long.
TRADY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return b == 1 ? a : a >= 0 ? (a + b - 1) / b : -(-a / b); }

// out[i] = in[i * step] for i < count, and zero behind it up to a whole vector.
template <class P, class S>
TRADY_INLINE void copy_freely(P* __restrict out, const S* __restrict in, int64_t step, int64_t count) {
  constexpr int VL = OPERANDS<P>;
  int64_t i = 0;
  if (step == 1) {
    for (; i + VL <= count; i += VL) store_operand(out + i, load_as<P>(in + i));
    if (i < count) store_operand(out + i, load_first_as<P>(in + i, static_cast<int>(count - i)));
    return;
  }
  if (step == 2) {
    // The second load reaches one element further than the last that is taken.
    for (; i + VL < count; i += VL)
      store_operand(out + i, even_lanes(load_as<P>(in + 2 * i), load_as<P>(in + 2 * i + VL)));
    if (MASKED_LOADS && i < count) {
      const int64_t left = 2 * (count - i) - 1;
      const operand_of<P> first = load_first_as<P>(in + 2 * i, static_cast<int>(min(left, VL)));
      store_operand(out + i, left <= VL
                                 ? even_lanes(first, operand_of<P>{})
                                 : even_lanes(first, load_first_as<P>(in + 2 * i + VL, static_cast<int>(left - VL))));
      return;
    }
  }
  const int64_t end = (count + VL - 1) / VL * VL;
  for (; i < count; i++) out[i] = element_as<P>(in[i * step]);
  for (; i < end; i++) out[i] = P{};
}
// Up to a whole vector behind the last is cleared too.
template <class P>
TRADY_INLINE void clear_freely(P* out, int64_t count) {
  for (int64_t i = 0; i < count; i += OPERANDS<P>) store_operand(out + i, operand_of<P>{});
}

// The sum of `count` stretches of pixels, `step` apart.
template <class P>
scalar_of<P> sum_pixels(const P* grad, int64_t count, int64_t step, int64_t pixels) {
  constexpr int VL = OPERANDS<P>;
  // Chains of additions that do not wait for each other.
  constexpr int CHAINS = 4;
  vector_of<P> acc[CHAINS] = {};
  const operand_of<P> one = ones<P>();
  for (int64_t n = 0; n < count; n++, grad += step) {
    int64_t p = 0;
    for (; p + CHAINS * VL <= pixels; p += CHAINS * VL)
      for (int chain = 0; chain < CHAINS; chain++)
        acc[chain] = multiply_add(acc[chain], load_operand(grad + p + chain * VL), one);
    for (; p + VL <= pixels; p += VL) acc[0] = multiply_add(acc[0], load_operand(grad + p), one);
    if (p < pixels) acc[1] = multiply_add(acc[1], load_first_operand(grad + p, static_cast<int>(pixels - p)), one);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Of one packing.
constexpr int64_t kMaxRows = 16, kMaxColumns = 16;

// Kernel rows [row, row_end) and columns [column, column_end): the taps that one packing serves.
struct Taps {
  int64_t row, row_end, column, column_end;
};

// P is what the planes hold, and S what the tensors do. Planes are PITCH elements apart, a constant, so that a tap is
// an immediate offset of one base pointer.
template <class P, class S, int PITCH>
struct Planes {
  static constexpr int64_t kPlanes = kMaxPlanes * kPlane / PITCH;
  const Conv2dChannelGrad& q;
  P* planes;
  P* gathered_input;  // lies behind the planes, where there is room until they are packed
  // This task.
  ChannelRun run = {};
  int64_t first_output = 0, last_output = 0;  // of the group
  scalar_of<P>* bias = nullptr;               // this slice's, while a tile's first packing is added
  // This tile.
  int64_t image = 0, images = 0, pixel = 0, pixels = 0;
  // This packing: planes for (slot, channel, kernel column).
  Taps taps = {};
  int64_t channel = 0, channels = 0;
  int64_t slots = 0;
  int64_t first_shift = 0;                  // that of the first kernel row
  int64_t first_row = 0, first_column = 0;  // where planes begin, in rows of the output and those behind them
  int64_t segment = 0;                      // elements of a plane for one image

  Planes(const Conv2dChannelGrad& problem, void* scratch)
      : q(problem), planes(static_cast<P*>(scratch)), gathered_input(planes + kMaxPlanes * kPlane) {}
  static constexpr int64_t kGathered = kScratch - kMaxPlanes * kPlane;

  bool is_point() const { return q.kernel[0] * q.kernel[1] == 1; }
  // A point whose output pixels are those of the input.
  bool is_plain_point() const {
    return is_point() && q.stride[0] * q.stride[1] == 1 && q.padding[0] + q.padding[1] == 0;
  }

  // Kernel row i reads input row h * stride + i * dilation - padding. That is row h + shift(i) of the input rows of its
  // residue, so one slot of planes for each residue serves all kernel rows.
  int64_t shift(int64_t i) const { return i * q.dilation[0] / q.stride[0]; }
  int64_t residue(int64_t i) const { return i * q.dilation[0] % q.stride[0]; }
  bool alone() const { return taps.row_end - taps.row == 1; }
  int64_t slot(int64_t i) const { return alone() ? 0 : residue(i); }
  int64_t columns() const { return taps.column_end - taps.column; }
  P* plane(int64_t s, int64_t c, int64_t column) const {
    return planes + ((s * channels + c) * columns() + column) * PITCH;
  }
  // Where the planes of kernel row i begin, the first channel's and kernel column's.
  int64_t row_start(int64_t i) const { return plane(slot(i), 0, 0) - planes + (shift(i) - first_shift) * q.out_width; }

  // What a plane is made from: under output row h and column w lies element (h * stride[0] + offset[0],
  // w * stride[1] + offset[1]), or zero where there is none.
  template <class T>
  struct Source {
    const T* at;
    int64_t size[2], step[2];
    int64_t stride[2], offset[2];
  };
  int64_t row_offset(int64_t residue) const { return residue - q.padding[0]; }
  int64_t column_offset(int64_t j) const { return j * q.dilation[1] - q.padding[1]; }
  Source<S> in_place(int64_t n, int64_t c, int64_t residue, int64_t j) const {
    return {static_cast<const S*>(q.input) + (image + n) * q.input_stride[0] + (channel + c) * q.input_stride[1],
            {q.height, q.width},
            {q.input_stride[2], q.input_stride[3]},
            {q.stride[0], q.stride[1]},
            {row_offset(residue), column_offset(j)}};
  }

  // One plane of one image, for `count` output pixels from `pixel` on, rows of out_width. Writes in order, so that what
  // it writes too far is overwritten.
  template <class T>
  void pack_plane(P* out, const Source<T>& in, int64_t count) const {
    const int64_t low = clamp(ceil_div(-in.offset[1], in.stride[1]), 0, q.out_width);
    const int64_t high = clamp(ceil_div(in.size[1] - in.offset[1], in.stride[1]), low, q.out_width);
    if (in.stride[0] == 1 && in.stride[1] == 1 && in.size[1] == q.out_width && in.step[1] == 1 &&
        in.step[0] == q.out_width)
      return pack_shifted(out, in, count, low, high);
    int64_t row = first_row, column = first_column;
    for (const P* end = out + count; out < end; row++, column = 0) {
      const int64_t stop = min(q.out_width, column + (end - out));
      const int64_t from = row * in.stride[0] + in.offset[0];
      const bool inside = from >= 0 && from < in.size[0];
      const int64_t a = inside ? clamp(low, column, stop) : stop, b = inside ? clamp(high, a, stop) : stop;
      if (a > column) clear_freely(out, a - column);
      if (b > a)
        copy_freely(out + (a - column), in.at + from * in.step[0] + (a * in.stride[1] + in.offset[1]) * in.step[1],
                    in.stride[1] * in.step[1], b - a);
      const int64_t written = a + (b - a + OPERANDS<P> - 1) / OPERANDS<P> * OPERANDS<P>;
      if (written < stop) clear_freely(out + (written - column), stop - written);
      out += stop - column;
    }
  }

  // Output rows as long as the source's, one after another, at stride 1: a plane is a stretch of the source, shifted,
  // but for the columns that padding puts there, which come from the row before or behind: those outside of [low,
  // high).
  template <class T>
  void pack_shifted(P* out, const Source<T>& in, int64_t count, int64_t low, int64_t high) const {
    const int64_t from = (first_row + in.offset[0]) * q.out_width + first_column + in.offset[1];
    const int64_t a = clamp(-from, 0, count), b = clamp(in.size[0] * q.out_width - from, a, count);
    if (a > 0) clear_freely(out, a);
    if (b > a) copy_freely(out + a, in.at + from + a, 1, b - a);
    const int64_t written = a + (b - a + OPERANDS<P> - 1) / OPERANDS<P> * OPERANDS<P>;
    if (written < count) clear_freely(out + written, count - written);
    for (int64_t w = 0; w < low; w++) clear_column(out, w, count);
    for (int64_t w = high; w < q.out_width; w++) clear_column(out, w, count);
  }
  void clear_column(P* out, int64_t w, int64_t count) const {
    for (int64_t p = w - first_column + (w < first_column ? q.out_width : 0); p < count; p += q.out_width) out[p] = P{};
  }

  // Where several planes would fetch each element, and those that a plane takes are apart, they are gathered first: of
  // all images, the rows and columns of each residue for themselves, padding rows included, so that from there on
  // strides are gone; of several channels at a time, since those of a pixel may be in one cache line.
  struct Gathered {
    int64_t rows, columns;  // of an image and residue
    int64_t residue;        // elements of one
    int64_t channels;       // at a time; none where elements are read from the tensor
  };
  Gathered gathered() const {
    if (q.input_stride[3] * q.stride[1] == 1 || columns() <= q.stride[1]) return {};
    const int64_t rows = (first_column + segment - 1) / q.out_width + 1, across = ceil_div(q.width, q.stride[1]);
    const int64_t residue = images * rows * across + kSlack;
    return {rows, across, residue, min(channels, kGathered / (q.stride[0] * q.stride[1] * residue))};
  }
  P* gathered_at(const Gathered& g, int64_t c, int64_t row_residue, int64_t column_residue) const {
    return gathered_input + ((c * q.stride[0] + row_residue) * q.stride[1] + column_residue) * g.residue;
  }
  void gather(const Gathered& g, int64_t c, int64_t count) const {
    const int64_t stride = q.stride[1], step = stride * q.input_stride[3];
    const int64_t next_channel = q.stride[0] * stride * g.residue;
    for (int64_t n = 0; n < images; n++) {
      const S* image_at =
          static_cast<const S*>(q.input) + (image + n) * q.input_stride[0] + (channel + c) * q.input_stride[1];
      int64_t from = first_row * q.stride[0] - q.padding[0];
      for (int64_t row = n * g.rows; row < (n + 1) * g.rows; row++)
        for (int64_t i = 0; i < q.stride[0]; i++, from++)
          for (int64_t j = 0; j < stride; j++) {
            const bool inside = from >= 0 && from < q.height;
            const int64_t end = inside ? g.columns - (q.width - j <= (g.columns - 1) * stride) : 0;
            const S* in = inside ? image_at + from * q.input_stride[2] + j * q.input_stride[3] : image_at;
            P* to = gathered_at(g, 0, i, j) + row * g.columns;
            for (int64_t k = 0; k < count; k++, in += q.input_stride[1], to += next_channel)
              gather_row(to, in, step, end, g.columns);
          }
    }
  }
  // In order: what is written too far is overwritten, or in the slack.
  static void gather_row(P* __restrict out, const S* __restrict in, int64_t step, int64_t end, int64_t width) {
    if (step == 2) {
      copy_freely(out, in, 2, end);
    } else {
#pragma GCC unroll 8
      for (int64_t w = 0; w < end; w++) out[w] = element_as<P>(in[w * step]);
    }
    for (int64_t w = end; w < width; w++) out[w] = P{};
  }
  Source<P> source(const Gathered& g, int64_t n, int64_t c, int64_t residue, int64_t j) const {
    const int64_t offset = column_offset(j), shift = -ceil_div(-offset, q.stride[1]);
    return {gathered_at(g, c, residue, offset - shift * q.stride[1]) + n * g.rows * g.columns,
            {g.rows, g.columns},
            {g.columns, 1},
            {1, 1},
            {-first_row, shift}};
  }

  void pack_input() const {
    int64_t residues[kMaxRows];  // by slot
    int64_t used = 0;
    uint32_t done = 0;
    for (int64_t i = taps.row; i < taps.row_end; i++) {
      if (done >> slot(i) & 1) continue;
      done |= 1u << slot(i);
      residues[used++] = residue(i);
    }
    const Gathered g = gathered();
    const int64_t together = max(g.channels, 1);
    for (int64_t c = 0; c < channels; c++) {
      if (g.channels > 0 && c % together == 0) gather(g, c, min(together, channels - c));
      for (int64_t i = 0; i < used; i++)
        for (int64_t j = 0; j < columns(); j++) {
          P* out = plane(alone() ? 0 : residues[i], c, j);
          if (g.channels > 0 && g.columns == q.out_width && g.rows * g.columns == segment) {
            Source<P> all = source(g, 0, c % together, residues[i], taps.column + j);
            all.size[0] *= images;
            pack_plane(out, all, images * segment);
            continue;
          }
          for (int64_t n = 0; n < images; n++, out += segment) {
            if (g.channels > 0)
              pack_plane(out, source(g, n, c % together, residues[i], taps.column + j), segment);
            else
              pack_plane(out, in_place(n, c, residues[i], taps.column + j), segment);
          }
        }
    }
  }

  // Its channels and outputs; returns its slice.
  int64_t begin_task(int64_t task) {
    const int64_t range = task % q.ranges;
    // Of one run all channels: those that were exchanged with outputs are not in q.runs.
    run = q.run_count == 1 ? ChannelRun{0, q.selected, q.runs[0].group} : q.runs[task / q.ranges / q.slices];
    first_output = range * q.range_outputs;
    last_output = min(q.out_per_group, first_output + q.range_outputs);
    return task / q.ranges % q.slices;
  }

  // Calls add() for every tile of the slice.
  template <class F>
  void for_each_tile(int64_t slice, F add) {
    scalar_of<P>* sums = q.bias ? static_cast<scalar_of<P>*>(q.bias) + slice * q.out_per_group : nullptr;
    if (sums)
      for (int64_t o = first_output; o < last_output; o++) sums[o] = 0;
    for (int64_t tile = q.tiles * slice / q.slices; tile < q.tiles * (slice + 1) / q.slices; tile++) {
      bias = sums;
      begin_tile(tile);
      add();
    }
  }

  void begin_tile(int64_t tile) {
    const int64_t out_pixels = q.out_height * q.out_width;
    const int64_t tiles_per_image = ceil_div(out_pixels, q.tile_pixels);
    image = tile / tiles_per_image * q.tile_images;
    images = min(q.tile_images, q.batch - image);
    pixel = tile % tiles_per_image * q.tile_pixels;
    pixels = min(q.tile_pixels, out_pixels - pixel);
  }

  // Calls add() for every packing of the tile: as many taps and channels as there are planes for.
  template <class F>
  void for_each_packing(F add) {
    const int64_t reach = shift(q.kernel[0] - 1) * q.out_width;
    const int64_t used_slots = q.kernel[0] == 1 ? 1 : q.stride[0];
    const int64_t first_columns = min(q.kernel[1], kMaxColumns);
    const bool share_rows = images * (pixels + reach) + kSlack <= PITCH && used_slots * first_columns <= kPlanes &&
                            q.kernel[0] <= kMaxRows && used_slots <= kMaxRows;
    for (taps.row = 0; taps.row < q.kernel[0]; taps.row = taps.row_end) {
      taps.row_end = share_rows ? q.kernel[0] : taps.row + 1;
      slots = share_rows ? used_slots : 1;
      first_shift = shift(taps.row);
      first_row = pixel / q.out_width + first_shift;
      first_column = pixel % q.out_width;
      segment = pixels + (shift(taps.row_end - 1) - first_shift) * q.out_width;
      for (taps.column = 0; taps.column < q.kernel[1]; taps.column = taps.column_end) {
        taps.column_end = min(q.kernel[1], taps.column + kMaxColumns);
        const int64_t most = max(1, kPlanes / (slots * columns()));
        const int64_t packings = ceil_div(run.end - run.begin, most);
        for (int64_t p = 0; p < packings; p++) {
          channel = run.begin + (run.end - run.begin) * p / packings;
          channels = run.begin + (run.end - run.begin) * (p + 1) / packings - channel;
          add();
          bias = nullptr;
        }
      }
    }
  }
};

}  // namespace
}  // namespace trady::TRADY_ISA
