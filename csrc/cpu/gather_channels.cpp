#include "gather_channels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "layout.h"
#include "parallel.h"

using torch::stable::Tensor;

namespace trady {
namespace {

struct Dimension {
  int64_t size, stride;
};

// The dimensions of `input` but the second, outermost first; neighbours that lie behind one another become one.
std::vector<Dimension> merged(const Tensor& input, int64_t first) {
  std::vector<Dimension> result;
  for (int64_t d = first; d < input.dim(); ++d) {
    const Dimension next{input.size(d), input.stride(d)};
    if (next.size == 1) continue;
    if (!result.empty() && result.back().stride == next.size * next.stride) {
      result.back() = {result.back().size * next.size, next.stride};
    } else {
      result.push_back(next);
    }
  }
  return result;
}

int64_t product(const std::vector<Dimension>& dimensions) {
  return std::accumulate(dimensions.begin(), dimensions.end(), int64_t{1},
                         [](int64_t total, const Dimension& d) { return total * d.size; });
}

// Where element `index` of `dimensions`, counted in their order, lies.
int64_t offset_of(const std::vector<Dimension>& dimensions, int64_t index) {
  int64_t offset = 0;
  for (auto d = dimensions.rbegin(); d != dimensions.rend(); ++d) {
    offset += index % d->size * d->stride;
    index /= d->size;
  }
  return offset;
}

Tensor gather_channels(const Tensor& input, const Tensor& channels) {
  const int64_t batch = input.size(0), in_channels = input.size(1), k = channels.size(0);
  const int64_t batch_stride = input.stride(0), channel_stride = input.stride(1);
  const auto element_size = static_cast<int64_t>(input.element_size());
  const bool channels_last = is_channels_last(input);

  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape[1] = k;
  Tensor output = empty(shape, input.scalar_type(), input.device(), channels_last);

  std::vector<int64_t> offsets(k);
  const Tensor index = channels.is_contiguous() ? channels : torch::stable::contiguous(channels);
  const auto* selected = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t j = 0; j < k; ++j) {
    STD_TORCH_CHECK(0 <= selected[j] && selected[j] < in_channels, "channels: got index ", selected[j],
                    ", expected 0 <= index < ", in_channels);
    offsets[j] = selected[j] * channel_stride;
  }
  if (output.numel() == 0) return output;

  const auto* source = static_cast<const char*>(input.const_data_ptr());
  auto* target = static_cast<char*>(output.mutable_data_ptr());
  const auto kernel = TRADY_KERNEL(gather_rows);

  auto inner = merged(input, 2);
  if (channels_last || inner.empty()) {
    // The channel is innermost in the result: rows of k elements, one a pixel.
    inner.insert(inner.begin(), {batch, batch_stride});
    if (inner.size() == 2 && inner[0].stride == inner[1].size * inner[1].stride) {
      inner = {{inner[0].size * inner[1].size, inner[1].stride}};
    }
    const Dimension last = inner.back();
    inner.pop_back();
    parallel_for(product(inner) * last.size, k, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end;) {
        const int64_t rows = std::min(end, (row / last.size + 1) * last.size) - row;
        const int64_t start = offset_of(inner, row / last.size) + row % last.size * last.stride;
        kernel(source + start * element_size, last.stride, target + row * k * element_size, rows, offsets.data(), k,
               static_cast<int>(element_size));
        row += rows;
      }
    });
    return output;
  }

  // The channel is outside the pixels: runs of `last.size` elements, one after another in the result.
  const Dimension last = inner.back();
  inner.pop_back();
  const int64_t runs = product(inner);
  std::vector<int64_t> steps(last.stride == 1 ? 0 : last.size);
  for (size_t i = 0; i < steps.size(); ++i) steps[i] = static_cast<int64_t>(i) * last.stride;
  const int64_t run_bytes = last.size * element_size;
  parallel_for(batch * k * runs, last.size, [&](int64_t begin, int64_t end) {
    int64_t plane = begin / runs, n = plane / k, j = plane % k, run = begin % runs;
    char* to = target + begin * run_bytes;
    for (int64_t i = begin; i < end; ++i, to += run_bytes) {
      const int64_t start = n * batch_stride + offsets[j] + (runs == 1 ? 0 : offset_of(inner, run));
      const char* from = source + start * element_size;
      if (last.stride == 1) {
        std::memcpy(to, from, run_bytes);
      } else {
        kernel(from, 0, to, 1, steps.data(), last.size, static_cast<int>(element_size));
      }
      if (++run < runs) continue;
      run = 0;
      if (++j < k) continue;
      j = 0;
      ++n;
    }
  });
  return output;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(trady, CPU, m) { m.impl("gather_channels", TORCH_BOX(&trady::gather_channels)); }
