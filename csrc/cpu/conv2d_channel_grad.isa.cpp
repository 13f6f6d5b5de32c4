// conv2d_channel_grad: the hot loops.
//
// The selected channels of the input are few and are read once for each tile of output pixels: they are packed into
// planes that hold, for one kernel column, the input under every output pixel, padding included. Kernel rows then are
// offsets into a plane, strides and dilation are gone, and grad_output, the large operand, is read flat and as it is.
#include "conv2d_channel_grad.h"

#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

#define INLINED __attribute__((always_inline))

typedef int64_t i64 __attribute__((vector_size(VECTOR_BYTES)));
template <class T>
struct IndexOf {
  using type = i32;
};
template <>
struct IndexOf<double> {
  using type = i64;
};
template <class T>
using Index = typename IndexOf<T>::type;

// Sums of neighbouring lanes: first a's pairs, then b's.
template <class T>
TRADY_INLINE vector_of<T> add_pairs(vector_of<T> a, vector_of<T> b) {
  Index<T> even, odd;
  for (int i = 0; i < LANES<T>; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return shuffle(a, b, even) + shuffle(a, b, odd);
}
// Lane i of the result is the sum of v[i]'s lanes.
template <class T, int COUNT>
TRADY_INLINE vector_of<T> sum_each(const vector_of<T>* v) {
  if constexpr (COUNT == 1)
    return v[0];
  else
    return add_pairs<T>(sum_each<T, COUNT / 2>(v), sum_each<T, COUNT / 2>(v + COUNT / 2));
}
template <class T, int COUNT>
TRADY_INLINE void sum_lanes(const vector_of<T> (&acc)[COUNT], T* sums) {
#pragma GCC unroll 8
  for (int first = 0; first < COUNT; first += LANES<T>) {
    vector_of<T> group[LANES<T>];
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; i++) group[i] = first + i < COUNT ? acc[first + i] : vector_of<T>{};
    store(sums + first, sum_each<T, LANES<T>>(group));
  }
}

// Every second element, `count` of them, without touching what lies behind the last.
template <class S>
TRADY_INLINE vector_of<S> load_alternate(const S* in, int count) {
  const int reach = 2 * count - 1, first = reach < LANES<S> ? reach : LANES<S>;
  const vector_of<S> low = load_first(in, first), high = load_first(in + LANES<S>, reach - first);
  Index<scalar_of<S>> even;
  for (int i = 0; i < LANES<S>; i++) even[i] = 2 * i;
  return shuffle(low, high, even);
}
template <class T, class S>
TRADY_INLINE void copy(T* __restrict out, const S* __restrict in, int64_t step, int64_t count) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + LANES<T> <= count; i += LANES<T>) store(out + i, load(in + i));
    if (i < count) store_first(out + i, load_first(in + i, int(count - i)), int(count - i));
  } else if (step == 2 && LANES<T> > 8) {
    for (; i < count; i += LANES<T>) {
      const int some = count - i < LANES<T> ? int(count - i) : LANES<T>;
      store_first(out + i, load_alternate(in + 2 * i, some), some);
    }
  } else {
    for (; i < count; i++) out[i] = widen(in[i * step]);
  }
}
template <class T>
TRADY_INLINE void clear(T* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = 0;
}
// Writes whole vectors: up to kSlack elements behind the last are cleared too.
template <class T>
TRADY_INLINE void clear_freely(T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES<T>) store(out + i, vector_of<T>{});
}

TRADY_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
TRADY_INLINE int64_t clamp(int64_t a, int64_t low, int64_t high) { return max(low, min(a, high)); }
TRADY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// Equally long pieces of the packed input and of grad_output, one an image. Where several images of a small map leave
// a few pixels behind the last whole vector, those pixels of all images are gathered into one more piece.
template <class T>
struct Segments {
  int64_t count, pixels;
  int64_t input_step, grad_step;
  int64_t input_pitch = 1;  // from pixel to pixel
  int64_t gathered = 0;     // pixels
  const int64_t* gathered_rows = nullptr;
  const T* gathered_grad = nullptr;
};

// out[o * ROWS * COLS + tap] = sum over pixels of input[tap] * grad[o], lanes are pixels.
template <class T, int OUTPUTS, int ROWS, int COLS>
void block_pixels(const T* input, const int64_t* rows, const T* grad, int64_t grad_output_step, Segments<T> segments,
                  T* sums) {
  constexpr int TAPS = ROWS * COLS;
  constexpr int VL = LANES<T>;
  vector_of<T> acc[OUTPUTS * TAPS];
#pragma GCC unroll 64
  for (int a = 0; a < OUTPUTS * TAPS; a++) acc[a] = vector_of<T>{};
  const int64_t pieces = segments.count + (segments.gathered > 0);
  for (int64_t piece = 0; piece < pieces; piece++) {
    if (piece == segments.count) {
      input -= piece * segments.input_step;
      rows = segments.gathered_rows;
      grad = segments.gathered_grad;
      grad_output_step = kPlane;
      segments.pixels = segments.gathered;
    }
    const T* x[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) x[i] = input + rows[i];
    const T* g[OUTPUTS];
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; o++) g[o] = grad + o * grad_output_step;
    int64_t p = 0;
    // Each operand is pinned to a register: GCC would otherwise fold the load into every multiply-add that uses it.
    auto step = [&](auto load_grad, auto load_input) INLINED {
      if constexpr (OUTPUTS <= TAPS) {
        vector_of<T> d[OUTPUTS];
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) d[o] = keep(load_grad(g[o] + p));
#pragma GCC unroll 64
        for (int t = 0; t < TAPS; t++) {
          const vector_of<T> value = keep(load_input(x[t / COLS] + t % COLS * kPlane + p));

#pragma GCC unroll 16
          for (int o = 0; o < OUTPUTS; o++) acc[o * TAPS + t] += d[o] * value;
        }
      } else {
        vector_of<T> values[TAPS];
#pragma GCC unroll 64
        for (int t = 0; t < TAPS; t++) values[t] = keep(load_input(x[t / COLS] + t % COLS * kPlane + p));
#pragma GCC unroll 16
        for (int o = 0; o < OUTPUTS; o++) {
          const vector_of<T> d = keep(load_grad(g[o] + p));
#pragma GCC unroll 64
          for (int t = 0; t < TAPS; t++) acc[o * TAPS + t] += d * values[t];
        }
      }
    };
    auto whole = [](const T* from) INLINED { return load(from); };
    for (; p + VL <= segments.pixels; p += VL) step(whole, whole);
    if (p < segments.pixels) {
      const int left = int(segments.pixels - p);
      auto partial = [left](const T* from) INLINED { return load_first(from, left); };
      step(partial, partial);
    }
    input += segments.input_step;
    grad += segments.grad_step;
  }
  sum_lanes<T, OUTPUTS * TAPS>(acc, sums);
}

// out[tap][o] += sum over pixels of input[tap] * grad[o], lanes are outputs. `left` counts the lanes of the last
// vector that exist. Columns are planes, or adjacent where a channels_last input is read as it is.
template <class T, int VECTORS, int ROWS, int COLS, int64_t COLUMN_STEP>
void block_outputs(const T* input, const int64_t* rows, const T* grad, int64_t pixel_step, Segments<T> segments,
                   int left, T* const* out) {
  constexpr int TAPS = ROWS * COLS;
  constexpr int VL = LANES<T>;
  vector_of<T> acc[VECTORS * TAPS];
#pragma GCC unroll 64
  for (int a = 0; a < VECTORS * TAPS; a++) acc[a] = vector_of<T>{};
  auto run = [&](auto load_last) INLINED {
    for (int64_t segment = 0; segment < segments.count; segment++) {
      const T* x[ROWS];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) x[i] = input + rows[i] + segment * segments.input_step;
      const T* g = grad + segment * segments.grad_step;
      int64_t at = 0;
      for (int64_t p = 0; p < segments.pixels;
           p++, g += pixel_step, at += COLUMN_STEP == 1 ? segments.input_pitch : 1) {
        vector_of<T> d[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) d[v] = keep(v + 1 < VECTORS ? load(g + v * VL) : load_last(g + v * VL));
#pragma GCC unroll 64
        for (int t = 0; t < TAPS; t++) {
          T value = x[t / COLS][t % COLS * COLUMN_STEP + at];
          if constexpr (VECTORS > 1) {
            const vector_of<T> lanes = keep(vector_of<T>{} + value);

#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) acc[v * TAPS + t] += d[v] * lanes;
          } else {
            acc[t] += d[0] * value;
          }
        }
      }
    }
  };
  if (left == VL)
    run([](const T* from) INLINED { return load(from); });
  else
    run([left](const T* from) INLINED { return load_first(from, left); });
#pragma GCC unroll 64
  for (int t = 0; t < TAPS; t++) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) {
      T* to = out[t] + v * VL;
      if (v + 1 < VECTORS || left == VL)
        store(to, load(to) + acc[v * TAPS + t]);
      else
        store_first(to, load_first(to, left) + acc[v * TAPS + t], left);
    }
  }
}

// Register blocks by number of taps: as many outputs as leave registers for the operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxTaps = 8;
constexpr int kOutputsByTaps[] = {0, 8, 8, 8, 6, 4, 4, 3, 3};
constexpr int kVectorsByTaps[] = {0, 4, 4, 4, 4, 4, 4, 3, 3};
constexpr bool kFuseRows = true;  // 3 outputs x 9 taps
#else
constexpr int kMaxTaps = 6;
constexpr int kOutputsByTaps[] = {0, 8, 4, 4, 3, 2, 2};
constexpr int kVectorsByTaps[] = {0, 4, 4, 3, 2, 2, 2};
constexpr bool kFuseRows = false;
#endif
constexpr int kFusedOutputs = 3;
// Of one packing.
constexpr int64_t kMaxRows = 16, kMaxColumns = 16;
// Longest padded row that is read as a line.
constexpr int64_t kLine = 512;

template <class T>
using PixelBlock = void (*)(const T*, const int64_t*, const T*, int64_t, Segments<T>, T*);
template <class T>
using OutputBlock = void (*)(const T*, const int64_t*, const T*, int64_t, Segments<T>, int, T* const*);

template <class T, int COLS = 1>
PixelBlock<T> pixel_block(int taps, bool one) {
  if constexpr (COLS <= kMaxTaps) {
    if (taps == COLS) return one ? block_pixels<T, 1, 1, COLS> : block_pixels<T, kOutputsByTaps[COLS], 1, COLS>;
    return pixel_block<T, COLS + 1>(taps, one);
  }
  return nullptr;
}
template <class T, int64_t COLUMN_STEP, int COLS, int VECTORS>
OutputBlock<T> output_block_of(int vectors) {
  if constexpr (VECTORS > 1)
    if (vectors < VECTORS) return output_block_of<T, COLUMN_STEP, COLS, VECTORS - 1>(vectors);
  return block_outputs<T, VECTORS, 1, COLS, COLUMN_STEP>;
}
template <class T, int64_t COLUMN_STEP, int COLS = 1>
OutputBlock<T> output_block(int taps, int vectors) {
  if constexpr (COLS <= kMaxTaps) {
    if (taps == COLS) return output_block_of<T, COLUMN_STEP, COLS, kVectorsByTaps[COLS]>(vectors);
    return output_block<T, COLUMN_STEP, COLS + 1>(taps, vectors);
  }
  return nullptr;
}

// Kernel rows [row, row_end) and columns [col, col_end): the taps that one packing serves.
struct Taps {
  int64_t row, row_end, col, col_end;
};

template <class T, class S>
struct Task {
  const Conv2dChannelGrad& problem;
  T* partial;  // this slice's
  T* planes;
  T* packed_grad;
  T* gathered_grad;
  // This task.
  ChannelRun run = {};
  int64_t first_output = 0, last_output = 0;  // of the group
  // This tile.
  int64_t image = 0, images = 0, pixel = 0, pixels = 0;
  // This packing: a plane for each (row residue, channel, kernel column).
  Taps taps = {};
  int64_t residues = 0, channel = 0, channels = 0;
  int64_t first_row = 0;  // virtual, see pack_plane()
  int64_t segment = 0;    // elements of a plane for one image
  const T* unpacked = nullptr;
  int64_t row_planes[kMaxRows] = {};  // where a kernel row's planes begin
  int64_t gathered_rows[kMaxRows] = {};
  int64_t tap_places[kMaxPlanes] = {};  // where (channel, column) goes in a kernel row of the result

  // Kernel row i reads input row h * stride + i * dilation - padding, that is `h + shift(i)` of the rows with its
  // residue.
  int64_t shift(int64_t i) const { return i * problem.dilation[0] / problem.stride[0]; }
  int64_t residue(int64_t i) const { return i * problem.dilation[0] % problem.stride[0]; }
  int64_t columns() const { return taps.col_end - taps.col; }
  int64_t plane(int64_t i, int64_t c, int64_t column) const {
    int64_t slot = taps.row_end - taps.row == 1 ? 0 : residue(i);
    return ((slot * channels + c) * columns() + column) * kPlane + (shift(i) - first_row) * problem.out_width;
  }

  // One plane of one image: for output pixels from `pixel` on, a row of out_width for each virtual row.
  void pack_plane(T* out, const S* in, int64_t residue, int64_t j) const {
    const auto& q = problem;
    int64_t step = q.stride[1], offset = j * q.dilation[1] - q.padding[1];
    int64_t low = clamp(ceil_div(-offset, step), 0, q.out_width);
    int64_t high = clamp(ceil_div(q.width - offset, step), low, q.out_width);
    int64_t in_step = step * q.input_stride[3];
    int64_t flat = pixel + first_row * q.out_width, end = flat + segment;
    if (q.kernel[0] * q.kernel[1] == 1 && q.stride[0] * step == 1 && q.padding[0] + q.padding[1] == 0 &&
        q.input_stride[2] == q.width * q.input_stride[3])
      return copy(out, in + flat * q.input_stride[3], q.input_stride[3], segment);
    int64_t row = flat / q.out_width, column = flat % q.out_width;
    while (flat < end) {
      int64_t stop = min(q.out_width, column + end - flat);
      int64_t from = row * q.stride[0] + residue - q.padding[0];
      if (from < 0 || from >= q.height) {
        clear_freely(out, stop - column);
      } else {
        int64_t a = clamp(low, column, stop), b = clamp(high, a, stop);
        clear_freely(out, a - column);
        copy(out + (a - column), in + from * q.input_stride[2] + (a * step + offset) * q.input_stride[3], in_step,
             b - a);
        clear_freely(out + (b - column), stop - b);
      }
      out += stop - column;
      flat += stop - column;
      column = 0;
      row++;
    }
  }

  // The usual strides: a row is read once into a padded line, and every kernel column is a piece of that line.
  bool packs_lines() const {
    const auto& q = problem;
    return columns() > 1 && q.stride[1] <= 2 && q.dilation[1] == 1 && q.width + q.kernel[1] + 2 * q.padding[1] <= kLine;
  }
  // All columns of one channel of one image.
  void pack_lines(T* out, const S* in, int64_t residue) const {
    const auto& q = problem;
    const int64_t step = q.stride[1];
    // Phase f holds the padded elements f, f + step, f + 2 * step ...
    alignas(64) T line[2][kLine + kSlack];
    int64_t first[2], count[2];
    for (int64_t f = 0; f < step; f++) {
      clear_freely(line[f], kLine);
      first[f] = max(0, ceil_div(q.padding[1] - f, step));
      count[f] = max(0, ceil_div(q.width + q.padding[1] - f, step) - first[f]);
    }
    const int64_t flat = pixel + first_row * q.out_width, end = flat + segment;
    int64_t row = flat / q.out_width, column = flat % q.out_width;
    for (int64_t done = 0; done < segment; row++, column = 0) {
      const int64_t stop = min(q.out_width, column + end - flat - done);
      const int64_t from = row * q.stride[0] + residue - q.padding[0];
      if (from < 0 || from >= q.height) {
        for (int64_t j = 0; j < columns(); j++) clear_freely(out + j * kPlane + done, stop - column);
      } else {
        for (int64_t f = 0; f < step; f++)
          copy(line[f] + first[f],
               in + from * q.input_stride[2] + (first[f] * step + f - q.padding[1]) * q.input_stride[3],
               step * q.input_stride[3], count[f]);
        for (int64_t j = 0; j < columns(); j++) {
          const int64_t tap = taps.col + j;
          const T* piece = step == 1 ? line[0] + tap : line[tap & 1] + (tap >> 1);
          T* to = out + j * kPlane + done;
          for (int64_t w = column; w < stop; w += LANES<T>, to += LANES<T>) store(to, load(piece + w));
        }
      }
      done += stop - column;
    }
  }

  void pack_input() const {
    const bool lines = packs_lines();
    const auto& q = problem;
    bool used[kMaxPlanes];
    for (int64_t r = 0; r < residues; r++) used[r] = false;
    for (int64_t i = taps.row; i < taps.row_end; i++) {
      int64_t slot = taps.row_end - taps.row == 1 ? 0 : residue(i);
      if (used[slot]) continue;
      used[slot] = true;
      for (int64_t n = 0; n < images; n++)
        for (int64_t c = 0; c < channels; c++) {
          const S* in =
              static_cast<const S*>(q.input) + (image + n) * q.input_stride[0] + (channel + c) * q.input_stride[1];
          if (lines) {
            pack_lines(planes + (slot * channels + c) * columns() * kPlane + n * segment, in, residue(i));
            continue;
          }
          for (int64_t j = 0; j < columns(); j++)
            pack_plane(planes + ((slot * channels + c) * columns() + j) * kPlane + n * segment, in, residue(i),
                       taps.col + j);
        }
    }
  }

  const S* grad_at(int64_t n, int64_t output, int64_t p) const {
    const auto& q = problem;
    return static_cast<const S*>(q.grad_output) + (image + n) * q.grad_stride[0] +
           (run.group * q.out_per_group + output) * q.grad_stride[1] + p / q.out_width * q.grad_stride[2] +
           p % q.out_width * q.grad_stride[3];
  }
  // A channels_last 1x1 layer needs no planes: its pixels and channels are where the kernel wants them.
  const T* input_in_place() const {
    const auto& q = problem;
    const bool fits = sizeof(S) == sizeof(T) && q.outputs_last && q.kernel[0] * q.kernel[1] == 1 &&
                      q.stride[0] * q.stride[1] == 1 && q.padding[0] + q.padding[1] == 0 && q.input_stride[1] == 1 &&
                      q.input_stride[2] == q.width * q.input_stride[3];
    return fits ? static_cast<const T*>(q.input) + image * q.input_stride[0] + channel + pixel * q.input_stride[3]
                : nullptr;
  }
  // Pixels follow each other at one distance, and need no widening.
  bool readable() const {
    return sizeof(S) == sizeof(T) && (problem.outputs_last || problem.grad_stride[3] == 1) &&
           problem.grad_stride[2] == problem.out_width * problem.grad_stride[3];
  }
  // Pixels [pixel, pixel + pixels) of `outputs` outputs: (outputs, images, pixels), or (images, pixels, outputs).
  void pack_grad(int64_t output, int64_t outputs) const {
    const auto& q = problem;
    for (int64_t n = 0; n < images; n++) {
      for (int64_t p = pixel; p < pixel + pixels;) {
        int64_t stop = min(pixel + pixels, (p / q.out_width + 1) * q.out_width);
        const S* in = grad_at(n, output, p);
        int64_t done = n * pixels + p - pixel;
        if (q.outputs_last)
          for (int64_t i = 0; i < stop - p; i++)
            copy(packed_grad + (done + i) * outputs, in + i * q.grad_stride[3], 1, outputs);
        else
          for (int64_t o = 0; o < outputs; o++)
            copy(packed_grad + o * kPlane + done, in + o * q.grad_stride[1], q.grad_stride[3], stop - p);
        p = stop;
      }
    }
  }

  // The pixels behind the last whole vector of each image: of the input for each tap, behind the images of its plane.
  void gather_input() {
    const int64_t whole = pixels / LANES<T> * LANES<T>, left = pixels - whole;
    const int64_t room = (images * left + LANES<T> - 1) / LANES<T> * LANES<T>;
    for (int64_t i = 0; i < taps.row_end - taps.row; i++) {
      gathered_rows[i] = row_planes[i];
      gathered_rows[i] += images * segment + i * room - (row_planes[i] % kPlane);
      for (int64_t t = 0; t < channels * columns(); t++) {
        T* to = planes + gathered_rows[i] + t * kPlane;
        for (int64_t n = 0; n < images; n++)
          for (int64_t p = 0; p < left; p++)
            to[n * left + p] = planes[row_planes[i] + t * kPlane + n * segment + whole + p];
      }
    }
  }
  void gather_grad(const T* grad, int64_t output_step, int64_t image_step, int64_t outputs) const {
    const int64_t whole = pixels / LANES<T> * LANES<T>, left = pixels - whole;
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t n = 0; n < images; n++)
        for (int64_t p = 0; p < left; p++)
          gathered_grad[o * kPlane + n * left + p] = grad[o * output_step + n * image_step + whole + p];
  }
  // Whether gathering saves more vector steps than it costs, and the planes have room.
  bool gathers() const {
    const int64_t left = pixels % LANES<T>, all = images * left;
    const int64_t room = (all + LANES<T> - 1) / LANES<T>, rows = taps.row_end - taps.row;
    return !problem.outputs_last && left > 0 && (images - room) * rows * channels * columns() > 2 * all &&
           images * segment + rows * room * LANES<T> + kSlack <= kPlane;
  }

  // Planes of a kernel row are adjacent over (channel, column): a block of taps may span channels.
  void add_pixels(const T* grad, int64_t output_step, Segments<T> segments, int64_t output, int64_t outputs, bool fused,
                  int64_t block, int64_t i, int64_t first) const {
    const auto& q = problem;
    alignas(64) T sums[64];
    const int64_t* rows = row_planes + (i - taps.row);
    const T* in = planes + first * kPlane;
    if (fused)
      (outputs == 1 ? block_pixels<T, 1, 3, 3> : block_pixels<T, kFusedOutputs, 3, 3>)(in, rows, grad, output_step,
                                                                                       segments, sums);
    else
      pixel_block<T>(int(block), outputs == 1)(in, rows, grad, output_step, segments, sums);
    const int64_t row_count = fused ? 3 : 1, all_taps = q.kernel[0] * q.kernel[1];
    const T* sum = sums;
    T* to = partial + output * all_taps + i * q.kernel[1];
    for (int64_t o = 0; o < outputs; o++, to += all_taps)
      for (int64_t r = 0; r < row_count; r++)
        for (int64_t t = first; t < first + block; t++) to[r * q.kernel[1] + tap_places[t]] += *sum++;
  }
  void add_outputs(const T* grad, int64_t pixel_step, Segments<T> segments, int64_t output, int64_t outputs, bool fused,
                   int64_t block, int64_t i, int64_t first) const {
    const auto& q = problem;
    constexpr int VL = LANES<T>;
    T* out[9];
    const int64_t row_count = fused ? 3 : 1;
    int64_t count = 0;
    for (int64_t r = 0; r < row_count; r++)
      for (int64_t t = first; t < first + block; t++)
        out[count++] = partial + (tap_places[t] + (i + r) * q.kernel[1]) * q.out_per_group + output;
    const int vectors = int(outputs + VL - 1) / VL, left = int(outputs) - (vectors - 1) * VL;
    OutputBlock<T> call;
    if (fused)
      call = vectors == 1   ? block_outputs<T, 1, 3, 3, kPlane>
             : vectors == 2 ? block_outputs<T, 2, 3, 3, kPlane>
                            : block_outputs<T, 3, 3, 3, kPlane>;
    else
      call = unpacked ? output_block<T, 1>(int(block), vectors) : output_block<T, kPlane>(int(block), vectors);
    const T* in = unpacked ? unpacked + first : planes + first * kPlane;
    call(in, row_planes + (i - taps.row), grad, pixel_step, segments, left, out);
  }

  void add_packing() {
    const auto& q = problem;
    unpacked = input_in_place();
    if (!unpacked) pack_input();
    for (int64_t i = taps.row; i < taps.row_end; i++) row_planes[i - taps.row] = unpacked ? 0 : plane(i, 0, 0);
    for (int64_t c = 0, t = 0; c < channels; c++)
      for (int64_t j = taps.col; j < taps.col_end; j++, t++)
        tap_places[t] = (channel + c) * q.kernel[0] * q.kernel[1] * (q.outputs_last ? 1 : q.out_per_group) + j;
    bool fused = kFuseRows && taps.row_end - taps.row == 3 && columns() == 3;
    int64_t row_taps = fused ? 3 : channels * columns();
    int64_t blocks = ceil_div(row_taps, kMaxTaps), longest = ceil_div(row_taps, blocks);
    int64_t lanes = LANES<T>;
    int64_t wanted = q.outputs_last ? (fused ? 3 : kVectorsByTaps[longest]) * lanes
                                    : (fused ? kFusedOutputs : kOutputsByTaps[longest]);
    const bool direct = readable(), gathered = gathers();
    if (gathered) gather_input();
    int64_t outputs;
    for (int64_t output = first_output; output < last_output; output += outputs) {
      outputs = min(wanted, last_output - output);
      if (!q.outputs_last && outputs < wanted) outputs = 1;
      // Four vectors as two and two, not three and one.
      if (q.outputs_last && last_output - output > wanted && last_output - output < 2 * wanted - lanes)
        outputs = ceil_div(ceil_div(last_output - output, 2), lanes) * lanes;
      const T* grad;
      int64_t grad_step;
      Segments<T> segments{images, pixels, segment, 0};
      if (unpacked) {
        segments.input_step = q.input_stride[0];
        segments.input_pitch = q.input_stride[3];
      }
      if (direct) {
        grad = reinterpret_cast<const T*>(grad_at(0, output, pixel));
        grad_step = q.outputs_last ? q.grad_stride[3] : q.grad_stride[1];
        segments.grad_step = q.grad_stride[0];
      } else {
        pack_grad(output, outputs);
        grad = packed_grad;
        grad_step = q.outputs_last ? outputs : kPlane;
        segments.grad_step = pixels * (q.outputs_last ? outputs : 1);
      }
      if (gathered) {
        gather_grad(grad, grad_step, segments.grad_step, outputs);
        segments.pixels = pixels / lanes * lanes;
        segments.gathered = images * (pixels - segments.pixels);
        segments.gathered_grad = gathered_grad;
      }
      for (int64_t i = taps.row; i < taps.row_end; i += fused ? 3 : 1) {
        segments.gathered_rows = gathered_rows + (i - taps.row);
        int64_t all = channels * columns();
        for (int64_t first = 0; first < all;) {
          int64_t block = fused ? 3 : ceil_div(all - first, ceil_div(all - first, longest));
          if (q.outputs_last)
            add_outputs(grad, grad_step, segments, output, outputs, fused, block, i, first);
          else
            add_pixels(grad, grad_step, segments, output, outputs, fused, block, i, first);
          first += block;
        }
      }
    }
  }

  void add_tile(int64_t tile) {
    const auto& q = problem;
    int64_t out_pixels = q.out_height * q.out_width;
    int64_t tiles_per_image = ceil_div(out_pixels, q.tile_pixels);
    image = tile / tiles_per_image * q.tile_images;
    images = min(q.tile_images, q.batch - image);
    pixel = tile % tiles_per_image * q.tile_pixels;
    pixels = min(q.tile_pixels, out_pixels - pixel);

    int64_t reach = shift(q.kernel[0] - 1) * q.out_width;
    int64_t used_residues = min(q.stride[0], q.kernel[0]) == 1 ? 1 : q.stride[0];
    int64_t first_columns = min(q.kernel[1], kMaxColumns);
    bool share_rows = images * (pixels + reach) + kSlack <= kPlane && used_residues * first_columns <= kMaxPlanes &&
                      q.kernel[0] <= kMaxRows;
    for (taps.row = 0; taps.row < q.kernel[0]; taps.row = taps.row_end) {
      taps.row_end = share_rows ? q.kernel[0] : taps.row + 1;
      residues = share_rows ? used_residues : 1;
      first_row = shift(taps.row);
      segment = pixels + (shift(taps.row_end - 1) - first_row) * q.out_width;
      for (taps.col = 0; taps.col < q.kernel[1]; taps.col = taps.col_end) {
        taps.col_end = min(q.kernel[1], taps.col + kMaxColumns);
        int64_t most = max(1, kMaxPlanes / (residues * columns()));
        for (channel = run.begin; channel < run.end; channel += channels) {
          channels = min(most, run.end - channel);
          add_packing();
        }
      }
    }
  }

  void operator()(int64_t task, T* all_partial) {
    const auto& q = problem;
    int64_t range = task % q.ranges, slice = task / q.ranges % q.slices;
    run = q.runs[task / q.ranges / q.slices];
    first_output = range * q.range_outputs;
    last_output = min(q.out_per_group, first_output + q.range_outputs);
    int64_t taps_all = q.kernel[0] * q.kernel[1];
    partial = all_partial + slice * q.selected * q.out_per_group * taps_all;
    int64_t inner = q.outputs_last ? 1 : taps_all, outer = q.outputs_last ? taps_all : 1;
    for (int64_t row = run.begin * outer; row < run.end * outer; row++)
      clear(partial + (row * q.out_per_group + first_output) * inner, (last_output - first_output) * inner);
    for (int64_t tile = q.tiles * slice / q.slices; tile < q.tiles * (slice + 1) / q.slices; tile++) add_tile(tile);
  }
};

template <class T, class S>
void run_task(const Conv2dChannelGrad& problem, int64_t task, void* partial, void* scratch) {
  T* planes = static_cast<T*>(scratch);
  Task<T, S> work{problem, nullptr, planes, planes + kMaxPlanes * kPlane,
                  planes + (kMaxPlanes + kOutputBlock) * kPlane};
  work(task, static_cast<T*>(partial));
}

}  // namespace

void conv2d_channel_grad(const Conv2dChannelGrad& problem, int64_t task, void* partial, void* scratch) {
  switch (problem.dtype) {
    case Dtype::float32:
      return run_task<float, float>(problem, task, partial, scratch);
    case Dtype::float64:
      return run_task<double, double>(problem, task, partial, scratch);
    case Dtype::bfloat16:
      return run_task<float, bfloat16>(problem, task, partial, scratch);
    case Dtype::float16:
      return run_task<float, float16>(problem, task, partial, scratch);
  }
}

}  // namespace trady::TRADY_ISA
