#include "scatter_channels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "parallel.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// Outputs that are written together for one channel after another: what lies side by side in a row is then read at
// once, and so many cache lines of the weight are written to while they are near.
constexpr int64_t TOGETHER = 8;

template <class Element>
void scatter_points(const Scatter& plan, const int64_t* places, const Element* rows, Element* weight, int64_t outputs) {
  const int64_t row_step = plan.row_output_stride, step = plan.output_stride;
  for (int64_t j = 0; j < plan.selected; ++j) {
    const Element* const from = rows + j * plan.row_stride;
    Element* const to = weight + places[j];
    if (outputs == TOGETHER) {
#pragma GCC unroll 8
      for (int64_t o = 0; o < TOGETHER; ++o) to[o * step] = from[o * row_step];
    } else {
      for (int64_t o = 0; o < outputs; ++o) to[o * step] = from[o * row_step];
    }
  }
}

// One output: the pixels of one channel after another.
template <class Element>
void scatter_pixels(const Scatter& plan, const int64_t* places, const Element* rows, Element* weight) {
  const auto [run, row_step, step] = plan.pixel[0];
  for (int64_t j = 0; j < plan.selected; ++j) {
    for (int64_t first = 0; first < plan.pixels; first += run) {
      const Element* from = rows + j * plan.row_stride;
      Element* to = weight + places[j];
      int64_t rest = first / run;
      for (int d = 1; d < plan.dimensions; rest /= plan.pixel[d++].size) {
        from += rest % plan.pixel[d].size * plan.pixel[d].row_stride;
        to += rest % plan.pixel[d].size * plan.pixel[d].stride;
      }
      for (int64_t x = 0; x < run; ++x) to[x * step] = from[x * row_step];
    }
  }
}

template <class Element>
void scatter_all(const Scatter& plan, const Tensor& channels, const Tensor& rows, Tensor& weight) {
  const auto* channel = static_cast<const int64_t*>(channels.const_data_ptr());
  const int64_t channel_step = channels.stride(0);
  std::vector<int64_t> places(plan.selected);
  for (int64_t j = 0; j < plan.selected; ++j) {
    const int64_t index = channel[j * channel_step];
    STD_TORCH_CHECK(0 <= index && index < plan.channels, "channels: got index ", index, ", expected 0 <= index < ",
                    plan.channels);
    places[j] = index / plan.group_channels * plan.group_stride + index % plan.group_channels * plan.channel_stride;
  }
  if (plan.pixels == 0) return;
  const auto* from = static_cast<const Element*>(rows.const_data_ptr());
  auto* to = static_cast<Element*>(weight.mutable_data_ptr());
  const int64_t together = plan.pixels == 1 ? TOGETHER : 1;
  parallel_for(plan.outputs, plan.selected * plan.pixels, [&](int64_t begin, int64_t end) {
    for (int64_t output = begin; output < end; output += together) {
      const Element* part = from + output * plan.row_output_stride;
      Element* target = to + output * plan.output_stride;
      if (plan.pixels == 1) {
        scatter_points(plan, places.data(), part, target, std::min(together, end - output));
      } else {
        scatter_pixels(plan, places.data(), part, target);
      }
    }
  });
}

void scatter_channels_(Tensor weight, const Tensor& channels, const Tensor& rows, int64_t groups) {
  const Scatter plan = plan_scatter(weight, channels, rows, groups);
  switch (weight.element_size()) {
    case 1:
      return scatter_all<uint8_t>(plan, channels, rows, weight);
    case 2:
      return scatter_all<uint16_t>(plan, channels, rows, weight);
    case 4:
      return scatter_all<uint32_t>(plan, channels, rows, weight);
    case 8:
      return scatter_all<uint64_t>(plan, channels, rows, weight);
    case 16:
      return scatter_all<std::array<uint64_t, 2>>(plan, channels, rows, weight);
    default:
      STD_TORCH_CHECK(false, "weight: got elements of ", weight.element_size(), " bytes, expected 1 to 16");
  }
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) { m.impl("scatter_channels_", TORCH_BOX(&trady::scatter_channels_)); }
