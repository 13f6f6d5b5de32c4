#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "launch.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

constexpr int THREADS = 256;
constexpr int MOST_DIMENSIONS = 8;

// ---- kernels ------------------------------------------------------------------------------------------------

__device__ int64_t selected(const int64_t* channels, int64_t j, int64_t in_channels) {
  const int64_t channel = channels[j];
  assert(0 <= channel && channel < in_channels && "gather_channels: an index in channels is out of range");
  return channel;
}

// Planes whose pixels are adjacent: one block a piece of a plane, `Vector` bytes a thread and step.
// source: (N, C) planes of `length` vectors, target: (N, k) planes; strides in vectors.
template <class Vector>
__global__ void copy_planes(const Vector* __restrict__ source, Vector* __restrict__ target,
                            const int64_t* __restrict__ channels, int64_t k, int64_t in_channels, int64_t batch_stride,
                            int64_t channel_stride, int64_t length) {
  const int64_t plane = blockIdx.x;
  source += plane / k * batch_stride + selected(channels, plane % k, in_channels) * channel_stride;
  target += plane * length;
  for (int64_t i = blockIdx.y * int64_t{THREADS} + threadIdx.x; i < length; i += int64_t{gridDim.y} * THREADS) {
    target[i] = source[i];
  }
}

// The dimensions of the result, innermost first, with the strides of the input; one of them is the channel's.
struct Layout {
  int64_t size[MOST_DIMENSIONS];
  int64_t stride[MOST_DIMENSIONS];
  int dimensions;
  int channel;
};

// Any strides: one element a thread and step, neighbouring threads on neighbouring elements of the result.
template <class Element, class Index>
__global__ void copy_elements(const Element* __restrict__ source, Element* __restrict__ target,
                              const int64_t* __restrict__ channels, int64_t in_channels, Layout layout, Index count) {
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < count;
       i += static_cast<Index>(gridDim.x) * THREADS) {
    Index rest = i;
    int64_t offset = 0;
    for (int d = 0; d < layout.dimensions; ++d) {
      const Index size = static_cast<Index>(layout.size[d]);
      const Index position = rest % size;
      rest /= size;
      offset += (d == layout.channel ? selected(channels, position, in_channels) : static_cast<int64_t>(position)) *
                layout.stride[d];
    }
    target[i] = source[offset];
  }
}

// ---- host -----------------------------------------------------------------------------------------------------

template <class Vector>
bool copy_planes_by(const Tensor& input, const Tensor& output, const Tensor& channels, int64_t plane_bytes,
                    cudaStream_t stream) {
  constexpr int64_t width = sizeof(Vector);
  const auto element_size = static_cast<int64_t>(input.element_size());
  const int64_t batch_stride = input.stride(0) * element_size, channel_stride = input.stride(1) * element_size;
  const int64_t planes = output.size(0) * output.size(1), length = plane_bytes / width;
  const auto address = reinterpret_cast<uintptr_t>(input.const_data_ptr());
  if (plane_bytes % width || batch_stride % width || channel_stride % width || address % width) return false;
  // Four steps a thread where the planes are large, and never more blocks than the y axis of a grid holds.
  const int64_t pieces = std::clamp<int64_t>((length + 4 * THREADS - 1) / (4 * THREADS), 1, 65535);
  copy_planes<Vector><<<dim3(static_cast<unsigned>(planes), static_cast<unsigned>(pieces)), THREADS, 0, stream>>>(
      static_cast<const Vector*>(input.const_data_ptr()), static_cast<Vector*>(output.mutable_data_ptr()),
      static_cast<const int64_t*>(channels.const_data_ptr()), output.size(1), input.size(1), batch_stride / width,
      channel_stride / width, length);
  return true;
}

template <class Element>
void copy_elements_of(const Tensor& input, const Tensor& output, const Tensor& channels, const Layout& layout,
                      cudaStream_t stream) {
  const int64_t count = output.numel();
  // Eight elements a thread once the GPU is full many times over.
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>((count + THREADS - 1) / THREADS, 1, 1 << 20));
  const auto* source = static_cast<const Element*>(input.const_data_ptr());
  auto* target = static_cast<Element*>(output.mutable_data_ptr());
  const auto* index = static_cast<const int64_t*>(channels.const_data_ptr());
  // 32-bit division is several times cheaper; the offsets themselves are always 64 bits.
  if (count < (int64_t{1} << 31) - (int64_t{THREADS} << 20)) {
    copy_elements<Element, uint32_t>
        <<<blocks, THREADS, 0, stream>>>(source, target, index, input.size(1), layout, static_cast<uint32_t>(count));
  } else {
    copy_elements<Element, int64_t>
        <<<blocks, THREADS, 0, stream>>>(source, target, index, input.size(1), layout, count);
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

Tensor gather(const Tensor& input, const Tensor& channels) {
  const OnDeviceOf device(input);
  STD_TORCH_CHECK(channels.is_cuda() && channels.get_device_index() == input.get_device_index(),
                  "channels: got a tensor on another device, expected the device of input");
  const bool channels_last = is_channels_last(input);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape[1] = channels.size(0);
  Tensor output = empty(shape, input.scalar_type(), input.device(), channels_last);
  if (output.numel() == 0) return output;
  const Tensor index = torch::stable::contiguous(channels);

  const int64_t plane_bytes = channels_last ? 0 : adjacent_plane_bytes(input);
  const bool done = plane_bytes && output.size(0) * output.size(1) < (int64_t{1} << 31) &&
                    (copy_planes_by<uint4>(input, output, index, plane_bytes, device.stream) ||
                     copy_planes_by<uint2>(input, output, index, plane_bytes, device.stream) ||
                     copy_planes_by<uint32_t>(input, output, index, plane_bytes, device.stream) ||
                     copy_planes_by<uint16_t>(input, output, index, plane_bytes, device.stream));
  if (!done) {
    const Layout layout = layout_of(input, channels.size(0), channels_last);
    switch (input.element_size()) {
      case 1:
        copy_elements_of<uint8_t>(input, output, index, layout, device.stream);
        break;
      case 2:
        copy_elements_of<uint16_t>(input, output, index, layout, device.stream);
        break;
      case 4:
        copy_elements_of<uint32_t>(input, output, index, layout, device.stream);
        break;
      case 8:
        copy_elements_of<uint2>(input, output, index, layout, device.stream);
        break;
      case 16:
        copy_elements_of<uint4>(input, output, index, layout, device.stream);
        break;
      default:
        STD_TORCH_CHECK(false, "input: got elements of ", input.element_size(), " bytes, expected 1 to 16");
    }
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

Tensor gather_channels(const Tensor& input, const Tensor& channels,
                       std::optional<torch::headeronly::ScalarType> dtype) {
  const Tensor output = gather(input, channels);
  return !dtype.has_value() || *dtype == input.scalar_type() ? output : torch::stable::to(output, dtype);
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CUDA, m) { m.impl("gather_channels", TORCH_BOX(&trady::gather_channels)); }
