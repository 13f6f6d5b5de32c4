// conv2d_channel_grad: the input under a tile of output pixels as planes, for the loops that read grad_output flat.
//
// A plane holds, for one channel and kernel column, the input under every output pixel, padding included. Kernel rows
// then are offsets into a plane; strides and dilation are gone. Only for *.isa.cpp.
#pragma once

#include "conv2d_channel_grad.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

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
      const int left = static_cast<int>(2 * (count - i) - 1);
      const operand_of<P> first = load_first_as<P>(in + 2 * i, left < VL ? left : VL);
      const operand_of<P> second = left > VL ? load_first_as<P>(in + 2 * i + VL, left - VL) : operand_of<P>{};
      store_operand(out + i, even_lanes(first, second));
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

TRADY_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
TRADY_INLINE int64_t clamp(int64_t a, int64_t low, int64_t high) { return max(low, min(a, high)); }
TRADY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

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

// A range of output pixels of one image, or all pixels of several images. P is what the planes hold, and S what the
// tensors do.
template <class P, class S>
struct Tile {
  const Conv2dChannelGrad& q;
  int64_t image = 0, images = 0, pixel = 0, pixels = 0;
  int64_t first_row = 0;  // of the planes' rows, as shift() counts them
  int64_t segment = 0;    // elements of a plane for one image

  void move_to(int64_t tile) {
    const int64_t out_pixels = q.out_height * q.out_width;
    const int64_t tiles_per_image = ceil_div(out_pixels, q.tile_pixels);
    image = tile / tiles_per_image * q.tile_images;
    images = min(q.tile_images, q.batch - image);
    pixel = tile % tiles_per_image * q.tile_pixels;
    pixels = min(q.tile_pixels, out_pixels - pixel);
  }

  // Kernel row i reads input row h * stride + i * dilation - padding. That is row h + shift(i) of the input rows of its
  // residue, so one slot of planes for each residue serves all kernel rows.
  int64_t shift(int64_t i) const { return i * q.dilation[0] / q.stride[0]; }
  int64_t residue(int64_t i) const { return i * q.dilation[0] % q.stride[0]; }

  // One plane of one image, for output pixels from `pixel` on: `segment` of them, rows of out_width. Output row h of
  // the plane is input row h * stride + residue - padding. Writes in order, so that what it writes too far is
  // overwritten.
  void pack_plane(P* out, const S* in, int64_t residue, int64_t j) const {
    const int64_t step = q.stride[1], offset = j * q.dilation[1] - q.padding[1];
    const int64_t low = clamp(ceil_div(-offset, step), 0, q.out_width);
    const int64_t high = clamp(ceil_div(q.width - offset, step), low, q.out_width);
    const int64_t start = pixel + first_row * q.out_width;
    if (shifts_flat())
      return pack_shifted(out, in, start + (residue - q.padding[0]) * q.width + offset, start, low, high);
    int64_t row = start / q.out_width, column = start % q.out_width;
    for (const P* end = out + segment; out < end; row++, column = 0) {
      const int64_t stop = min(q.out_width, column + (end - out));
      const int64_t from = row * q.stride[0] + residue - q.padding[0];
      const bool inside = from >= 0 && from < q.height;
      const int64_t a = inside ? clamp(low, column, stop) : stop, b = inside ? clamp(high, a, stop) : stop;
      if (a > column) clear_freely(out, a - column);
      if (b > a)
        copy_freely(out + (a - column), in + from * q.input_stride[2] + (a * step + offset) * q.input_stride[3],
                    step * q.input_stride[3], b - a);
      const int64_t written = a + (b - a + OPERANDS<P> - 1) / OPERANDS<P> * OPERANDS<P>;
      if (written < stop) clear_freely(out + (written - column), stop - written);
      out += stop - column;
    }
  }

  // Output rows as long as input rows, one after another, at stride 1: a plane is a stretch of the input, shifted, but
  // for the columns that padding puts there, which come from the row before or behind.
  bool shifts_flat() const {
    return q.stride[0] == 1 && q.stride[1] == 1 && q.out_width == q.width && q.input_stride[3] == 1 &&
           q.input_stride[2] == q.width;
  }
  // out[p] = in[from + p], zero outside of the image; output columns outside of [low, high) are zero.
  void pack_shifted(P* out, const S* in, int64_t from, int64_t start, int64_t low, int64_t high) const {
    const int64_t a = clamp(-from, 0, segment), b = clamp(q.height * q.width - from, a, segment);
    if (a > 0) clear_freely(out, a);
    if (b > a) copy_freely(out + a, in + from + a, 1, b - a);
    const int64_t written = a + (b - a + OPERANDS<P> - 1) / OPERANDS<P> * OPERANDS<P>;
    if (written < segment) clear_freely(out + written, segment - written);
    if (high - low == q.out_width) return;
    for (int64_t row = -(start % q.out_width); row < segment; row += q.out_width) {
      for (int64_t w = max(row, 0); w < min(row + low, segment); w++) out[w] = P{};
      for (int64_t w = max(row + high, 0); w < min(row + q.out_width, segment); w++) out[w] = P{};
    }
  }
};

}  // namespace
}  // namespace trady::TRADY_ISA
