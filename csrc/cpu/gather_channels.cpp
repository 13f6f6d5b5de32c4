#include "gather_channels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "dtype.h"
#include "layout.h"
#include "parallel.h"
#include "scratch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace trady {
namespace {

struct Dimension {
  int64_t size, stride;
};

// The dimensions of `input` but the second, outermost first; neighbours that lie behind one another become one.
std::vector<Dimension> merged(const Tensor& input, size_t first) {
  std::vector<Dimension> result;
  const auto sizes = input.sizes();
  const auto strides = input.strides();
  for (size_t d = first; d < sizes.size(); ++d) {
    const Dimension next{sizes[d], strides[d]};
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

// Selected channels as masks of sixteen, for ascending ones; empty where one by one is as fast.
std::vector<ChannelMask> masks_of(const int64_t* selected, int64_t k, int64_t in_channels) {
  std::vector<ChannelMask> masks;
  for (int64_t j = 0; j < k; ++j) {
    if (j > 0 && selected[j] <= selected[j - 1]) return {};
    const int64_t first = selected[j] / 16 * 16;
    if (masks.empty() || masks.back().first != first) {
      masks.push_back({first, 0, static_cast<int32_t>(std::min<int64_t>(16, in_channels - first))});
    }
    masks.back().selected |= 1u << (selected[j] - first);
  }
  // A mask costs about what two single elements do.
  return static_cast<int64_t>(masks.size()) * 2 <= k ? masks : std::vector<ChannelMask>{};
}

// Elements as they come, or converted. Pieces that are not adjacent go through a block that stays in L1.
struct Conversion {
  bool converts;
  Dtype from, to;
  int64_t from_size, to_size;
};

constexpr int64_t BLOCK_BYTES = 16384;

Tensor gather_channels(const Tensor& input, const Tensor& channels, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(input.dim() >= 2, "input: got ", input.dim(), " dimensions, expected at least 2, (N, C, ...)");
  STD_TORCH_CHECK(channels.dim() == 1 && channels.scalar_type() == ScalarType::Long,
                  "channels: expected a 1-D int64 tensor");
  const auto sizes = input.sizes();
  const auto strides = input.strides();
  const int64_t batch = sizes[0], in_channels = sizes[1], k = channels.size(0);
  const int64_t batch_stride = strides[0], channel_stride = strides[1];
  const bool channels_last = sizes.size() == 4 && channel_stride == 1 && strides[3] != 1;
  const auto scalar_type = input.scalar_type();
  Conversion conversion{dtype.has_value() && *dtype != scalar_type, {}, {}, 0, 0};

  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[1] = k;
  Tensor output = empty(shape, dtype.value_or(scalar_type), input.device(), channels_last);
  conversion.from_size = static_cast<int64_t>(input.element_size());
  conversion.to_size = conversion.from_size;
  if (conversion.converts) {
    conversion.from = dtype_of(input, "input");
    conversion.to = dtype_of(output, "dtype");
    conversion.to_size = static_cast<int64_t>(output.element_size());
  }

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
  const int64_t from_size = conversion.from_size, to_size = conversion.to_size;
  const auto gather = TRADY_KERNEL(gather_rows);
  const auto convert = TRADY_KERNEL(convert);

  auto inner = merged(input, 2);
  if (channels_last || inner.empty()) {
    // The channel is innermost in the result: rows of k elements, one a pixel.
    inner.insert(inner.begin(), {batch, batch_stride});
    if (inner.size() == 2 && inner[0].stride == inner[1].size * inner[1].stride) {
      inner = {{inner[0].size * inner[1].size, inner[1].stride}};
    }
    const Dimension last = inner.back();
    inner.pop_back();
    std::vector<ChannelMask> masks;
    if (channel_stride == 1) masks = masks_of(selected, k, in_channels);
    const auto by_mask = TRADY_KERNEL(gather_rows_by_mask);
    const auto take = [&](const char* from, char* to, int64_t rows) {
      const auto count = static_cast<int64_t>(masks.size());
      if (count > 0 && by_mask(from, last.stride, to, rows, masks.data(), count, static_cast<int>(from_size))) {
        return;
      }
      gather(from, last.stride, to, rows, offsets.data(), k, static_cast<int>(from_size));
    };
    const int64_t most = conversion.converts ? std::max<int64_t>(1, BLOCK_BYTES / (k * from_size)) : last.size;
    parallel_for(product(inner) * last.size, k, [&](int64_t begin, int64_t end) {
      auto* block = conversion.converts ? static_cast<char*>(scratch(most * k * from_size)) : nullptr;
      for (int64_t row = begin; row < end;) {
        const int64_t rows = std::min({end - row, (row / last.size + 1) * last.size - row, most});
        const char* from = source + (offset_of(inner, row / last.size) + row % last.size * last.stride) * from_size;
        char* to = target + row * k * to_size;
        take(from, conversion.converts ? block : to, rows);
        if (conversion.converts) convert(block, conversion.from, to, conversion.to, rows * k);
        row += rows;
      }
    });
    return output;
  }

  // The channel is outside the pixels: runs of `last.size` elements, one after another in the result.
  const Dimension last = inner.back();
  inner.pop_back();
  const int64_t runs = product(inner), run_bytes = last.size * to_size;
  if (runs == 1 && last.stride == 1 && !conversion.converts) {
    std::vector<int64_t> planes(batch * k);
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t j = 0; j < k; ++j) planes[n * k + j] = (n * batch_stride + offsets[j]) * from_size;
    }
    const auto copy = TRADY_KERNEL(copy_planes);
    parallel_for(batch * k, last.size, [&](int64_t begin, int64_t end) {
      copy(source, planes.data() + begin, target + begin * run_bytes, end - begin, run_bytes);
    });
    return output;
  }
  const bool adjacent = last.stride == 1;
  std::vector<int64_t> steps(adjacent ? 0 : last.size);
  for (size_t i = 0; i < steps.size(); ++i) steps[i] = static_cast<int64_t>(i) * last.stride;
  parallel_for(batch * k * runs, last.size, [&](int64_t begin, int64_t end) {
    auto* block = conversion.converts && !adjacent ? static_cast<char*>(scratch(last.size * from_size)) : nullptr;
    int64_t plane = begin / runs, n = plane / k, j = plane % k, run = begin % runs;
    char* to = target + begin * run_bytes;
    for (int64_t i = begin; i < end; ++i, to += run_bytes) {
      const int64_t start = n * batch_stride + offsets[j] + (runs == 1 ? 0 : offset_of(inner, run));
      const char* from = source + start * from_size;
      if (!adjacent) {
        char* gathered = conversion.converts ? block : to;
        gather(from, 0, gathered, 1, steps.data(), last.size, static_cast<int>(from_size));
        from = gathered;
      }
      if (conversion.converts) {
        convert(from, conversion.from, to, conversion.to, last.size);
      } else if (adjacent) {
        std::memcpy(to, from, run_bytes);
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
