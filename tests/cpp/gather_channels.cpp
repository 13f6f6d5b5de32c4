#include "cpu/gather_channels.h"

#include <algorithm>
#include <cstring>

#include "check.h"

namespace trady {
namespace {

struct Shape {
  int64_t rows, step, count;
};
constexpr Shape SHAPES[] = {{1, 7, 7},    {3, 5, 1},     {9, 16, 5},   {31, 64, 17}, {64, 33, 33},
                            {7, 300, 70}, {130, 96, 12}, {5, 2048, 3}, {1, 0, 0},    {50, 1, 1}};

TRADY_TEST(gather_rows) {
  for (const int size : {1, 2, 4, 8, 16}) {
    for (const auto& [rows, step, count] : SHAPES) {
      const Case words(size, " bytes, ", rows, " rows of ", step, ", ", count, " taken");
      std::vector<char> source(rows * step * size), target(rows * count * size, 99);
      for (auto& byte : source) byte = static_cast<char>(random_integer(0, 255));
      std::vector<int64_t> offsets(count);
      for (auto& offset : offsets) offset = random_integer(0, step - 1);
      TRADY_KERNEL(gather_rows)(source.data(), step, target.data(), rows, offsets.data(), count, size);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < count; ++j) {
          const char* from = source.data() + (i * step + offsets[j]) * size;
          expect(std::memcmp(target.data() + (i * count + j) * size, from, size) == 0, "target[", i, ", ", j,
                 "]: not the element of the source");
        }
      }
    }
  }
}

// Ascending channels, of which the last sixteen may reach past the end of a row.
TRADY_TEST(gather_rows_by_mask) {
  for (const int size : {1, 2, 4, 8, 16}) {
    for (const int64_t step : {16, 37, 64, 259}) {
      const int64_t rows = 9;
      const Case words(size, " bytes, rows of ", step);
      std::vector<char> source(rows * step * size);
      for (auto& byte : source) byte = static_cast<char>(random_integer(0, 255));
      std::vector<int64_t> channels;
      std::vector<ChannelMask> masks;
      for (int64_t c = 0; c < step; ++c) {
        if (random_integer(0, 2) == 0) continue;
        channels.push_back(c);
        const int64_t first = c / 16 * 16;
        if (masks.empty() || masks.back().first != first) {
          masks.push_back({first, 0, static_cast<int32_t>(std::min<int64_t>(16, step - first))});
        }
        masks.back().selected |= 1u << (c - first);
      }
      const auto count = static_cast<int64_t>(channels.size());
      std::vector<char> target(rows * count * size, 99);
      if (!TRADY_KERNEL(gather_rows_by_mask)(source.data(), step, target.data(), rows, masks.data(),
                                             static_cast<int64_t>(masks.size()), size)) {
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < count; ++j) {
          const char* from = source.data() + (i * step + channels[j]) * size;
          expect(std::memcmp(target.data() + (i * count + j) * size, from, size) == 0, "target[", i, ", ", j,
                 "]: not the element of the source");
        }
      }
    }
  }
}

// Once from the accumulation type of the source, as ATen does.
TRADY_TEST(convert) {
  for (const Dtype from : DTYPES) {
    for (const Dtype to : DTYPES) {
      if (from == to) continue;
      for (const int64_t count : {1, 7, 16, 33, 500}) {
        const Case words(name_of(from), " to ", name_of(to), ", ", count, " elements");
        Array source = random_array(from, count), target(to, count);
        if (count == 500) {
          const double special[] = {NAN, INFINITY, -INFINITY, -0.0, 65519, 65520, 0x1p-24, 0x1p-25, 1e300, 0x1p-140};
          for (int64_t i = 0; i < 10; ++i) source.set(i, special[i]);
        }
        TRADY_KERNEL(convert)(source.at(0), from, target.at(0), to, count);
        for (int64_t i = 0; i < count; ++i) {
          const bool half = size_of(to) == 2;
          const double value = half ? rounded(Dtype::float32, source.get(i)) : source.get(i);
          expect_identical("target", i, target.get(i), rounded(to, value));
        }
      }
    }
  }
}

TRADY_TEST(copy_planes) {
  for (const int64_t bytes : {1, 15, 64, 200, 5000}) {
    const Case words("planes of ", bytes, " bytes");
    std::vector<char> source(9 * bytes), target(4 * bytes, 99);
    for (auto& byte : source) byte = static_cast<char>(random_integer(0, 255));
    const int64_t offsets[] = {8 * bytes, 0, 3 * bytes, 4 * bytes};
    TRADY_KERNEL(copy_planes)(source.data(), offsets, target.data(), 4, bytes);
    for (int64_t i = 0; i < 4; ++i) {
      expect(std::memcmp(target.data() + i * bytes, source.data() + offsets[i], bytes) == 0, "plane ", i,
             ": not that of the source");
    }
  }
}

}  // namespace
}  // namespace trady
