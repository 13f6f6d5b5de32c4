#include "cpu/max_pool2d.h"

#include "check.h"

namespace trady {
namespace {

struct Shape {
  int64_t batch, channels, size[2], kernel[2], stride[2], padding[2], dilation[2];
};
constexpr Shape SHAPES[] = {
    {2, 3, {9, 11}, {3, 3}, {2, 2}, {1, 1}, {1, 1}},  {1, 5, {8, 70}, {2, 2}, {2, 2}, {0, 0}, {1, 1}},
    {2, 17, {7, 5}, {3, 2}, {1, 2}, {1, 0}, {1, 1}},  {1, 2, {13, 37}, {5, 5}, {1, 1}, {2, 2}, {1, 1}},
    {2, 3, {10, 9}, {3, 3}, {1, 1}, {1, 1}, {2, 2}},  {1, 33, {6, 6}, {3, 3}, {3, 3}, {0, 0}, {1, 1}},
    {1, 1, {1, 1}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},   {1, 2, {20, 130}, {3, 3}, {2, 2}, {1, 1}, {1, 1}},
    {1, 3, {11, 12}, {3, 4}, {2, 3}, {1, 2}, {2, 1}},
};

MaxPool2d pool_of(const Shape& s, Dtype dtype) {
  MaxPool2d pool{};
  pool.dtype = dtype;
  pool.channels = s.channels;
  for (int axis : {0, 1}) {
    pool.size[axis] = s.size[axis];
    pool.kernel[axis] = s.kernel[axis];
    pool.stride[axis] = s.stride[axis];
    pool.padding[axis] = s.padding[axis];
    pool.dilation[axis] = s.dilation[axis];
    pool.out_size[axis] =
        (s.size[axis] + 2 * s.padding[axis] - s.dilation[axis] * (s.kernel[axis] - 1) - 1) / s.stride[axis] + 1;
  }
  return pool;
}

// Strides of (N, C, H, W) in memory, with `gap` elements behind each row.
Images images(void* data, int64_t channels, const int64_t (&size)[2], bool channels_last, int64_t gap = 0) {
  if (channels_last) {
    const int64_t row = size[1] * channels + gap;
    return {data, size[0] * row, 1, row, channels};
  }
  const int64_t row = size[1] + gap;
  return {data, channels * size[0] * row, size[0] * row, row, 1};
}

int64_t at(const Images& i, int64_t n, int64_t c, int64_t y, int64_t x) {
  return n * i.batch + c * i.channel + y * i.row + x * i.column;
}

// f(n, c, y, x) of each window.
template <class F>
void for_each_window(const Shape& s, const MaxPool2d& pool, const F& f) {
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t y = 0; y < pool.out_size[0]; ++y) {
        for (int64_t x = 0; x < pool.out_size[1]; ++x) f(n, c, y, x);
      }
    }
  }
}

// f(y, x, offset) of each element of a window.
template <class F>
void for_each_element(const MaxPool2d& pool, int64_t y, int64_t x, const F& f) {
  for (int64_t ky = 0; ky < pool.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < pool.kernel[1]; ++kx) {
      const int64_t row = y * pool.stride[0] - pool.padding[0] + ky * pool.dilation[0];
      const int64_t column = x * pool.stride[1] - pool.padding[1] + kx * pool.dilation[1];
      if (0 <= row && row < pool.size[0] && 0 <= column && column < pool.size[1]) {
        f(row, column, ky * pool.kernel[1] + kx);
      }
    }
  }
}

// f(words) for each dtype, shape and layout.
template <class F>
void for_each_case(const F& f) {
  for (const Dtype dtype : DTYPES) {
    for (size_t i = 0; i < std::size(SHAPES); ++i) {
      for (const bool channels_last : {false, true}) {
        const Case words(name_of(dtype), ", shape ", i, channels_last ? ", channels_last" : "");
        f(SHAPES[i], pool_of(SHAPES[i], dtype), channels_last);
      }
    }
  }
}

TRADY_TEST(max_pool2d) {
  for_each_case([](const Shape& s, const MaxPool2d& pool, bool channels_last) {
    const Images in = images(nullptr, s.channels, s.size, channels_last, 3);
    const Images out = images(nullptr, s.channels, pool.out_size, channels_last);
    Array input = random_array(pool.dtype, s.batch * in.batch);
    for (int64_t i = 0; i < input.count(); i += 13) input.set(i, i % 2 ? NAN : i % 3 ? -INFINITY : INFINITY);
    Array output(pool.dtype, s.batch * out.batch);
    std::vector<uint8_t> offsets(output.count(), 0xff);
    Images source = in;
    source.data = input.at(0);
    if (channels_last) {
      TRADY_KERNEL(max_pool2d_rows)
      (pool, source, output.at(0), offsets.data(), 0, s.batch * pool.out_size[0]);
    } else {
      std::vector<char> scratch(TRADY_KERNEL(max_pool2d_scratch)(pool));
      TRADY_KERNEL(max_pool2d_planes)
      (pool, source, output.at(0), offsets.data(), 0, s.batch * s.channels, scratch.data());
    }
    for_each_window(s, pool, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
      double best = -INFINITY;
      int64_t winner = -1;
      for_each_element(pool, y, x, [&](int64_t row, int64_t column, int64_t offset) {
        const double value = input.get(at(in, n, c, row, column));
        if (value > best || std::isnan(value)) {
          best = value;
          winner = offset;
        } else if (winner < 0) {
          winner = offset;
        }
      });
      const int64_t i = at(out, n, c, y, x);
      expect_identical("output", i, output.get(i), best);
      expect(offsets[i] == winner, "offsets[", i, "]: got ", int{offsets[i]}, ", expected ", winner);
    });
  });
}

// The three ways back: both that gather round once an element, the one that scatters after each addition.
TRADY_TEST(max_pool2d_backward) {
  for_each_case([](const Shape& s, const MaxPool2d& pool, bool channels_last) {
    const Images out = images(nullptr, s.channels, pool.out_size, channels_last, 5);
    const Images places = images(nullptr, s.channels, pool.out_size, channels_last);
    const Images in = images(nullptr, s.channels, s.size, channels_last);
    Array grad_output = random_array(pool.dtype, s.batch * out.batch);
    std::vector<uint8_t> offsets(s.batch * places.batch);
    for_each_window(s, pool, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
      std::vector<int64_t> inside;
      for_each_element(pool, y, x, [&](int64_t, int64_t, int64_t offset) { inside.push_back(offset); });
      const auto chosen = inside[random_integer(0, static_cast<int64_t>(inside.size()) - 1)];
      offsets[at(places, n, c, y, x)] = static_cast<uint8_t>(chosen);
    });
    Images source = out;
    source.data = grad_output.at(0);
    for (const bool scatters : {false, true}) {
      const Case words(scatters ? "scattered" : "gathered");
      const int64_t items = s.batch * (!channels_last ? s.channels : scatters ? 1 : s.size[0]);
      Array grad_input(pool.dtype, s.batch * in.batch);
      if (scatters) {
        TRADY_KERNEL(max_pool2d_backward_scatter)
        (pool, source, offsets.data(), grad_input.at(0), channels_last, 0, items);
      } else {
        std::vector<char> scratch(TRADY_KERNEL(max_pool2d_backward_scratch)(pool));
        const auto kernel =
            channels_last ? TRADY_KERNEL(max_pool2d_backward_rows) : TRADY_KERNEL(max_pool2d_backward_planes);
        kernel(pool, source, offsets.data(), grad_input.at(0), 0, items, scratch.data());
      }
      std::vector<double> sums(grad_input.count());
      const Dtype rounds_to = scatters ? pool.dtype : accumulate_type(pool.dtype);
      for_each_window(s, pool, [&](int64_t n, int64_t c, int64_t y, int64_t x) {
        for_each_element(pool, y, x, [&](int64_t row, int64_t column, int64_t offset) {
          if (offset != offsets[at(places, n, c, y, x)]) return;
          double& sum = sums[at(in, n, c, row, column)];
          sum = rounded(rounds_to, sum + grad_output.get(at(out, n, c, y, x)));
        });
      });
      for (int64_t i = 0; i < grad_input.count(); ++i) {
        expect(grad_input.get(i) == rounded(pool.dtype, sums[i]), "grad_input[", i, "]: got ", grad_input.get(i),
               ", expected ", sums[i]);
      }
    }
  });
}

}  // namespace
}  // namespace trady
