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

}  // namespace
}  // namespace trady
