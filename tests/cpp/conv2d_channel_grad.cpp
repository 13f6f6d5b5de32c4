#include "cpu/conv2d_channel_grad.h"

#include <cstdlib>
#include <memory>
#include <set>
#include <utility>

#include "check.h"

namespace trady {
namespace {

struct Shape {
  const char* name;
  int64_t batch, in_channels, out_channels, size[2];
  std::vector<int64_t> channels;
  int64_t kernel[2] = {3, 3}, stride[2] = {1, 1}, padding[2] = {1, 1}, dilation[2] = {1, 1};
  int64_t groups = 1;
};
std::vector<int64_t> first(int64_t count) {
  std::vector<int64_t> channels(count);
  for (int64_t i = 0; i < count; ++i) channels[i] = i;
  return channels;
}
const Shape SHAPES[] = {
    {"1x1 map", 3, 16, 24, {1, 1}, {0, 3, 7, 9, 15}, {1, 1}, {1, 1}, {0, 0}},
    {"1x1, 7x7 map", 3, 16, 24, {7, 7}, {0, 1, 2, 3, 4}, {1, 1}, {1, 1}, {0, 0}},
    {"1x1, many outputs", 2, 9, 150, {6, 5}, {4}, {1, 1}, {1, 1}, {0, 0}},
    {"1x1, stride 2", 2, 8, 16, {14, 13}, {1, 3, 5, 6}, {1, 1}, {2, 2}, {0, 0}},
    {"1x1, all channels", 1, 26, 16, {12, 13}, first(26), {1, 1}, {1, 1}, {0, 0}},
    {"1x1, more inputs than outputs", 3, 84, 20, {9, 11}, first(84), {1, 1}, {1, 1}, {0, 0}},
    {"1x1, many of both, several tiles", 2, 40, 53, {29, 31}, first(40), {1, 1}, {1, 1}, {0, 0}},
    {"3x3, many inputs", 3, 45, 34, {9, 8}, first(45)},
    {"3x3, many inputs, several tiles", 2, 33, 18, {25, 31}, first(33)},
    {"3x3, many inputs, stride 2", 3, 24, 33, {13, 15}, first(24), {3, 3}, {2, 2}},
    {"3x3, many inputs, dilation 2", 2, 35, 24, {13, 14}, first(35), {3, 3}, {1, 1}, {2, 2}, {2, 2}},
    {"1x1, many inputs, stride 2", 3, 36, 40, {15, 14}, first(36), {1, 1}, {2, 2}, {0, 0}},
    {"1x1, many inputs, padding", 3, 20, 40, {6, 7}, first(20), {1, 1}, {1, 1}, {1, 1}},
    {"1x1 map, many inputs", 35, 40, 24, {1, 1}, first(40), {1, 1}, {1, 1}, {0, 0}},
    {"1x1, slices", 4, 16, 200, {28, 28}, {0, 2, 3, 9, 11, 12}, {1, 1}, {1, 1}, {0, 0}},
    {"one column", 2, 4, 9, {9, 8}, {2}, {3, 1}, {1, 1}, {1, 0}},
    {"3x3, two outputs", 2, 5, 2, {9, 8}, {1, 4}},
    {"depthwise 5x5, many images", 8, 6, 6, {14, 14}, {0, 2, 3}, {5, 5}, {1, 1}, {2, 2}, {1, 1}, 6},
    {"3x3, small map", 3, 12, 40, {7, 7}, {0, 1, 5, 6, 7, 8, 11}},
    {"3x3", 2, 12, 19, {9, 11}, {0, 1, 5, 6, 7, 8, 11}},
    {"3x3, one channel", 2, 9, 35, {14, 14}, {3}},
    {"3x3, several tiles", 2, 6, 8, {41, 67}, {1, 4}},
    {"1x1, many channels",
     2,
     18,
     9,
     {29, 27},
     {0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16},
     {1, 1},
     {1, 1},
     {0, 0}},
    {"1x1, padded, many channels", 2, 12, 13, {6, 5}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, {1, 1}, {1, 1}, {2, 1}},
    {"3x3, many channels", 3, 12, 19, {9, 11}, {0, 1, 5, 6, 9}},
    {"3x3, many channels, several tiles", 1, 12, 9, {31, 37}, {0, 1, 4, 5, 6, 7, 8, 9, 10, 11}},
    {"3x3, stride 2, many channels", 3, 12, 9, {15, 14}, {0, 2, 3, 7, 11}, {3, 3}, {2, 2}},
    {"3x2, dilation 2, stride 3, many channels",
     2,
     9,
     10,
     {17, 19},
     {0, 1, 2, 3, 4, 5, 6, 8},
     {3, 2},
     {3, 2},
     {2, 0},
     {2, 3}},
    {"groups, many channels",
     2,
     32,
     10,
     {9, 9},
     {0, 1, 2, 3, 4, 16, 17, 20, 21, 30},
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     2},
    {"3x3, long rows", 1, 4, 5, {4, 2300}, {0, 3}},
    {"3x3, stride 2", 3, 8, 24, {15, 14}, {0, 2, 3, 7}, {3, 3}, {2, 2}},
    {"3x3, dilation 2", 2, 8, 16, {13, 14}, {1, 2, 6}, {3, 3}, {1, 1}, {2, 2}, {2, 2}},
    {"padding beyond the input", 2, 4, 8, {2, 3}, {0, 2}, {3, 3}, {1, 1}, {4, 5}},
    {"5x5", 2, 6, 9, {11, 12}, {1, 5}, {5, 5}, {1, 1}, {2, 2}},
    {"7x7, stride 2", 2, 3, 16, {23, 22}, {0, 1, 2}, {7, 7}, {2, 2}, {3, 3}},
    {"many columns", 1, 3, 6, {6, 40}, {0, 2}, {2, 21}, {1, 1}, {1, 0}},
    {"all asymmetric", 2, 8, 12, {17, 11}, {0, 1, 3, 4, 7}, {3, 2}, {2, 1}, {0, 2}, {1, 3}},
    {"groups", 3, 16, 24, {9, 9}, {0, 1, 4, 6, 13, 15}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 4},
    {"depthwise", 3, 19, 19, {14, 15}, {0, 3, 4, 9, 10, 17, 18}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 19},
    {"depthwise, 7x7 map", 8, 24, 24, {7, 7}, {0, 5, 23}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 24},
    {"depthwise, stride 2", 2, 24, 24, {15, 14}, {1, 2, 8, 20, 22}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 24},
    {"depthwise, large map", 2, 6, 6, {45, 61}, {0, 2, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 6},
    {"depthwise, one channel", 2, 9, 9, {45, 61}, {4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 9},
    {"depthwise, two channels, stride 2", 2, 6, 6, {31, 23}, {0, 5}, {5, 5}, {2, 2}, {2, 2}, {1, 1}, 6},
    {"depthwise, one channel, stride 3", 2, 6, 6, {22, 25}, {2}, {3, 4}, {2, 3}, {2, 3}, {2, 2}, 6},
    {"depthwise 5x5", 2, 10, 10, {14, 13}, {0, 1, 4, 9}, {5, 5}, {1, 1}, {2, 2}, {1, 1}, 10},
    {"depthwise 5x5, stride 2", 2, 10, 10, {14, 13}, {2, 3, 9}, {5, 5}, {2, 2}, {2, 2}, {1, 1}, 10},
    {"depthwise, multiplier 2", 2, 8, 16, {10, 11}, {0, 1, 2, 6, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 8},
    {"3x3, many inputs, even rows", 2, 40, 24, {16, 24}, first(40)},
    {"3x3, many inputs, one long row a tile", 1, 20, 19, {4, 200}, first(20)},
    {"5x3, many inputs, even rows", 2, 21, 9, {17, 22}, first(21), {5, 3}, {1, 2}, {4, 1}, {2, 1}},
    {"3x3, many outputs, even rows", 2, 7, 150, {16, 32}, first(7)},
};

// Dtypes, and whether pairs of bfloat16 are multiplied, whatever this CPU does faster.
constexpr std::pair<Dtype, bool> KINDS[] = {{Dtype::float32, false},
                                            {Dtype::float64, false},
                                            {Dtype::bfloat16, false},
                                            {Dtype::bfloat16, true},
                                            {Dtype::float16, false}};

// Where element (n, c, h, w) lies, and how many elements there are to the last one.
struct Layout {
  int64_t stride[4], count;
};
Layout layout_of(const int64_t (&size)[4], bool channels_last, int64_t gap) {
  Layout layout{};
  int64_t& all = layout.count;
  all = 1;
  constexpr int contiguous[] = {3, 2, 1, 0}, channels_innermost[] = {1, 3, 2, 0};
  for (const int dimension : channels_last ? channels_innermost : contiguous) {
    layout.stride[dimension] = all;
    all = all * size[dimension] + gap;
  }
  return layout;
}

struct Problem {
  Shape shape;
  Conv2dChannelGrad q{};
  std::vector<ChannelRun> runs;
  Layout in, out;

  Problem(const Shape& s, Dtype dtype, bool channels_last, int64_t gap) : shape(s) {
    q.dtype = dtype;
    q.batch = s.batch;
    q.height = s.size[0];
    q.width = s.size[1];
    q.selected = static_cast<int64_t>(s.channels.size());
    q.groups = s.groups;
    q.out_per_group = s.out_channels / s.groups;
    for (int axis : {0, 1}) {
      q.kernel[axis] = s.kernel[axis];
      q.stride[axis] = s.stride[axis];
      q.padding[axis] = s.padding[axis];
      q.dilation[axis] = s.dilation[axis];
    }
    const auto out_size = [&](int axis) {
      return (s.size[axis] + 2 * s.padding[axis] - s.dilation[axis] * (s.kernel[axis] - 1) - 1) / s.stride[axis] + 1;
    };
    q.out_height = out_size(0);
    q.out_width = out_size(1);
    in = layout_of({q.batch, q.selected, q.height, q.width}, channels_last, gap);
    out = layout_of({q.batch, s.out_channels, q.out_height, q.out_width}, channels_last, gap);
    for (int i = 0; i < 4; ++i) {
      q.input_stride[i] = in.stride[i];
      q.grad_stride[i] = out.stride[i];
    }
    for (int64_t i = 0; i < q.selected; ++i) {
      const int64_t group = s.channels[i] / (s.in_channels / s.groups);
      if (runs.empty() || runs.back().group != group) runs.push_back({i, i, group});
      runs.back().end = i + 1;
    }
    q.runs = runs.data();
    q.run_count = static_cast<int64_t>(runs.size());
  }
};

// f(c, o, ky, kx, sum, magnitude) of every result, by the definition.
template <class F>
void for_each_result(const Problem& p, const Array& input, const Array& grad_output, const F& f) {
  const Conv2dChannelGrad& q = p.q;
  const int64_t selected = static_cast<int64_t>(p.shape.channels.size());  // those of q may be exchanged
  const int64_t out_per_group = p.shape.out_channels / p.shape.groups;
  // Of thousands of results, others in every case, about a thousand: each takes as long as all that is tested.
  const int64_t one_of = 1 + selected * out_per_group * q.kernel[0] * q.kernel[1] / 1000;
  for (int64_t c = 0; c < selected; ++c) {
    const int64_t group = p.shape.channels[c] / (p.shape.in_channels / p.shape.groups);
    for (int64_t o = 0; o < out_per_group; ++o) {
      for (int64_t ky = 0; ky < q.kernel[0]; ++ky) {
        for (int64_t kx = 0; kx < q.kernel[1]; ++kx) {
          if (random_integer(1, one_of) > 1) continue;
          long double sum = 0;  // exact beside what is tested, float64 too
          double magnitude = 0;
          for (int64_t n = 0; n < q.batch; ++n) {
            for (int64_t y = 0; y < q.out_height; ++y) {
              const int64_t row = y * q.stride[0] - q.padding[0] + ky * q.dilation[0];
              if (row < 0 || row >= q.height) continue;
              for (int64_t x = 0; x < q.out_width; ++x) {
                const int64_t column = x * q.stride[1] - q.padding[1] + kx * q.dilation[1];
                if (column < 0 || column >= q.width) continue;
                const int64_t* s = p.in.stride;
                const int64_t* t = p.out.stride;
                const long double product =
                    static_cast<long double>(input.get(n * s[0] + c * s[1] + row * s[2] + column * s[3])) *
                    grad_output.get(n * t[0] + (group * out_per_group + o) * t[1] + y * t[2] + x * t[3]);
                sum += product;
                magnitude += static_cast<double>(std::abs(product));
              }
            }
          }
          f(c, o, ky, kx, static_cast<double>(sum), magnitude);
        }
      }
    }
  }
}

TRADY_TEST(conv2d_channel_grad) {
  std::set<Conv2dChannelGradLoop> loops;
  for (const Shape& shape : SHAPES) {
    for (const bool channels_last : {false, true}) {
      for (const int64_t gap : {0, 3}) {
        for (const auto& kind : KINDS) {
          const Dtype dtype = kind.first;
          const bool pairs = kind.second;
          // Not everywhere, for the sake of emulators; the Python tests have it everywhere.
          const bool with_bias = shape.groups == 1 && gap > 0;
          const Case words(shape.name, ", ", name_of(dtype), pairs ? " in pairs" : "",
                           channels_last ? ", channels_last" : "", gap ? ", gaps" : "", with_bias ? ", with bias" : "");
          Problem p(shape, dtype, channels_last, gap);
          Conv2dChannelGrad& q = p.q;
          const Array input = random_array(dtype, p.in.count), grad_output = random_array(dtype, p.out.count);
          q.input = input.at(0);
          q.grad_output = grad_output.at(0);
          q.with_bias = with_bias;
          const auto loop = plan(q);
          if (dtype == Dtype::bfloat16) q.pairs = pairs;
          loops.insert(loop);
          const Dtype accumulate = accumulate_type(dtype);
          const int64_t taps = q.kernel[0] * q.kernel[1], elements = q.selected * q.out_per_group * taps;
          Array partial(accumulate, q.slices * elements);
          const std::unique_ptr<void, void (*)(void*)> scratch(
              std::aligned_alloc(64, (q.scratch * size_of(accumulate) + 127) / 64 * 64), &std::free);
          Array bias(accumulate, q.slices * shape.out_channels);
          q.bias = with_bias ? bias.at(0) : nullptr;
          // From the last to the first: no task may rely on another.
          for (int64_t task = q.tasks - 1; task >= 0; --task) loop(q, task, partial.at(0), scratch.get());
          for (int64_t o = 0; with_bias && o < shape.out_channels; ++o) {
            long double sum = 0;
            double got = 0, magnitude = 0;
            for (int64_t slice = 0; slice < q.slices; ++slice) got += bias.get(slice * shape.out_channels + o);
            for (int64_t i = 0; i < q.batch * q.out_height * q.out_width; ++i) {
              const int64_t n = i / (q.out_height * q.out_width), y = i / q.out_width % q.out_height;
              const int64_t* t = p.out.stride;
              const double value = grad_output.get(n * t[0] + o * t[1] + y * t[2] + i % q.out_width * t[3]);
              sum += value;
              magnitude += std::abs(value);
            }
            expect_sum("bias", o, dtype, got, static_cast<double>(sum), magnitude,
                       q.batch * q.out_height * q.out_width);
          }
          for_each_result(p, input, grad_output,
                          [&](int64_t c, int64_t o, int64_t ky, int64_t kx, double sum, double magnitude) {
                            const int64_t i =
                                c * q.sum_stride[0] + o * q.sum_stride[1] + ky * q.sum_stride[2] + kx * q.sum_stride[3];
                            double got = 0;
                            for (int64_t slice = 0; slice < q.slices; ++slice) got += partial.get(slice * elements + i);
                            expect_sum("grad", i, dtype, got, sum, magnitude, q.batch * q.out_height * q.out_width);
                          });
        }
      }
    }
  }
  if (std::string(isa_name(current_isa())) == "avx512_amx")
    expect(loops.count(TRADY_KERNEL(conv2d_channel_grad_amx)), "expected the loop of matrix tiles to run");
  for (const Conv2dChannelGradLoop loop :
       {TRADY_KERNEL(conv2d_channel_grad), TRADY_KERNEL(conv2d_channel_grad_channels_last),
        TRADY_KERNEL(conv2d_channel_grad_many_channels), TRADY_KERNEL(conv2d_channel_grad_depthwise_channels_last)}) {
    expect(loops.count(loop), "expected every loop to run for some shape");
  }
}

#if defined(__x86_64__)
// LDTILECFG [rax] and STTILECFG [rax]: as bytes, since a compiler may not know them.
void load_tiles(const unsigned char* from) {
  asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" ::"a"(from) : "memory");
}
void store_tiles(unsigned char* to) { asm volatile(".byte 0xc4, 0xe2, 0x79, 0x49, 0x00" ::"a"(to) : "memory"); }

// Others of this thread, such as oneDNN, rely on the configuration of its tiles.
TRADY_TEST(conv2d_channel_grad_leaves_tiles_as_they_were) {
  if (isa_name(current_isa()) != std::string("avx512_amx")) return;
  Problem p({"", 2, 20, 20, {7, 7}, first(20)}, Dtype::bfloat16, true, 0);
  const Array input = random_array(Dtype::bfloat16, p.in.count);
  const Array grad_output = random_array(Dtype::bfloat16, p.out.count);
  p.q.input = input.at(0);
  p.q.grad_output = grad_output.at(0);
  const auto loop = plan(p.q);
  expect(loop == TRADY_KERNEL(conv2d_channel_grad_amx), "expected the loop of matrix tiles");
  Array partial(Dtype::float32, p.q.slices * 20 * 20 * 9);
  const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, (p.q.scratch * 4 + 127) / 64 * 64),
                                                       &std::free);
  for (const int palette : {1, 0}) {
    // Palette 0 is no configuration; otherwise some tiles of 5 lines of 20 bytes.
    alignas(64) unsigned char before[64] = {}, after[64] = {};
    before[0] = static_cast<unsigned char>(palette);
    for (int tile = 0; tile < 3 * palette; ++tile) {
      before[16 + 2 * tile] = 20;
      before[48 + tile] = 5;
    }
    load_tiles(before);
    loop(p.q, 0, partial.at(0), scratch.get());
    store_tiles(after);
    for (int i = 0; i < 64; ++i)
      expect(before[i] == after[i], "byte ", i, " of the configuration: got ", int{after[i]}, ", expected ",
             int{before[i]});
  }
}
#endif

}  // namespace
}  // namespace trady
