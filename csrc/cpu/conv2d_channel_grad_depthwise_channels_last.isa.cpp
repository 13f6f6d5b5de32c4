// conv2d_channel_grad of layers with a few outputs a group (depthwise) where channels are adjacent: lanes are pairs of
// a selected channel and an output of its group.
//
// The selected channels of grad_output are picked on the way into a strip of a few rows that stays in the cache, beside
// a strip of the input with its padding; all taps are accumulated in registers. Of few pairs, which would leave most
// lanes empty, the strips are planes and lanes are columns.
#include "conv2d_channel_grad.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

TRADY_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
TRADY_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// A strip's rows of pixels, each pixel a vector of pairs. Distances in pixels.
struct Strip {
  int64_t rows, columns;
  int64_t input_pitch, input_row, input_column;  // from row to row; what a step in the output is
};

// sums[row * COLUMNS + column] += input under that tap times grad. STRIDE 0: as the strip says.
template <class A, int ROWS, int COLUMNS, int STRIDE>
void add_taps(const A* input, int64_t row_step, const A* grad, const Strip& strip, A* sums) {
  using V = vector_of<A>;
  constexpr int VL = LANES<A>;
  // Output pixels that share the loads of the input.
  constexpr int WIDE = COLUMNS == 1 ? 1 : 4;
  const int64_t step = STRIDE ? STRIDE : strip.input_column;
  V acc[ROWS * COLUMNS];
#pragma GCC unroll 32
  for (int a = 0; a < ROWS * COLUMNS; a++) acc[a] = load(sums + a * VL);
  for (int64_t r = 0; r < strip.rows; r++) {
    const A* x = input + r * strip.input_row * strip.input_pitch * VL;
    const A* d = grad + r * strip.columns * VL;
    int64_t w = 0;
    if constexpr (WIDE > 1)
      for (; w + WIDE <= strip.columns; w += WIDE, x += WIDE * STRIDE * VL, d += WIDE * VL) {
        V g[WIDE];
#pragma GCC unroll 4
        for (int u = 0; u < WIDE; u++) g[u] = keep(load(d + u * VL));
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
          for (int at = 0; at < (WIDE - 1) * STRIDE + COLUMNS; at++) {
            const V value = keep(load(x + (i * row_step + at) * VL));
#pragma GCC unroll 4
            for (int u = 0; u < WIDE; u++) {
              const int j = at - u * STRIDE;
              if (j >= 0 && j < COLUMNS) acc[i * COLUMNS + j] += g[u] * value;
            }
          }
      }
    for (; w < strip.columns; w++, x += step * VL, d += VL) {
      const V g = keep(load(d));
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) acc[i * COLUMNS + j] += g * load(x + (i * row_step + j) * VL);
    }
  }
#pragma GCC unroll 32
  for (int a = 0; a < ROWS * COLUMNS; a++) store(sums + a * VL, acc[a]);
}

template <class A>
using AddTaps = void (*)(const A*, int64_t, const A*, const Strip&, A*);

// The taps that one call takes, and the loop for them.
template <class A>
struct Loop {
  int64_t rows, columns;
  AddTaps<A> add;
};
template <class A>
Loop<A> loop_of(const Conv2dChannelGrad& q) {
  const bool plain = q.dilation[1] == 1 && q.stride[1] <= 2, two = q.stride[1] == 2;
  const bool whole = plain && q.dilation[0] == 1;
  if (whole && q.kernel[0] == 3 && q.kernel[1] == 3) return {3, 3, two ? add_taps<A, 3, 3, 2> : add_taps<A, 3, 3, 1>};
  if (VECTOR_REGISTERS >= 32 && whole && q.kernel[0] == 5 && q.kernel[1] == 5)
    return {5, 5, two ? add_taps<A, 5, 5, 2> : add_taps<A, 5, 5, 1>};
  if (plain && q.kernel[1] == 3) return {1, 3, two ? add_taps<A, 1, 3, 2> : add_taps<A, 1, 3, 1>};
  if (plain && q.kernel[1] == 5) return {1, 5, two ? add_taps<A, 1, 5, 2> : add_taps<A, 1, 5, 1>};
  if (plain && q.kernel[1] == 7) return {1, 7, two ? add_taps<A, 1, 7, 2> : add_taps<A, 1, 7, 1>};
  return {1, 1, add_taps<A, 1, 1, 0>};
}

template <class S>
struct Task {
  using A = scalar_of<S>;
  static constexpr int VL = LANES<S>;
  // Pixels from one request to the use: a few lines out of each pixel's are no stream that the hardware follows.
  static constexpr int64_t AHEAD = 16;

  // Where the pairs of a task lie in a pixel: in windows of a vector's length.
  struct Window {
    int64_t offset;
    int count;  // elements up to the last pair
    uint32_t lanes;
    index_of<vector_of<S>> index;
  };
  struct Elements {
    int64_t offsets[VL];
    Window windows[VL];
    int64_t window_count;

    void set(int lane, int64_t offset) {
      if (lane == 0) window_count = 0;
      offsets[lane] = offset;
      Window* window = windows + window_count - 1;
      const int64_t in_window = lane == 0 ? VL : offset - window->offset;
      if (in_window < 0 || in_window >= VL) {
        window = windows + window_count++;
        *window = Window{};
        window->offset = offset;
      }
      const int element = static_cast<int>(offset - window->offset);
      window->count = element >= window->count ? element + 1 : window->count;
      window->lanes |= 1u << lane;
      window->index[lane] = element;
    }
  };

  const Conv2dChannelGrad& q;
  A* input;
  A* grad;
  A* sums;  // of the task's blocks
  // Vectors of pairs.
  struct Block {
    int64_t pairs;
    Elements inputs, grads;
  };
  static constexpr int64_t BLOCKS = kStripPairs / VL;
  Block blocks[BLOCKS];  // `count` of them are set
  int64_t count;

  Task(const Conv2dChannelGrad& problem, A* scratch)
      : q(problem), input(scratch), grad(input + kStripInput), sums(grad + kStripGrad) {}

  // out[w] holds the pairs of pixel w, then zeros.
  static void pack(A* out, const S* in, int64_t step, int64_t count, const Elements& from, int64_t pairs) {
#if defined(__AVX512F__)
    switch (from.window_count) {
      case 1:
        return pack_windows<1>(out, in, step, count, from.windows);
      case 2:
        return pack_windows<2>(out, in, step, count, from.windows);
      case 3:
        return pack_windows<3>(out, in, step, count, from.windows);
      case 4:
        return pack_windows<4>(out, in, step, count, from.windows);
      case 5:
        return pack_windows<5>(out, in, step, count, from.windows);
    }
#endif
    for (int64_t w = 0; w < count; w++, in += step, out += VL) {
      store(out, vector_of<S>{});
      for (int64_t i = 0; i < from.window_count; i++) prefetch(in + from.windows[i].offset + AHEAD * step);
      for (int l = 0; l < pairs; l++) out[l] = widen(in[from.offsets[l]]);
    }
  }
#if defined(__AVX512F__)
  template <int COUNT>
  static void pack_windows(A* out, const S* in, int64_t step, int64_t count, const Window* windows) {
    for (int64_t w = 0; w < count; w++, in += step, out += VL) {
      vector_of<S> pixel = {};
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; i++) {
        prefetch(in + windows[i].offset + AHEAD * step);
        pixel = permute_into(pixel, windows[i].lanes, windows[i].index,
                             load_first(in + windows[i].offset, windows[i].count));
      }
      store(out, pixel);
    }
  }
#endif
  static void clear(A* out, int64_t pixels) {
    for (int64_t i = 0; i < pixels; i++) store(out + i * VL, vector_of<S>{});
  }

  void find_pairs(int64_t first, int64_t& run, Block& block) const {
    block.pairs = min(VL, q.selected * q.out_per_group - first);
    for (int l = 0; l < block.pairs; l++) {
      const int64_t c = (first + l) / q.out_per_group, o = (first + l) % q.out_per_group;
      while (q.runs[run].end <= c) run++;
      block.inputs.set(l, c * q.input_stride[1]);
      block.grads.set(l, (q.runs[run].group * q.out_per_group + o) * q.grad_stride[1]);
    }
  }

  // The pairs of all blocks, in pixels [0, width) of a row; a block's row begins `block_step` behind the last one's. A
  // few pixels for one block after another: their elements are neighbours, which the hardware fetches in advance.
  void pack_row(A* out, int64_t block_step, const S* in, int64_t step, int64_t width,
                Elements Block::* elements) const {
    const int64_t together = count == 1 ? width : 8;
    for (int64_t w = 0; w < width; w += together)
      for (int64_t b = 0; b < count; b++)
        pack(out + b * block_step + w * VL, in + w * step, step, min(together, width - w), blocks[b].*elements,
             blocks[b].pairs);
  }

  // Rows and columns of one image's output.
  struct Tile {
    int64_t n, row, column, rows, columns;
    Tile(const Conv2dChannelGrad& q, int64_t tile) {
      const int64_t across = (q.out_width + q.tile_columns - 1) / q.tile_columns;
      const int64_t down = (q.out_height + q.tile_rows - 1) / q.tile_rows;
      n = tile / across / down;
      row = tile / across % down * q.tile_rows;
      column = tile % across * q.tile_columns;
      rows = min(q.tile_rows, q.out_height - row);
      columns = min(q.tile_columns, q.out_width - column);
    }
  };

  void add_tile(int64_t tile, const Loop<A>& loop) const {
    const auto [n, row, column, rows, columns] = Tile(q, tile);
    const int64_t taps = q.kernel[0] * q.kernel[1];
    const int64_t grad_block = rows * columns * VL;
    for (int64_t r = 0; r < rows; r++)
      pack_row(grad + r * columns * VL, grad_block,
               static_cast<const S*>(q.grad_output) + n * q.grad_stride[0] + (row + r) * q.grad_stride[2] +
                   column * q.grad_stride[3],
               q.grad_stride[3], columns, &Block::grads);

    // The input under all taps of the strip, or, where dilation spreads them too far, under one call's.
    const int64_t tall = (rows - 1) * q.stride[0] + 1, wide = (columns - 1) * q.stride[1] + 1;
    const int64_t all_rows = tall + (q.kernel[0] - 1) * q.dilation[0];
    const int64_t all_columns = wide + (q.kernel[1] - 1) * q.dilation[1];
    const bool shared = all_rows * all_columns * count <= kStripInput / VL;
    for (int64_t i = 0; i < q.kernel[0]; i += loop.rows)
      for (int64_t j = 0; j < q.kernel[1]; j += loop.columns) {
        const int64_t height = shared ? all_rows : tall + loop.rows - 1;
        const int64_t pitch = shared ? all_columns : wide + loop.columns - 1, input_block = height * pitch * VL;
        if (!shared || i + j == 0)
          pack_input(n, row * q.stride[0] - q.padding[0] + (shared ? 0 : i * q.dilation[0]),
                     column * q.stride[1] - q.padding[1] + (shared ? 0 : j * q.dilation[1]), height, pitch);
        const Strip strip{rows, columns, pitch, q.stride[0], q.stride[1]};
        const A* from = input + (shared ? (i * q.dilation[0] * pitch + j * q.dilation[1]) * VL : 0);
        for (int64_t b = 0; b < count; b++)
          loop.add(from + b * input_block, q.dilation[0] * pitch, grad + b * grad_block, strip,
                   sums + (b * taps + i * q.kernel[1] + j) * VL);
      }
  }

  // Strips of few pairs, one behind the other. What a kernel column meets lies as far apart as its stride: columns with
  // the same remainder by that follow each other.
  struct Planes : Tile {
    using Tile::columns, Tile::rows;
    int64_t grad_pitch, height, remainders, input_pitch;

    Planes(const Conv2dChannelGrad& q, int64_t tile) : Tile(q, tile) {
      grad_pitch = (columns + VL - 1) / VL * VL;
      height = (rows - 1) * q.stride[0] + (q.kernel[0] - 1) * q.dilation[0] + 1;
      remainders = q.stride[1];
      input_pitch = grad_pitch + (q.kernel[1] - 1) * q.dilation[1] / remainders;
    }
    int64_t grad_elements() const { return rows * grad_pitch; }
    int64_t input_elements() const { return height * remainders * input_pitch; }
  };
  bool few() const {
    const Planes largest(q, 0);
    return count == 1 && blocks[0].pairs <= kFewPairs && blocks[0].pairs * largest.input_elements() <= kStripInput &&
           blocks[0].pairs * largest.grad_elements() <= kStripGrad;
  }
  // out[i] = in[i * step], of elements [begin, end) alone; the others of `size` are zero.
  static void pack_plane(A* out, int64_t size, const S* in, int64_t step, int64_t begin, int64_t end) {
    for (int64_t i = 0; i < begin; i++) out[i] = 0;
    for (int64_t i = begin; i < end; i++) out[i] = widen(in[i * step]);
    for (int64_t i = end; i < size; i++) out[i] = 0;
  }
  void add_few(int64_t tile) const {
    const Planes p(q, tile);
    const int64_t pairs = blocks[0].pairs, taps = q.kernel[0] * q.kernel[1];
    const S* d = static_cast<const S*>(q.grad_output) + p.n * q.grad_stride[0] + p.column * q.grad_stride[3];
    for (int64_t r = 0; r < p.rows; r++)
      for (int64_t pair = 0; pair < pairs; pair++)
        pack_plane(grad + pair * p.grad_elements() + r * p.grad_pitch, p.grad_pitch,
                   d + (p.row + r) * q.grad_stride[2] + blocks[0].grads.offsets[pair], q.grad_stride[3], 0, p.columns);

    const int64_t top = p.row * q.stride[0] - q.padding[0], left = p.column * q.stride[1] - q.padding[1];
    const S* x = static_cast<const S*>(q.input) + p.n * q.input_stride[0];
    for (int64_t r = 0; r < p.height; r++) {
      const bool inside = top + r >= 0 && top + r < q.height;
      for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t remainder = 0; remainder < p.remainders; remainder++) {
          // Columns first, first + remainders, ... of the input.
          const int64_t first = left + remainder, up = p.remainders - 1;
          const int64_t begin = min(max(up - first, 0) / p.remainders, p.input_pitch);
          const int64_t end = min(max(q.width - first + up, 0) / p.remainders, p.input_pitch);
          pack_plane(input + pair * p.input_elements() + (r * p.remainders + remainder) * p.input_pitch, p.input_pitch,
                     x + (top + r) * q.input_stride[2] + first * q.input_stride[3] + blocks[0].inputs.offsets[pair],
                     p.remainders * q.input_stride[3], inside ? begin : 0, inside ? max(begin, end) : 0);
        }
    }

    for (int64_t pair = 0; pair < pairs; pair++)
      for (int64_t i = 0; i < q.kernel[0]; i++)
        for (int64_t j = 0; j < q.kernel[1]; j++) {
          const int64_t along = j * q.dilation[1], step = q.stride[0] * p.remainders * p.input_pitch;
          A* sum = sums + (pair * taps + i * q.kernel[1] + j) * VL;
          add_products(grad + pair * p.grad_elements(), p.grad_pitch,
                       input + pair * p.input_elements() +
                           (i * q.dilation[0] * p.remainders + along % p.remainders) * p.input_pitch +
                           along / p.remainders,
                       step, p.rows, p.columns, sum);
        }
  }
  // Lanes of sum += those of the products of rows of `columns` elements; of four rows, so that multiply-adds don't wait
  // for each other. Behind the last column `a` is zero, and `b` may be infinite.
  static void add_products(const A* a, int64_t a_pitch, const A* b, int64_t b_pitch, int64_t rows, int64_t columns,
                           A* sum) {
    constexpr int TOGETHER = 4;
    vector_of<A> acc[TOGETHER] = {};
    const int64_t whole = columns / VL * VL;
    const int rest = static_cast<int>(columns - whole);
    int64_t r = 0;
    for (; r + TOGETHER <= rows; r += TOGETHER) {
      for (int64_t w = 0; w < whole; w += VL)
#pragma GCC unroll 4
        for (int u = 0; u < TOGETHER; u++) acc[u] += load(a + (r + u) * a_pitch + w) * load(b + (r + u) * b_pitch + w);
      if (rest > 0)
#pragma GCC unroll 4
        for (int u = 0; u < TOGETHER; u++)
          acc[u] += load(a + (r + u) * a_pitch + whole) * load_first(b + (r + u) * b_pitch + whole, rest);
    }
    for (; r < rows; r++) {
      for (int64_t w = 0; w < whole; w += VL) acc[0] += load(a + r * a_pitch + w) * load(b + r * b_pitch + w);
      if (rest > 0) acc[0] += load(a + r * a_pitch + whole) * load_first(b + r * b_pitch + whole, rest);
    }
    store(sum, load(sum) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
  }

  void pack_input(int64_t n, int64_t top, int64_t left, int64_t height, int64_t width) const {
    const int64_t begin = min(max(-left, 0), width), end = max(begin, min(width, q.width - left));
    const int64_t block_step = height * width * VL;
    for (int64_t r = 0; r < height; r++) {
      A* out = input + r * width * VL;
      const int64_t from = top + r;
      const bool inside = from >= 0 && from < q.height;
      for (int64_t b = 0; b < count; b++) {
        clear(out + b * block_step, inside ? begin : width);
        if (inside) clear(out + b * block_step + end * VL, width - end);
      }
      if (inside)
        pack_row(out + begin * VL, block_step,
                 static_cast<const S*>(q.input) + n * q.input_stride[0] + from * q.input_stride[2] +
                     (left + begin) * q.input_stride[3],
                 q.input_stride[3], end - begin, &Block::inputs);
    }
  }

  void operator()(int64_t task, A* partial) {
    const int64_t slice = task / q.ranges, first = task % q.ranges * q.range_outputs;
    const int64_t last = min(q.selected * q.out_per_group, first + q.range_outputs);
    const int64_t taps = q.kernel[0] * q.kernel[1];
    count = (last - first + VL - 1) / VL;
    const Loop<A> loop = loop_of<A>(q);
    int64_t run = 0;
    for (int64_t b = 0; b < count; b++) find_pairs(first + b * VL, run, blocks[b]);
    A* to = partial + (slice * q.selected * q.out_per_group + first) * taps;
    const int64_t begin = q.tiles * slice / q.slices, end = q.tiles * (slice + 1) / q.slices;
    if (few()) {
      clear(sums, blocks[0].pairs * taps);
      for (int64_t tile = begin; tile < end; tile++) add_few(tile);
      for (int64_t i = 0; i < blocks[0].pairs * taps; i++) to[i] = sum(load(sums + i * VL));
      return;
    }
    clear(sums, count * taps);
    for (int64_t tile = begin; tile < end; tile++) add_tile(tile, loop);
    for (int64_t b = 0; b < count; b++)
      for (int64_t l = 0; l < blocks[b].pairs; l++)
        for (int64_t t = 0; t < taps; t++) *to++ = sums[(b * taps + t) * VL + l];
  }
};

template <class S>
void run_task(const Conv2dChannelGrad& q, int64_t task, void* partial, void* scratch) {
  using A = scalar_of<S>;
  Task<S> work(q, static_cast<A*>(scratch));
  work(task, static_cast<A*>(partial));
}

}  // namespace

void conv2d_channel_grad_depthwise_channels_last(const Conv2dChannelGrad& q, int64_t task, void* partial,
                                                 void* scratch) {
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
