#include "cpu/gather_channels.h"

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

// Only some sets have it: those that do not say so and leave the target alone.
TRADY_TEST(gather_rows_by_mask) {
  for (const int size : {2, 4}) {
    for (const int64_t in_channels : {5, 16, 17, 100}) {
      for (const int64_t rows : {1, 2, 37}) {
        const Case words(size, " bytes, ", rows, " rows of ", in_channels);
        const int64_t step = in_channels + 3;
        std::vector<int64_t> channels;
        std::vector<ChannelMask> masks;
        for (int64_t c = 0; c < in_channels; ++c) {
          if (random_integer(0, 2) == 0) continue;
          channels.push_back(c);
          if (masks.empty() || masks.back().first != c / 16 * 16) {
            const int64_t first = c / 16 * 16;
            masks.push_back({first, 0, static_cast<int32_t>(in_channels - first < 16 ? in_channels - first : 16)});
          }
          masks.back().selected |= 1u << c % 16;
        }
        const auto count = static_cast<int64_t>(channels.size());
        // Without slack: the last row ends with its last channel.
        std::vector<char> source(((rows - 1) * step + in_channels) * size), target(rows * count * size, 99);
        for (auto& byte : source) byte = static_cast<char>(random_integer(0, 255));
        const bool ran = TRADY_KERNEL(gather_rows_by_mask)(source.data(), step, target.data(), rows, masks.data(),
                                                           static_cast<int64_t>(masks.size()), size);
        for (int64_t i = 0; ran && i < rows; ++i) {
          for (int64_t j = 0; j < count; ++j) {
            const char* from = source.data() + (i * step + channels[j]) * size;
            expect(std::memcmp(target.data() + (i * count + j) * size, from, size) == 0, "target[", i, ", ", j,
                   "]: not the element of the source");
          }
        }
      }
    }
  }
}

TRADY_TEST(copy_planes) {
  for (const int64_t bytes : {1, 15, 16, 63, 64, 65, 196, 2048, 2049, 5000}) {
    const Case words(bytes, " bytes");
    std::vector<char> source(7 * bytes);
    for (auto& byte : source) byte = static_cast<char>(random_integer(0, 255));
    const std::vector<int64_t> offsets{6 * bytes, 0, 3 * bytes, 4 * bytes, 0};
    std::vector<char> target(offsets.size() * bytes, 99);
    TRADY_KERNEL(copy_planes)(source.data(), offsets.data(), target.data(), offsets.size(), bytes);
    for (size_t i = 0; i < offsets.size(); ++i) {
      expect(std::memcmp(target.data() + i * bytes, source.data() + offsets[i], bytes) == 0, "plane ", i);
    }
  }
}

TRADY_TEST(convert) {
  for (const Dtype from : DTYPES) {
    for (const Dtype to : DTYPES) {
      if (from == to) continue;
      for (const int64_t count : {1, 7, 16, 33, 600}) {
        const Case words(name_of(from), " to ", name_of(to), ", ", count, " elements");
        Array source = random_array(from, count), target(to, count);
        TRADY_KERNEL(convert)(source.data(), from, target.data(), to, count);
        for (int64_t i = 0; i < count; ++i) {
          expect_identical("target", i, target.get(i), rounded(to, rounded(accumulate_type(to), source.get(i))));
        }
      }
    }
  }
}

}  // namespace
}  // namespace trady
