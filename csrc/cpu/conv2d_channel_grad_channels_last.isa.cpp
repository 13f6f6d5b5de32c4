// conv2d_channel_grad where lanes are outputs: the channels of grad_output are adjacent, or so many taps read it that
// turning it over pays.
//
// A register block holds the sums of a few vectors of outputs and all taps of a channel (or several channels of a 1x1
// kernel). For each pixel the vectors are read once and multiplied by the taps' input elements, broadcast. The input of
// a tile is packed into padded planes, a channel each, so that a tap is an offset; there is nothing to reduce at the
// end.
#include "conv2d_channel_grad.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

#define INLINED __attribute__((always_inline))

TRADY_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
TRADY_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Stretches of pixels: `rows` of them for each of `images`. Distances in elements.
struct Pixels {
  int64_t images, rows, columns;
  int64_t input_image, input_row, input_column;
  int64_t grad_image, grad_row, grad_column;
};

// out[tap][o] += sum over pixels of input[tap] * grad[o] for VECTORS vectors of outputs, the last of them `left` long.
// Taps are COLUMNS adjacent elements for each of ROWS kernel rows, `row_step` apart.
template <class S, int VECTORS, int ROWS, int COLUMNS>
void block(const scalar_of<S>* input, int64_t row_step, const S* grad, const Pixels& pixels, int left,
           scalar_of<S>* const* out) {
  using V = vector_of<S>;
  constexpr int TAPS = ROWS * COLUMNS;
  constexpr int VL = LANES<S>;
  // Chains of multiply-adds that do not wait for each other.
  constexpr int CHAINS = VECTORS * TAPS >= 8 ? 1 : VECTORS * TAPS >= 4 ? 2 : 4;
  // Pixels from one request to the use: about 200 cycles.
  constexpr int64_t AHEAD = 200 / (VECTORS * TAPS) + 1;
  V acc[CHAINS][VECTORS * TAPS];
#pragma GCC unroll 4
  for (int chain = 0; chain < CHAINS; chain++)
#pragma GCC unroll 64
    for (int a = 0; a < VECTORS * TAPS; a++) acc[chain][a] = V{};
  auto run = [&](auto load_last) INLINED {
    for (int64_t n = 0; n < pixels.images; n++)
      for (int64_t r = 0; r < pixels.rows; r++) {
        const scalar_of<S>* x[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) x[i] = input + n * pixels.input_image + r * pixels.input_row + i * row_step;
        const S* g = grad + n * pixels.grad_image + r * pixels.grad_row;
        const int64_t grad_step = pixels.grad_column, input_step = pixels.input_column, ahead = AHEAD * grad_step;
        auto step = [&](V* sums) INLINED {
          auto load_grad = [&](int v) INLINED {
            prefetch(g + v * VL + ahead);
            return keep(v + 1 < VECTORS ? load(g + v * VL) : load_last(g + v * VL));
          };
          auto load_input = [&](int t) INLINED { return keep(broadcast(x[t / COLUMNS] + t % COLUMNS)); };
          if constexpr (VECTORS <= TAPS) {
            V d[VECTORS];
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) d[v] = load_grad(v);
#pragma GCC unroll 64
            for (int t = 0; t < TAPS; t++) {
              const V value = load_input(t);
#pragma GCC unroll 16
              for (int v = 0; v < VECTORS; v++) sums[v * TAPS + t] += d[v] * value;
            }
          } else {
            V values[TAPS];
#pragma GCC unroll 64
            for (int t = 0; t < TAPS; t++) values[t] = load_input(t);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) {
              const V d = load_grad(v);
#pragma GCC unroll 64
              for (int t = 0; t < TAPS; t++) sums[v * TAPS + t] += d * values[t];
            }
          }
          g += grad_step;
#pragma GCC unroll 8
          for (int i = 0; i < ROWS; i++) x[i] += input_step;
        };
        int64_t w = 0;
        for (; w + CHAINS <= pixels.columns; w += CHAINS) {
#pragma GCC unroll 4
          for (int chain = 0; chain < CHAINS; chain++) step(acc[chain]);
        }
        if constexpr (CHAINS > 1)
          for (; w < pixels.columns; w++) step(acc[0]);
      }
  };
  if (!MASKED_LOADS && left == VL)
    run([](const S* from) INLINED { return load(from); });
  else
    run([left](const S* from) INLINED { return load_first(from, left); });
#pragma GCC unroll 64
  for (int t = 0; t < TAPS; t++) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; v++) {
      V sum = acc[0][v * TAPS + t];
#pragma GCC unroll 4
      for (int chain = 1; chain < CHAINS; chain++) sum += acc[chain][v * TAPS + t];
      scalar_of<S>* to = out[t] + v * VL;
      if (v + 1 < VECTORS || left == VL)
        store(to, load(to) + sum);
      else
        store_first(to, load_first(to, left) + sum, left);
    }
  }
}

// out[o] += sum over pixels of grad[o], for one vector of outputs.
template <class S>
void sum_pixels(const S* grad, const Pixels& pixels, int lanes, scalar_of<S>* out) {
  // Chains of additions that do not wait for each other.
  constexpr int CHAINS = 4;
  vector_of<S> acc[CHAINS] = {};
  for (int64_t n = 0; n < pixels.images; n++)
    for (int64_t r = 0; r < pixels.rows; r++) {
      const S* g = grad + n * pixels.grad_image + r * pixels.grad_row;
      int64_t w = 0;
      for (; w + CHAINS <= pixels.columns; w += CHAINS)
        for (int chain = 0; chain < CHAINS; chain++)
          acc[chain] += load_first(g + (w + chain) * pixels.grad_column, lanes);
      for (; w < pixels.columns; w++) acc[0] += load_first(g + w * pixels.grad_column, lanes);
    }
  store_first(out, load_first(out, lanes) + ((acc[0] + acc[1]) + (acc[2] + acc[3])), lanes);
}

template <class S>
using Block = void (*)(const scalar_of<S>*, int64_t, const S*, const Pixels&, int, scalar_of<S>* const*);

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
template <class S, int ROWS, int COLUMNS, int VECTORS = 1>
Block<S> block_of(int64_t vectors) {
  constexpr int most = kVectorsByTaps[ROWS * COLUMNS];
  if constexpr (VECTORS < most)
    if (vectors > VECTORS) return block_of < S, ROWS, COLUMNS, most<8 ? VECTORS + 1 : 2 * VECTORS>(vectors);
  return block<S, VECTORS, ROWS, COLUMNS>;
}
template <class S, int TAPS = 1>
Block<S> block_of_row(int64_t taps, int64_t vectors) {
  if constexpr (TAPS < kMaxTaps)
    if (taps > TAPS) return block_of_row<S, TAPS + 1>(taps, vectors);
  return block_of<S, 1, TAPS>(vectors);
}
template <class S>
Block<S> block_of_3x3([[maybe_unused]] int64_t vectors) {
  if constexpr (kFuses3x3) return block_of<S, 3, 3>(vectors);
  return nullptr;
}

template <class S>
struct Task {
  using A = scalar_of<S>;
  const Conv2dChannelGrad& q;
  A* packed;
  A* turned;             // pixels of grad_output, each a piece of outputs
  A* partial = nullptr;  // this slice's, (k, kh, kw, C'/groups)
  A* bias = nullptr;     // likewise, while a tile's first packing is added
  // This task.
  ChannelRun run = {};
  int64_t first_output = 0, last_output = 0;  // of the group
  // This tile: output rows and columns of some images.
  int64_t image = 0, images = 0, row = 0, rows = 0, column = 0, columns = 0;
  // This packing: the channels, and the kernel's rows and columns, that the planes serve.
  int64_t channel = 0, channels = 0, tap_row = 0, tap_rows = 0, tap_column = 0, tap_columns = 0;
  int64_t plane_rows = 0, plane_columns = 0;

  bool is_point() const { return q.kernel[0] * q.kernel[1] == 1; }
  // A point whose output pixels are those of the input.
  bool is_plain_point() const {
    return is_point() && q.stride[0] * q.stride[1] == 1 && q.padding[0] + q.padding[1] == 0;
  }
  // Elements of a point's input follow each other pixel by pixel, those of all channels together; of many channels a
  // block's would be far apart.
  bool input_in_place() const {
    return is_same<A, S> && is_plain_point() && q.input_stride[1] == 1 && run.end - run.begin <= kPointChannels;
  }

  // Input elements [left, left + plane_columns) of a row, zero outside of it.
  void pack_row(A* out, const S* in, int64_t left, int64_t step) const {
    int64_t w = 0;
    for (; w < plane_columns && left + w < 0; w++) out[w] = 0;
    const int64_t end = min(plane_columns, q.width - left);
    for (; w < end; w++) out[w] = widen(in[(left + w) * step]);
    for (; w < plane_columns; w++) out[w] = 0;
  }
  // From pixel to pixel of a point's packed channels.
  int64_t pixel_step() const { return ceil_div(channels, LANES<S>) * LANES<S>; }
  const S* input_at(int64_t n, int64_t from) const {
    return static_cast<const S*>(q.input) + (image + n) * q.input_stride[0] + channel * q.input_stride[1] +
           from * q.input_stride[2];
  }
  // (channels, images, rows, columns)
  void pack_input() const {
    const int64_t top = row * q.stride[0] + tap_row * q.dilation[0] - q.padding[0];
    const int64_t left = column * q.stride[1] + tap_column * q.dilation[1] - q.padding[1];
    for (int64_t n = 0; n < images; n++)
      for (int64_t r = 0; r < plane_rows; r++) {
        const int64_t from = top + r;
        A* out = packed + (n * plane_rows + r) * plane_columns;
        for (int64_t c = 0; c < channels; c++, out += images * plane_rows * plane_columns) {
          if (from >= 0 && from < q.height)
            pack_row(out, input_at(n, from) + c * q.input_stride[1], left, q.input_stride[3]);
          else
            for (int64_t w = 0; w < plane_columns; w++) out[w] = 0;
        }
      }
  }
  // (images, rows, columns, channels), of the output's pixels alone.
  void pack_point() const {
    const int64_t left = column * q.stride[1] - q.padding[1], pixels = rows * columns;
    if (is_plain_point() && q.input_stride[3] == 1 && q.input_stride[2] == columns) {
      // In order: what is written too far is overwritten. Behind the last channels of a pixel are the next one's.
      for (int64_t n = 0; n < images; n++)
        for (int64_t c = 0; c < channels; c += LANES<S>)
          turn_over(input_at(n, row) + c * q.input_stride[1], q.input_stride[1], min(LANES<S>, channels - c), pixels,
                    packed + n * pixels * pixel_step() + c, pixel_step());
      return;
    }
    for (int64_t n = 0; n < images; n++)
      for (int64_t r = 0; r < rows; r++) {
        const int64_t from = (row + r) * q.stride[0] - q.padding[0];
        const S* in = input_at(n, from);
        A* out = packed + (n * rows + r) * columns * pixel_step();
        for (int64_t w = 0; w < columns; w++, out += pixel_step()) {
          const int64_t at = left + w * q.stride[1];
          if (from >= 0 && from < q.height && at >= 0 && at < q.width)
            copy_channels(out, in + at * q.input_stride[3]);
          else
            for (int64_t c = 0; c < channels; c++) out[c] = 0;
        }
      }
  }
  void copy_channels(A* out, const S* in) const {
    if (q.input_stride[1] != 1) {
      for (int64_t c = 0; c < channels; c++) out[c] = widen(in[c * q.input_stride[1]]);
      return;
    }
    for (int64_t c = 0; c < channels; c += LANES<S>)
      store(out + c, load_first(in + c, static_cast<int>(min(LANES<S>, channels - c))));
  }

  void add_packing() {
    const A* input = packed;
    Pixels pixels{images,
                  rows,
                  columns,
                  plane_rows * plane_columns,
                  q.stride[0] * plane_columns,
                  q.stride[1],
                  q.grad_stride[0],
                  q.grad_stride[2],
                  q.grad_stride[3]};
    if (input_in_place()) {
      input = reinterpret_cast<const A*>(static_cast<const S*>(q.input) + image * q.input_stride[0] + channel +
                                         row * q.input_stride[2] + column * q.input_stride[3]);
      pixels.input_image = q.input_stride[0];
      pixels.input_row = q.input_stride[2];
      pixels.input_column = q.input_stride[3];
    } else if (is_point()) {
      pack_point();
      pixels.input_column = pixel_step();
      pixels.input_row = columns * pixel_step();
      pixels.input_image = rows * columns * pixel_step();
    } else {
      pack_input();
    }
    const bool turns_over = q.grad_stride[1] != 1;
    if (turns_over) {  // in pixels, until it is known how many outputs each has
      pixels.grad_image = rows * columns;
      pixels.grad_row = columns;
      pixels.grad_column = 1;
    }
    // Rows that lie behind one another are one.
    if (pixels.input_row == columns * pixels.input_column && pixels.grad_row == columns * pixels.grad_column) {
      pixels.columns *= pixels.rows;
      pixels.rows = 1;
      if (pixels.input_image == pixels.columns * pixels.input_column &&
          pixels.grad_image == pixels.columns * pixels.grad_column) {
        pixels.columns *= pixels.images;
        pixels.images = 1;
      }
    }

    const int64_t lanes = LANES<S>, most = most_vectors();
    int64_t vectors;
    for (int64_t output = first_output; output < last_output; output += vectors * lanes) {
      const int64_t outputs = last_output - output;
      vectors = piece_of(ceil_div(outputs, lanes), most);
      const S* grad = static_cast<const S*>(q.grad_output) + image * q.grad_stride[0] + row * q.grad_stride[2] +
                      column * q.grad_stride[3] + (run.group * q.out_per_group + output) * q.grad_stride[1];
      const int left = static_cast<int>(min(lanes, outputs - (vectors - 1) * lanes));
      if (!turns_over) {
        add_piece(input, grad, pixels, output, vectors, left);
        continue;
      }
      const int64_t step = vectors * lanes;
      for (int64_t n = 0; n < images; n++)
        for (int64_t v = 0; v < vectors; v++)
          turn_over(grad + n * q.grad_stride[0] + v * lanes * q.grad_stride[1], q.grad_stride[1],
                    v + 1 < vectors ? lanes : left, rows * columns, turned + n * rows * columns * step + v * lanes,
                    step);
      Pixels turned_pixels = pixels;
      turned_pixels.grad_image *= step;
      turned_pixels.grad_row *= step;
      turned_pixels.grad_column *= step;
      add_piece(input, turned, turned_pixels, output, vectors, left);
    }
  }

  // A block's taps are neighbours: channels of a point, columns of a kernel row; or one tap where there is dilation.
  bool fuses() const { return kFuses3x3 && tap_rows == 3 && tap_columns == 3 && q.dilation[1] == 1; }
  int64_t together() const { return is_point() ? channels : q.dilation[1] == 1 ? tap_columns : 1; }
  int64_t blocks() const { return fuses() ? 1 : ceil_div(together(), kMaxTaps); }
  int64_t most_vectors() const { return kVectorsByTaps[fuses() ? 9 : ceil_div(together(), blocks())]; }

  // All taps of the packing for `vectors` vectors of outputs; E is the type of grad, as the tensor has it or turned
  // over.
  template <class E>
  void add_piece(const A* input, const E* grad, const Pixels& pixels, int64_t output, int64_t vectors, int left) const {
    const bool point = is_point(), fused = fuses();
    if (bias)
      for (int64_t v = 0; v < vectors; v++)
        sum_pixels(grad + v * LANES<S>, pixels, v + 1 < vectors ? LANES<S> : left, bias + output + v * LANES<S>);
    for (int64_t c = 0; c < (point ? 1 : channels); c++)
      for (int64_t i = 0; i < tap_rows; i += fused ? 3 : 1)
        for (int64_t j = 0; j < (fused || point ? 1 : tap_columns); j += together())
          for (int64_t b = 0; b < blocks(); b++) {
            const int64_t begin = together() * b / blocks(), taps = together() * (b + 1) / blocks() - begin;
            const A* from = input + begin;
            if (!point) from += (c * images * plane_rows + i * q.dilation[0]) * plane_columns + j * q.dilation[1];
            A* out[9];
            for (int64_t t = 0; t < (fused ? 9 : taps); t++) {
              const int64_t tap_channel = channel + (point ? begin + t : c);
              const int64_t down = tap_row + i + (fused ? t / 3 : 0);
              const int64_t across = tap_column + j + (fused ? t % 3 : point ? 0 : begin + t);
              out[t] = partial + ((tap_channel * q.kernel[0] + down) * q.kernel[1] + across) * q.out_per_group + output;
            }
            const Block<E> call = fused ? block_of_3x3<E>(vectors) : block_of_row<E>(taps, vectors);
            call(from, q.dilation[0] * plane_columns, grad, pixels, left, out);
          }
  }

  // So many planes of the tile's images fit.
  int64_t room(int64_t elements) const { return kScratch / (images * elements); }

  void add_tile(int64_t tile) {
    const int64_t tiles_across = ceil_div(q.out_width, q.tile_columns),
                  tiles_down = ceil_div(q.out_height, q.tile_rows);
    column = tile % tiles_across * q.tile_columns;
    columns = min(q.tile_columns, q.out_width - column);
    row = tile / tiles_across % tiles_down * q.tile_rows;
    rows = min(q.tile_rows, q.out_height - row);
    image = tile / tiles_across / tiles_down * q.tile_images;
    images = min(q.tile_images, q.batch - image);

    // All taps share a packing where it has room for them.
    const int64_t down = (rows - 1) * q.stride[0] + 1, across = (columns - 1) * q.stride[1] + 1;
    const int64_t reach[] = {(q.kernel[0] - 1) * q.dilation[0], (q.kernel[1] - 1) * q.dilation[1]};
    const bool shared = images * (down + reach[0]) * (across + reach[1]) <= kScratch;
    tap_rows = shared ? q.kernel[0] : 1;
    tap_columns = shared ? q.kernel[1] : 1;
    plane_rows = down + (tap_rows - 1) * q.dilation[0];
    plane_columns = across + (tap_columns - 1) * q.dilation[1];
    const int64_t most = input_in_place() ? run.end - run.begin
                         : is_point()     ? kPointChannels
                                          : room(plane_rows * plane_columns);
    for (channel = run.begin; channel < run.end; channel += channels) {
      channels = min(most, run.end - channel);
      for (tap_row = 0; tap_row < q.kernel[0]; tap_row += tap_rows)
        for (tap_column = 0; tap_column < q.kernel[1]; tap_column += tap_columns) {
          add_packing();
          bias = nullptr;
        }
    }
  }

  void operator()(int64_t task, A* all_partial) {
    const int64_t range = task % q.ranges, slice = task / q.ranges % q.slices;
    run = q.runs[task / q.ranges / q.slices];
    first_output = range * q.range_outputs;
    last_output = min(q.out_per_group, first_output + q.range_outputs);
    const int64_t taps = q.kernel[0] * q.kernel[1];
    partial = all_partial + slice * q.selected * q.out_per_group * taps;
    for (int64_t i = run.begin * taps; i < run.end * taps; i++)
      for (int64_t o = first_output; o < last_output; o++) partial[i * q.out_per_group + o] = 0;
    A* sums = q.bias ? static_cast<A*>(q.bias) + slice * q.out_per_group : nullptr;
    if (sums)
      for (int64_t o = first_output; o < last_output; o++) sums[o] = 0;
    for (int64_t tile = q.tiles * slice / q.slices; tile < q.tiles * (slice + 1) / q.slices; tile++) {
      bias = sums;
      add_tile(tile);
    }
  }
};

template <class S>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  scalar_of<S>* packed = static_cast<scalar_of<S>*>(scratch);
  Task<S> work{q, packed, packed + kScratch + kTurnedSlack};
  work(task, static_cast<scalar_of<S>*>(partial));
}

}  // namespace

void conv2d_channel_grad_channels_last(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  switch (q.dtype) {
    case Dtype::float32:
      return run_task<float>(q, task, partial, scratch);
    case Dtype::float64:
      return run_task<double>(q, task, partial, scratch);
    case Dtype::bfloat16:
      return run_task<bfloat16>(q, task, partial, scratch);
    case Dtype::float16:
      return run_task<float16>(q, task, partial, scratch);
  }
}

}  // namespace trady::TRADY_ISA
