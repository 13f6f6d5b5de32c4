#include "linear_channel_grad.h"

#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

// Rows summed in registers before they are added to the result: the rows of one block are as many streams for the
// hardware prefetcher, which follows 32, and sums of 32 and then of rows / 32 round less than one long one.
constexpr int64_t ROWS = 32;
// Features times vectors of outputs held in registers, beside the vectors of dy and one broadcast x.
constexpr int FEATURES = 6;
constexpr int VECTORS = VECTOR_REGISTERS == 32 ? 4 : 2;

// grad[c, 0 .. V vectors) += x[:, c] . dy for F features; `count` < LANES is the width where V is 1 and the block is
// cut.
template <class T, int F, int V, bool CUT>
void block(const scalar_of<T>* __restrict x, int64_t x_stride, const T* __restrict dy, int64_t dy_stride, int64_t rows,
           scalar_of<T>* __restrict grad, int64_t grad_stride, int count) {
  using A = scalar_of<T>;
  vector_of<T> sums[F][V] = {};
  for (int64_t r = 0; r < rows; ++r, x += x_stride, dy += dy_stride) {
    vector_of<T> y[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) y[v] = keep(CUT ? load_first(dy, count) : load(dy + v * LANES<T>));
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[f][v] += x[f] * y[v];
    }
  }
  for (int f = 0; f < F; ++f) {
    for (int v = 0; v < V; ++v) {
      A* to = grad + f * grad_stride + v * LANES<T>;
      if (CUT) {
        store_first(to, load_first(to, count) + sums[f][v], count);
      } else {
        store(to, load(to) + sums[f][v]);
      }
    }
  }
}

// F features, every output in [0, width).
template <class T, int F>
void features(const scalar_of<T>* x, int64_t x_stride, const T* dy, int64_t dy_stride, int64_t rows, scalar_of<T>* grad,
              int64_t grad_stride, int64_t width) {
  constexpr int64_t lanes = LANES<T>;
  // Few features leave registers free: more vectors of outputs hide the latency of the FMAs.
  constexpr int wide = F <= 2 ? 2 * VECTORS : VECTORS;
  int64_t o = 0;
  for (; o + wide * lanes <= width; o += wide * lanes) {
    block<T, F, wide, false>(x, x_stride, dy + o, dy_stride, rows, grad + o, grad_stride, 0);
  }
  for (; o + 2 * lanes <= width; o += 2 * lanes) {
    block<T, F, 2, false>(x, x_stride, dy + o, dy_stride, rows, grad + o, grad_stride, 0);
  }
  if (o + lanes <= width) {
    block<T, F, 1, false>(x, x_stride, dy + o, dy_stride, rows, grad + o, grad_stride, 0);
    o += lanes;
  }
  if (o < width) {
    block<T, F, 1, true>(x, x_stride, dy + o, dy_stride, rows, grad + o, grad_stride, static_cast<int>(width - o));
  }
}

template <class T>
void any_features(int64_t count, const scalar_of<T>* x, int64_t x_stride, const T* dy, int64_t dy_stride, int64_t rows,
                  scalar_of<T>* grad, int64_t grad_stride, int64_t width) {
  switch (count) {
#define TRADY_CASE(F) \
  case F:             \
    return features<T, F>(x, x_stride, dy, dy_stride, rows, grad, grad_stride, width);
    TRADY_CASE(1) TRADY_CASE(2) TRADY_CASE(3) TRADY_CASE(4) TRADY_CASE(5) TRADY_CASE(6)
#undef TRADY_CASE
  }
}

template <class T>
void run(const LinearChannelGrad& a, scalar_of<T>* grad, int64_t row_begin, int64_t row_end, int64_t begin,
         int64_t end) {
  using A = scalar_of<T>;
  for (int64_t c = 0; c < a.k; ++c) {
    for (int64_t o = begin; o < end; ++o) grad[c * a.out_features + o] = 0;
  }
  // Outputs taken together, so that the rows of dy are still in L1 for the next features.
  constexpr int64_t width = 4 * VECTORS * LANES<T>;
  const int64_t groups = (a.k + FEATURES - 1) / FEATURES;
  for (int64_t row = row_begin; row < row_end; row += ROWS) {
    const int64_t rows = row_end - row < ROWS ? row_end - row : ROWS;
    const A* x = static_cast<const A*>(a.x) + row * a.x_stride;
    const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
    for (int64_t o = begin; o < end; o += width) {
      const int64_t outputs = end - o < width ? end - o : width;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t c = g * a.k / groups, next = (g + 1) * a.k / groups;
        any_features<T>(next - c, x + c, a.x_stride, dy + o, a.dy_stride, rows, grad + c * a.out_features + o,
                        a.out_features, outputs);
      }
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

void linear_channel_grad(const LinearChannelGrad& a, void* grad, int64_t row_begin, int64_t row_end, int64_t begin,
                         int64_t end) {
  switch (a.dtype) {
    case Dtype::float32:
      return run<float>(a, static_cast<float*>(grad), row_begin, row_end, begin, end);
    case Dtype::float64:
      return run<double>(a, static_cast<double*>(grad), row_begin, row_end, begin, end);
    case Dtype::bfloat16:
      return run<bfloat16>(a, static_cast<float*>(grad), row_begin, row_end, begin, end);
    case Dtype::float16:
      return run<float16>(a, static_cast<float*>(grad), row_begin, row_end, begin, end);
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
