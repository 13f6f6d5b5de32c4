#include "linear_channel_grad.h"

#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

// ---- what a block reads -----------------------------------------------------------------------------------
//
// One step of a block multiplies one x of each feature with vectors of outputs: of one row, or of two rows of bfloat16.

// Rows of dy as they are, or of a packed panel (T is then the accumulation type).
template <class T>
struct Rows {
  using Element = T;
  using A = scalar_of<T>;
  static constexpr int64_t STEP = 1;
  static TRADY_INLINE vector_of<T> read(const T* y, int64_t, bool) { return load(y); }
  static TRADY_INLINE vector_of<T> read_first(const T* y, int64_t, bool, int count) { return load_first(y, count); }
  static TRADY_INLINE vector_of<T> add_product(vector_of<T> sum, A x, vector_of<T> y) { return sum + x * y; }
};

// Two rows of bfloat16; an odd last one is beside zeros.
struct RowPairs {
  using Element = bfloat16;
  using A = float;
  static constexpr int64_t STEP = 2;
  static TRADY_INLINE f32 read(const bfloat16* y, int64_t stride, bool both) {
    return interleave(load_half(y), both ? load_half(y + stride) : u16_half{});
  }
  static TRADY_INLINE f32 read_first(const bfloat16* y, int64_t stride, bool both, int count) {
    return interleave(load_first_half(y, count), both ? load_first_half(y + stride, count) : u16_half{});
  }
  static TRADY_INLINE f32 add_product(f32 sum, float x, f32 y) { return dot2(sum, x, y); }
};

// The same from a packed panel, where a lane already holds a pair.
struct PackedPairs : Rows<float> {
  static TRADY_INLINE f32 add_product(f32 sum, float x, f32 y) { return dot2(sum, x, y); }
};

// How rows of T are multiplied, straight from memory and packed.
template <class T, bool DOT2 = MULTIPLIES_BFLOAT16>
struct Products {
  using Direct = Rows<T>;
  using Packed = Rows<scalar_of<T>>;
};
template <>
struct Products<bfloat16, true> {
  using Direct = RowPairs;
  using Packed = PackedPairs;
};

// ---- one register block -----------------------------------------------------------------------------------

// Features of which one block can hold the sums.
constexpr int FEATURES = VECTOR_REGISTERS == 32 ? 12 : 6;

// Vectors of outputs of a block: with F * V sums, V vectors of dy and one x it fills the registers.
constexpr int vectors(int features) {
  if (VECTOR_REGISTERS == 32) return features <= 2 ? 8 : features <= 4 ? 6 : features <= 6 ? 4 : features <= 8 ? 3 : 2;
  return features == 1 ? 6 : features == 2 ? 4 : features <= 4 ? 3 : 2;
}

struct Block {
  int64_t x_stride;  // from step to step
  int64_t y_stride;  // from row to row
  int64_t rows;
  int64_t grad_stride;
  bool add;
};

// F features, V vectors of outputs of which the last has `count` lanes, if CUT. `ahead`: rows read next, or null.
template <class P, int F, int V, bool CUT>
void block(const Block& b, const typename P::A* __restrict x, const typename P::Element* __restrict y,
           const typename P::Element* __restrict ahead, typename P::A* __restrict grad, int count) {
  using Element = typename P::Element;
  using Vector = vector_of<Element>;
  static_assert(F * V + V + 1 <= VECTOR_REGISTERS, "sums and operands are in registers");
  constexpr int lanes = LANES<Element>;
  constexpr int bytes = V * lanes * static_cast<int>(sizeof(Element));
  Vector sums[F][V] = {};
  const auto step = [&](bool both) INLINED {
    Vector read[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      read[v] = keep(CUT && v == V - 1 ? P::read_first(y + v * lanes, b.y_stride, both, count)
                                       : P::read(y + v * lanes, b.y_stride, both));
    }
#pragma GCC unroll 16
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[f][v] = P::add_product(sums[f][v], x[f], read[v]);
    }
  };
  int64_t r = 0;
  for (; r + P::STEP <= b.rows; r += P::STEP) {
    if (ahead != nullptr) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < P::STEP; ++i) {
#pragma GCC unroll 8
        for (int at = 0; at < bytes; at += 64) prefetch(reinterpret_cast<const char*>(ahead) + at);
        ahead += b.y_stride;
      }
    }
    step(true);
    x += b.x_stride;
    y += P::STEP * b.y_stride;
  }
  if (r < b.rows) step(false);
  // Unrolled too: otherwise the sums take the way through memory.
#pragma GCC unroll 16
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      auto* to = grad + f * b.grad_stride + v * lanes;
      if (CUT && v == V - 1) {
        store_first(to, b.add ? load_first(to, count) + sums[f][v] : sums[f][v], count);
      } else {
        store(to, b.add ? load(to) + sums[f][v] : sums[f][v]);
      }
    }
  }
}

// F features, every output in [0, width). The rows of a panel are as wide as its vectors, not dy's.
template <class P, int F>
void features(const Block& b, const typename P::A* x, const typename P::Element* y, const typename P::Element* next,
              typename P::A* grad, int64_t width) {
  constexpr int64_t lanes = LANES<typename P::Element>, wide = vectors(F) * lanes;
  int64_t o = 0;
  for (; o + wide <= width; o += wide) {
    block<P, F, vectors(F), false>(b, x, y + o, o + wide < width ? y + o + wide : next, grad + o, 0);
  }
  if constexpr (vectors(F) > 4) {
    if (o + 4 * lanes <= width) {
      block<P, F, 4, false>(b, x, y + o, nullptr, grad + o, 0);
      o += 4 * lanes;
    }
  }
  if constexpr (vectors(F) > 2) {
    for (; o + 2 * lanes <= width; o += 2 * lanes) block<P, F, 2, false>(b, x, y + o, nullptr, grad + o, 0);
  }
  for (; o + lanes <= width; o += lanes) block<P, F, 1, false>(b, x, y + o, nullptr, grad + o, 0);
  if (o < width) block<P, F, 1, true>(b, x, y + o, nullptr, grad + o, static_cast<int>(width - o));
}

template <class P>
void any_features(int64_t count, const Block& b, const typename P::A* x, const typename P::Element* y,
                  const typename P::Element* next, typename P::A* grad, int64_t width) {
  switch (count) {
#define TRADY_CASE(F)                                                        \
  case F:                                                                    \
    if constexpr (F <= FEATURES) features<P, F>(b, x, y, next, grad, width); \
    break
    TRADY_CASE(1);
    TRADY_CASE(2);
    TRADY_CASE(3);
    TRADY_CASE(4);
    TRADY_CASE(5);
    TRADY_CASE(6);
    TRADY_CASE(7);
    TRADY_CASE(8);
    TRADY_CASE(9);
    TRADY_CASE(10);
    TRADY_CASE(11);
    TRADY_CASE(12);
#undef TRADY_CASE
  }
}

// ---- straight from dy ---------------------------------------------------------------------------------------

// Rows summed in registers before they are added to the result.
constexpr int64_t DIRECT_ROWS = 16;

template <class T>
void direct(const LinearChannelGrad& a, const LinearChannelGradTask& t, scalar_of<T>* grad) {
  using P = typename Products<T>::Direct;
  using A = scalar_of<T>;
  const bool packed = a.panel != nullptr;
  const A* x = static_cast<const A*>(packed ? a.panel : a.x);
  Block b{packed ? a.k : a.x_stride, a.dy_stride, 0, a.out_features, t.add};
  const int64_t groups = (a.k + FEATURES - 1) / FEATURES;
  // With several groups: outputs taken together, so that the rows of dy are still near for the next features.
  const int64_t rows = t.row_end - t.row_begin, near = DIRECT_ROWS / (rows < DIRECT_ROWS ? rows : DIRECT_ROWS);
  const int64_t width = groups == 1 ? t.end - t.begin : 16 * LANES<T> * near;
  for (int64_t row = t.row_begin; row < t.row_end; row += b.rows, b.add = true) {
    b.rows = t.row_end - row < DIRECT_ROWS ? t.row_end - row : DIRECT_ROWS;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    const T* next = row + 2 * DIRECT_ROWS <= t.row_end ? dy + DIRECT_ROWS * a.dy_stride : nullptr;
    for (int64_t o = t.begin; o < t.end; o += width) {
      const int64_t outputs = t.end - o < width ? t.end - o : width;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t c = g * a.k / groups;
        any_features<P>((g + 1) * a.k / groups - c, b, x + row / P::STEP * b.x_stride + c, dy + o,
                        next == nullptr ? nullptr : next + o, grad + c * a.out_features + o, outputs);
      }
    }
  }
}

// ---- packed -------------------------------------------------------------------------------------------------

TRADY_INLINE int64_t group_begin(const LinearChannelGrad& a, int64_t g) { return g * a.k / a.groups; }

// panel: strips of GROUP_VECTORS vectors, in each the steps one after another; the last strip is as wide as it has to
// be.
constexpr int GROUP_VECTORS = vectors(GROUP_FEATURES);

// Rows that a copy prefetches ahead.
constexpr int64_t PACK_AHEAD = 4;

template <class T>
void pack_outputs(const T* dy, int64_t stride, int64_t rows, int64_t width, scalar_of<T>* panel) {
  using P = typename Products<T>::Direct;
  constexpr int64_t lanes = LANES<T>, wide = GROUP_VECTORS * lanes;
  const int64_t steps = (rows + P::STEP - 1) / P::STEP;
  for (int64_t step = 0; step < steps; ++step, dy += P::STEP * stride) {
    const bool both = P::STEP * step + 1 < rows;
    for (int64_t at = 0; at < width; at += 64 / static_cast<int64_t>(sizeof(T))) {
      for (int64_t i = 0; i < P::STEP; ++i) prefetch(dy + (P::STEP * PACK_AHEAD + i) * stride + at);
    }
    int64_t o = 0;
    for (; o + wide <= width; o += wide) {
      scalar_of<T>* to = panel + o * steps + step * wide;
#pragma GCC unroll 8
      for (int v = 0; v < GROUP_VECTORS; ++v) store(to + v * lanes, P::read(dy + o + v * lanes, stride, both));
    }
    scalar_of<T>* to = panel + o * steps + step * ((width - o + lanes - 1) / lanes * lanes);
    for (; o < width; o += lanes, to += lanes) {
      const int count = width - o < lanes ? static_cast<int>(width - o) : static_cast<int>(lanes);
      store(to, P::read_first(dy + o, stride, both, count));
    }
  }
}

template <class T>
void packed(const LinearChannelGrad& a, const LinearChannelGradTask& t, scalar_of<T>* grad, scalar_of<T>* panel) {
  using P = typename Products<T>::Packed;
  using A = scalar_of<T>;
  constexpr int64_t step = Products<T>::Direct::STEP, lanes = LANES<T>, wide = GROUP_VECTORS * lanes;
  const int64_t all_steps = (a.rows + step - 1) / step;
  for (int64_t o = t.begin; o < t.end; o += BLOCK_OUTPUTS) {
    const int64_t outputs = t.end - o < BLOCK_OUTPUTS ? t.end - o : BLOCK_OUTPUTS;
    bool add = t.add;
    for (int64_t row = t.row_begin; row < t.row_end; row += BLOCK_ROWS, add = true) {
      const int64_t rows = t.row_end - row < BLOCK_ROWS ? t.row_end - row : BLOCK_ROWS;
      const int64_t steps = (rows + step - 1) / step;
      pack_outputs(static_cast<const T*>(a.dy) + row * a.dy_stride + o, a.dy_stride, rows, outputs, panel);
      for (int64_t g = t.group_begin; g < t.group_end; ++g) {
        const int64_t c = group_begin(a, g), count = group_begin(a, g + 1) - c;
        const A* x = static_cast<const A*>(a.panel) + c * all_steps + row / step * count;
        for (int64_t s = 0; s < outputs; s += wide) {
          const int64_t width = outputs - s < wide ? outputs - s : wide;
          const Block b{count, (width + lanes - 1) / lanes * lanes, steps, a.out_features, add};
          any_features<P>(count, b, x, panel + s * steps, nullptr, grad + c * a.out_features + o + s, width);
        }
      }
    }
  }
}

template <class T>
void run(const LinearChannelGrad& a, const LinearChannelGradTask& t, void* grad, void* scratch) {
  if (a.packs) {
    packed<T>(a, t, static_cast<scalar_of<T>*>(grad), static_cast<scalar_of<T>*>(scratch));
  } else {
    direct<T>(a, t, static_cast<scalar_of<T>*>(grad));
  }
}

TRADY_INLINE float pair_of(bfloat16 low, bfloat16 high) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(high.bits) << 16 | low.bits);
}

// One group: (steps, count), its steps one after another. COUNT is 0 where the compiler does not know it.
template <class T, int COUNT>
void pack_group(const T* __restrict x, int64_t stride, int64_t rows, int64_t any, scalar_of<T>* __restrict panel) {
  constexpr int64_t step = Products<T>::Direct::STEP;
  const int64_t count = COUNT > 0 ? COUNT : any;
  for (int64_t r = 0; r < rows; r += step, x += step * stride, panel += count) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < count; ++c) {
      if constexpr (step == 1) {
        panel[c] = widen(x[c]);
      } else {
        panel[c] = pair_of(x[c], r + 1 < rows ? x[stride + c] : bfloat16{0});
      }
    }
  }
}

template <class T>
void pack(const LinearChannelGrad& a, int64_t begin, int64_t end) {
  using P = typename Products<T>::Direct;
  const int64_t all_steps = (a.rows + P::STEP - 1) / P::STEP;
  auto* panel = static_cast<scalar_of<T>*>(a.panel);
  // The rows that all groups take before the next ones: those of x stay in L1.
  constexpr int64_t some = 16;
  for (int64_t row = begin; row < end; row += some) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    for (int64_t r = some; r < 2 * some; ++r) {
      for (int64_t c = 0; c < a.k; c += 64 / static_cast<int64_t>(sizeof(T))) prefetch(x + r * a.x_stride + c);
    }
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t c = group_begin(a, g), count = group_begin(a, g + 1) - c;
      const auto group = count == 6 ? pack_group<T, 6> : count == 5 ? pack_group<T, 5> : pack_group<T, 0>;
      group(x + c, a.x_stride, end - row < some ? end - row : some, count,
            panel + c * all_steps + row / P::STEP * count);
    }
  }
}

template <class A>
void sum_of(const A* parts, int64_t count, int64_t size, A* total, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += LANES<A>) {
    const int lanes = end - i < LANES<A> ? static_cast<int>(end - i) : LANES<A>;
    vector_of<A> sum = load_first(parts + i, lanes);
    for (int64_t part = 1; part < count; ++part) sum += load_first(parts + part * size + i, lanes);
    store_first(total + i, sum, lanes);
  }
}

}  // namespace

void pack_features(const LinearChannelGrad& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::float32:
      return pack<float>(a, begin, end);
    case Dtype::float64:
      return pack<double>(a, begin, end);
    case Dtype::bfloat16:
      return pack<bfloat16>(a, begin, end);
    case Dtype::float16:
      return pack<float16>(a, begin, end);
  }
}

void linear_channel_grad(const LinearChannelGrad& a, const LinearChannelGradTask& task, void* grad, void* scratch) {
  switch (a.dtype) {
    case Dtype::float32:
      return run<float>(a, task, grad, scratch);
    case Dtype::float64:
      return run<double>(a, task, grad, scratch);
    case Dtype::bfloat16:
      return run<bfloat16>(a, task, grad, scratch);
    case Dtype::float16:
      return run<float16>(a, task, grad, scratch);
  }
}

void sum_parts(const void* parts, int64_t count, int64_t size, void* total, int64_t begin, int64_t end, bool float64) {
  if (float64) {
    sum_of(static_cast<const double*>(parts), count, size, static_cast<double*>(total), begin, end);
  } else {
    sum_of(static_cast<const float*>(parts), count, size, static_cast<float*>(total), begin, end);
  }
}

}  // namespace trady::TRADY_ISA
