#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "launch.h"
#include "scatter_channels.h"

using torch::stable::Tensor;

namespace trady {
namespace {

constexpr int THREADS = 256;

// One element a thread and step, in the order of the rows: what is read lies side by side, and nobody waits for writes.
template <class Element, class Index>
__global__ void scatter_elements(const Element* __restrict__ rows, Element* __restrict__ weight,
                                 const int64_t* __restrict__ channels, Scatter plan, Index count) {
  for (Index i = static_cast<Index>(blockIdx.x) * THREADS + threadIdx.x; i < count;
       i += static_cast<Index>(gridDim.x) * THREADS) {
    Index rest = i;
    int64_t source = 0, target = 0;
    for (int d = 0; d < plan.dimensions; ++d) {
      const Index size = static_cast<Index>(plan.pixel[d].size), position = rest % size;
      rest /= size;
      source += position * plan.pixel[d].row_stride;
      target += position * plan.pixel[d].stride;
    }
    const Index outputs = static_cast<Index>(plan.outputs), output = rest % outputs, j = rest / outputs;
    source += output * plan.row_output_stride + j * plan.row_stride;
    const int64_t channel = channels[j];
    assert(0 <= channel && channel < plan.channels && "scatter_channels_: an index in channels is out of range");
    const Index number = static_cast<Index>(channel), group_channels = static_cast<Index>(plan.group_channels);
    target += output * plan.output_stride + number / group_channels * plan.group_stride +
              number % group_channels * plan.channel_stride;
    weight[target] = rows[source];
  }
}

template <class Element>
void scatter(const Scatter& plan, const Tensor& channels, const Tensor& rows, Tensor& weight, cudaStream_t stream) {
  const int64_t count = rows.numel();
  // Eight elements a thread once the GPU is full many times over.
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>((count + THREADS - 1) / THREADS, 1, 1 << 20));
  const auto* from = static_cast<const Element*>(rows.const_data_ptr());
  auto* to = static_cast<Element*>(weight.mutable_data_ptr());
  const auto* index = static_cast<const int64_t*>(channels.const_data_ptr());
  // 32-bit division is several times cheaper; the offsets themselves are always 64 bits.
  if (count < (int64_t{1} << 31) - (int64_t{THREADS} << 20) && plan.channels < int64_t{1} << 32) {
    launch(scatter_elements<Element, uint32_t>, blocks, THREADS, stream, from, to, index, plan, count);
  } else {
    launch(scatter_elements<Element, int64_t>, blocks, THREADS, stream, from, to, index, plan, count);
  }
}

void scatter_channels_(Tensor weight, const Tensor& channels, const Tensor& rows, int64_t groups) {
  const OnDeviceOf device(weight);
  check_device_of(weight, channels, "channels");
  check_device_of(weight, rows, "rows");
  const Scatter plan = plan_scatter(weight, channels, rows, groups);
  if (rows.numel() == 0) return;
  const Tensor index = torch::stable::contiguous(channels);
  switch (weight.element_size()) {
    case 1:
      return scatter<uint8_t>(plan, index, rows, weight, device.stream);
    case 2:
      return scatter<uint16_t>(plan, index, rows, weight, device.stream);
    case 4:
      return scatter<uint32_t>(plan, index, rows, weight, device.stream);
    case 8:
      return scatter<uint2>(plan, index, rows, weight, device.stream);
    case 16:
      return scatter<uint4>(plan, index, rows, weight, device.stream);
    default:
      STD_TORCH_CHECK(false, "weight: got elements of ", weight.element_size(), " bytes, expected 1 to 16");
  }
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) {
  m.impl("scatter_channels_", TORCH_BOX(&trady::scatter_channels_));
}
