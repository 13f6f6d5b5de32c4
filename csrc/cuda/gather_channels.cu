#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "elements.h"
#include "launch.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

constexpr int THREADS = 256;
constexpr int MOST_DIMENSIONS = 8;
// Of planes and of single elements: loads in flight a thread.
constexpr int STEPS = 4;
// Of a grid, along x and along y.
constexpr int64_t MOST_BLOCKS = (int64_t{1} << 31) - 1, MOST_PIECES = 65535;
// Rows of channels pass through 16 KiB of shared memory a block: eight blocks of a multiprocessor then wait for 128
// KiB, and its threads all have their place.
constexpr int TILE_VECTORS = 4;  // a thread
constexpr int64_t TILE_BYTES = int64_t{THREADS} * TILE_VECTORS * 16;
constexpr int64_t MOST_SELECTED = 2048;
// What the GPU's memory gives at once.
constexpr int64_t FETCHED_BYTES = 64;

// ---- kernels ------------------------------------------------------------------------------------------------

__device__ bool is_channel(int64_t channel, int64_t in_channels) { return 0 <= channel && channel < in_channels; }

__device__ int64_t selected(const int64_t* channels, int64_t j, int64_t in_channels) {
  const int64_t channel = channels[j];
  assert(is_channel(channel, in_channels) && "gather_channels: an index in channels is out of range");
  return channel;
}

// Elements that are loaded or stored at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Run {
  T element[N];
};
template <size_t BYTES>
using word_of = std::conditional_t<BYTES == 16, uint4, std::conditional_t<BYTES == 8, uint2, uint32_t>>;

// As Tensor.to rounds: to the half types by way of float32.
template <class To, class From>
struct Conversion {
  static __device__ To of(const From& x) {
    if constexpr (std::is_same_v<To, double> || std::is_same_v<To, float>) {
      return static_cast<To>(static_cast<computed_in<From>>(x));
    } else {
      return static_cast<To>(static_cast<float>(x));
    }
  }
};
template <class T>
struct Conversion<T, T> {
  static __device__ T of(const T& x) { return x; }
};
template <class To, class From, int N>
struct Conversion<Run<To, N>, Run<From, N>> {
  static __device__ Run<To, N> of(const Run<From, N>& x) {
    // One load, which the compiler makes of a word and not of the elements of a struct.
    const auto word = *reinterpret_cast<const word_of<sizeof(x)>*>(&x);
    From from[N];
    memcpy(from, &word, sizeof(x));
    Run<To, N> run;
#pragma unroll
    for (int i = 0; i < N; ++i) run.element[i] = Conversion<To, From>::of(from[i]);
    return run;
  }
};

// Planes whose pixels are adjacent: 2^`log_threads` threads a plane or a piece of it, a few `From` a thread.
// source: (N, C) planes of `length`, target: (N, k) planes; strides counted in `From`.
template <class From, class To>
__global__ void copy_planes(const From* __restrict__ source, To* __restrict__ target,
                            const int64_t* __restrict__ channels, uint32_t planes, uint32_t k, int64_t in_channels,
                            int64_t batch_stride, int64_t channel_stride, int64_t length, int log_threads) {
  const uint32_t threads = 1u << log_threads;
  const uint32_t plane = blockIdx.x * (THREADS >> log_threads) + (threadIdx.x >> log_threads);
  if (plane >= planes) return;
  source += plane / k * batch_stride + selected(channels, plane % k, in_channels) * channel_stride;
  target += int64_t{plane} * length;
  const int64_t first = int64_t{blockIdx.y} * STEPS * threads + threadIdx.x % threads;
  From values[STEPS];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int64_t i = first + int64_t{threads} * step;
    if (i < length) values[step] = source[i];
  }
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int64_t i = first + int64_t{threads} * step;
    if (i < length) target[i] = Conversion<To, From>::of(values[step]);
  }
}

// Rows of adjacent channels, `pixels` of them without gaps: a block reads whole rows by vectors, whatever is selected,
// and picks from shared memory. A thread puts words of 4 bytes together.
template <class From, class To>
__global__ void __launch_bounds__(THREADS)
    pick_from_rows(const From* __restrict__ source, To* __restrict__ target, const int64_t* __restrict__ channels,
                   int64_t pixels, uint32_t in_channels, uint32_t k, uint32_t tile_pixels) {
  __shared__ uint4 tile[THREADS * TILE_VECTORS];
  __shared__ uint16_t places[MOST_SELECTED];
  constexpr uint32_t TOGETHER = sizeof(To) < 4 ? 4 / sizeof(To) : 1, STRIDE = THREADS * TOGETHER;
  const int64_t first = int64_t{blockIdx.x} * tile_pixels;
  const auto rows = static_cast<uint32_t>(min(int64_t{tile_pixels}, pixels - first));
  const uint32_t elements = rows * in_channels, vectors = elements * sizeof(From) / sizeof(uint4);
  source += first * in_channels;
  target += first * k;

  uint4 loaded[TILE_VECTORS];
#pragma unroll
  for (uint32_t v = 0; v < TILE_VECTORS; ++v) {
    const uint32_t i = v * THREADS + threadIdx.x;
    if (i < vectors) loaded[v] = reinterpret_cast<const uint4*>(source)[i];
  }
  bool in_range = true;
  for (uint32_t j = threadIdx.x; j < k; j += THREADS) {
    const int64_t channel = channels[j];
    in_range = in_range && is_channel(channel, in_channels);
    places[j] = static_cast<uint16_t>(channel);
  }
  auto* values = reinterpret_cast<From*>(tile);
  // The last tile may end within a vector.
  const uint32_t rest = vectors * (sizeof(uint4) / sizeof(From)) + threadIdx.x;
  if (rest < elements) values[rest] = source[rest];
#pragma unroll
  for (uint32_t v = 0; v < TILE_VECTORS; ++v) {
    const uint32_t i = v * THREADS + threadIdx.x;
    if (i < vectors) tile[i] = loaded[v];
  }
  // Here, where no registers have to be kept for what comes after it.
  assert(in_range && "gather_channels: an index in channels is out of range");
  __syncthreads();

  const uint32_t results = rows * k, whole = results - results % TOGETHER;
  const uint32_t step_rows = STRIDE / k * in_channels, step = STRIDE % k;
  uint32_t row = threadIdx.x * TOGETHER / k * in_channels, j = threadIdx.x * TOGETHER % k;
#pragma unroll 1
  for (uint32_t i = threadIdx.x * TOGETHER; i < whole; i += STRIDE) {
    To picked[TOGETHER];
    uint32_t of_row = row, of_channel = j;
#pragma unroll
    for (uint32_t n = 0; n < TOGETHER; ++n) {
      picked[n] = Conversion<To, From>::of(values[of_row + places[of_channel]]);
      if (++of_channel == k) {
        of_channel = 0;
        of_row += in_channels;
      }
    }
    using Word = std::conditional_t<TOGETHER == 1, To, uint32_t>;
    Word word;
    memcpy(&word, picked, sizeof(word));
    *reinterpret_cast<Word*>(target + i) = word;
    row += step_rows;
    j += step;
    if (j >= k) {
      j -= k;
      row += in_channels;
    }
  }
  // The last tile may end within a word.
  const uint32_t i = whole + threadIdx.x;
  if (i < results) target[i] = Conversion<To, From>::of(values[i / k * in_channels + places[i % k]]);
}

// The dimensions of the result, innermost first, with the strides of the input; one of them is the channel's.
struct Layout {
  int64_t size[MOST_DIMENSIONS];
  int64_t stride[MOST_DIMENSIONS];
  int dimensions;
  int channel;
};

// Any strides: a few elements a thread, neighbouring threads on neighbouring elements of the result.
template <class From, class To, class Index, int STEPS>
__global__ void __launch_bounds__(THREADS)
    copy_elements(const From* __restrict__ source, To* __restrict__ target, const int64_t* __restrict__ channels,
                  int64_t in_channels, Layout layout, Index count) {
  const Index first = static_cast<Index>(blockIdx.x) * (THREADS * STEPS) + threadIdx.x;
  if (first >= count) return;
  Index rest[STEPS];
  int64_t offset[STEPS] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const Index i = first + step * THREADS;
    rest[step] = i < count ? i : first;
  }
  bool in_range = true;
  for (int d = 0; d < layout.dimensions; ++d) {
    const Index size = static_cast<Index>(layout.size[d]);
    const int64_t stride = layout.stride[d];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Index position = rest[step] % size;
      rest[step] /= size;
      const int64_t index = d == layout.channel ? channels[position] : static_cast<int64_t>(position);
      if (d == layout.channel && !is_channel(index, in_channels)) {
        in_range = false;
      } else {
        offset[step] += index * stride;
      }
    }
  }
  From values[STEPS];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) values[step] = source[offset[step]];
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const Index i = first + step * THREADS;
    if (i < count) target[i] = Conversion<To, From>::of(values[step]);
  }
  // Here, where no registers have to be kept for what comes after it.
  assert(in_range && "gather_channels: an index in channels is out of range");
}

// ---- host -----------------------------------------------------------------------------------------------------

template <class From, class To>
bool copy_planes_by(const Tensor& input, const Tensor& output, const Tensor& channels, int64_t plane_bytes,
                    cudaStream_t stream) {
  constexpr int64_t width = sizeof(From);
  const auto element_size = static_cast<int64_t>(input.element_size());
  const int64_t batch_stride = input.stride(0) * element_size, channel_stride = input.stride(1) * element_size;
  const int64_t planes = output.size(0) * output.size(1), length = plane_bytes / width;
  const auto address = reinterpret_cast<uintptr_t>(input.const_data_ptr());
  if (plane_bytes % width || batch_stride % width || channel_stride % width || address % width) return false;
  int log_threads = 3;
  while ((1 << log_threads) < THREADS && (STEPS << log_threads) < length) ++log_threads;
  const int64_t threads = 1 << log_threads, blocks = (planes * threads + THREADS - 1) / THREADS;
  const int64_t pieces = (length + STEPS * threads - 1) / (STEPS * threads);
  if (pieces > MOST_PIECES) return false;
  launch(copy_planes<From, To>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(pieces)), THREADS, stream,
         static_cast<const From*>(input.const_data_ptr()), static_cast<To*>(output.mutable_data_ptr()),
         static_cast<const int64_t*>(channels.const_data_ptr()), planes, output.size(1), input.size(1),
         batch_stride / width, channel_stride / width, length, log_threads);
  return true;
}

template <class From, class To>
bool pick_from_rows_by(const Tensor& input, const Tensor& output, const Tensor& channels, const Layout& layout,
                       cudaStream_t stream) {
  const int64_t in_channels = input.size(1), k = output.size(1), row_bytes = in_channels * int64_t{sizeof(From)};
  const auto* source = static_cast<const From*>(input.const_data_ptr());
  if (layout.dimensions != 2 || layout.channel != 0 || layout.stride[0] != 1 || layout.stride[1] != in_channels ||
      !is_aligned(source) || k > MOST_SELECTED) {
    return false;
  }
  // Of few channels in wide rows the memory gives less one by one.
  if (row_bytes > 2 * k * FETCHED_BYTES) return false;
  // Tiles begin with a vector of the input and with a word of the result.
  int64_t unit = 1;
  while (unit * row_bytes % int64_t{sizeof(uint4)} || unit * k * int64_t{sizeof(To)} % 4) unit *= 2;
  const int64_t pixels = layout.size[1], tile_pixels = TILE_BYTES / (unit * row_bytes) * unit;
  if (tile_pixels == 0 || pixels / tile_pixels >= MOST_BLOCKS) return false;
  launch(pick_from_rows<From, To>, static_cast<unsigned>((pixels + tile_pixels - 1) / tile_pixels), THREADS, stream,
         source, static_cast<To*>(output.mutable_data_ptr()), static_cast<const int64_t*>(channels.const_data_ptr()),
         pixels, in_channels, k, tile_pixels);
  return true;
}

template <class From, class To>
void copy_elements_by(const Tensor& input, const Tensor& output, const Tensor& channels, const Layout& layout,
                      cudaStream_t stream) {
  const int64_t count = output.numel();
  const auto run = [&]<class Index, int STEPS>() {
    const int64_t blocks = (count + THREADS * STEPS - 1) / (THREADS * STEPS);
    STD_TORCH_CHECK(blocks <= MOST_BLOCKS, "input: got ", count, " selected elements, more than a launch takes");
    launch(copy_elements<From, To, Index, STEPS>, static_cast<unsigned>(blocks), THREADS, stream,
           static_cast<const From*>(input.const_data_ptr()), static_cast<To*>(output.mutable_data_ptr()),
           static_cast<const int64_t*>(channels.const_data_ptr()), input.size(1), layout, count);
  };
  // 32-bit division is several times cheaper, and leaves registers for several elements; the offsets themselves are
  // always 64 bits.
  if (count < (int64_t{1} << 31) - THREADS * STEPS) {
    run.template operator()<uint32_t, STEPS>();
  } else {
    run.template operator()<uint64_t, 1>();
  }
}

// Bytes of one plane where its pixels are adjacent and in order, otherwise 0.
int64_t adjacent_plane_bytes(const Tensor& input) {
  int64_t length = 1;
  for (int64_t d = input.dim() - 1; d >= 2; --d) {
    if (input.size(d) == 1) continue;
    if (input.stride(d) != length) return 0;
    length *= input.size(d);
  }
  return length == 1 ? 0 : length * static_cast<int64_t>(input.element_size());
}

Layout layout_of(const Tensor& input, int64_t k, bool channels_last) {
  std::vector<int64_t> order;  // innermost first
  for (int64_t d = input.dim() - 1; d >= 0; --d) order.push_back(d);
  if (channels_last) order = {1, 3, 2, 0};
  Layout layout{};
  layout.channel = -1;
  for (const int64_t d : order) {
    const int64_t size = d == 1 ? k : input.size(d), stride = input.stride(d);
    const int last = layout.dimensions - 1;
    if (d == 1) {
      layout.channel = layout.dimensions;
    } else if (last >= 0 && layout.channel != last && layout.size[last] * layout.stride[last] == stride) {
      layout.size[last] *= size;
      continue;
    }
    STD_TORCH_CHECK(layout.dimensions < MOST_DIMENSIONS, "input: got ", input.dim(),
                    " dimensions in no regular order, expected at most ", MOST_DIMENSIONS, "; call contiguous() first");
    layout.size[layout.dimensions] = size;
    layout.stride[layout.dimensions++] = stride;
  }
  return layout;
}

// How a gather reads and writes.
struct Plan {
  const Tensor& input;
  const Tensor& output;
  const Tensor& channels;
  int64_t plane_bytes;  // of the input, where planes can be copied as such, otherwise 0
  bool channels_last;
  cudaStream_t stream;

  template <class From, class To>
  bool by_planes() const {
    return plane_bytes && copy_planes_by<From, To>(input, output, channels, plane_bytes, stream);
  }
  template <class From, class To>
  void by_elements() const {
    const Layout layout = layout_of(input, channels.size(0), channels_last);
    if (pick_from_rows_by<From, To>(input, output, channels, layout, stream)) return;
    copy_elements_by<From, To>(input, output, channels, layout, stream);
  }
};

// Bits as they are, by the widest words that everything is aligned to.
void copy(const Plan& plan) {
  if (plan.by_planes<uint4, uint4>() || plan.by_planes<uint2, uint2>() || plan.by_planes<uint32_t, uint32_t>() ||
      plan.by_planes<uint16_t, uint16_t>()) {
    return;
  }
  switch (plan.input.element_size()) {
    case 1:
      return plan.by_elements<uint8_t, uint8_t>();
    case 2:
      return plan.by_elements<uint16_t, uint16_t>();
    case 4:
      return plan.by_elements<uint32_t, uint32_t>();
    case 8:
      return plan.by_elements<uint2, uint2>();
    case 16:
      return plan.by_elements<uint4, uint4>();
    default:
      STD_TORCH_CHECK(false, "input: got elements of ", plan.input.element_size(), " bytes, expected 1 to 16");
  }
}

// Four elements or 16 bytes a step, whichever is less: one load and one store.
void convert(const Plan& plan) {
  for_floating_type(plan.input, "input", [&]<class From>() {
    for_floating_type(plan.output, "dtype", [&]<class To>() {
      if constexpr (!std::is_same_v<From, To>) {
        constexpr int N = std::min<int>(4, 16 / std::max(sizeof(From), sizeof(To)));
        if (!plan.by_planes<Run<From, N>, Run<To, N>>() && !plan.by_planes<From, To>()) plan.by_elements<From, To>();
      }
    });
  });
}

Tensor gather_channels(const Tensor& input, const Tensor& channels,
                       std::optional<torch::headeronly::ScalarType> dtype) {
  STD_TORCH_CHECK(input.dim() >= 2, "input: got ", input.dim(), " dimensions, expected at least 2, (N, C, ...)");
  STD_TORCH_CHECK(channels.dim() == 1 && channels.scalar_type() == torch::headeronly::ScalarType::Long,
                  "channels: expected a 1-D int64 tensor");
  const OnDeviceOf device(input);
  check_device_of(input, channels, "channels");
  const bool channels_last = is_channels_last(input);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape[1] = channels.size(0);
  const auto result_dtype = dtype.value_or(input.scalar_type());
  Tensor output = empty(shape, result_dtype, input.device(), channels_last);
  if (output.numel() == 0) return output;
  const Tensor index = torch::stable::contiguous(channels);
  const bool few_enough = output.size(0) * output.size(1) < (int64_t{1} << 31);
  const int64_t plane_bytes = channels_last || !few_enough ? 0 : adjacent_plane_bytes(input);
  const Plan plan{input, output, index, plane_bytes, channels_last, device.stream};
  if (result_dtype == input.scalar_type()) {
    copy(plan);
  } else {
    convert(plan);
  }
  return output;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("gather_channels", TORCH_BOX(&trady::gather_channels));
}
