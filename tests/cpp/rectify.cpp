#include "cpu/rectify.h"

#include <limits>
#include <utility>

#include "check.h"

namespace trady {
namespace {

constexpr int64_t COUNTS[] = {1, 7, 63, 64, 65, 130, 1000};
constexpr double INFINITE = std::numeric_limits<double>::infinity();
const std::pair<const char*, Rectifier> RECTIFIERS[] = {
    {"relu", {Outside::lower_bound, 0, 0, 0}},       {"threshold", {Outside::lower_bound, -0.3, 0, 0}},
    {"relu6", {Outside::bounds, 0, 6, 0}},           {"hardtanh", {Outside::bounds, -1, 1, 0}},
    {"odd bounds", {Outside::bounds, -0.1, 0.3, 0}}, {"leaky relu", {Outside::slope, 0, 0, 0.01}},
    {"steep", {Outside::slope, 0, 0, -1.7}},
};

struct Expected {
  double value;
  bool bit;
};

Expected rectified(const Rectifier& r, Dtype dtype, double x) {
  const Dtype compute = accumulate_type(dtype);
  const double min = rounded(compute, r.min), max = rounded(compute, r.max), slope = rounded(compute, r.slope);
  switch (r.outside) {
    case Outside::lower_bound:
      return {min > x ? min : x, !(x <= min)};
    case Outside::bounds:
      return {min > x ? min : max < x ? max : x, !(x <= min) && !(x >= max)};
    case Outside::slope:
      return {x > min ? x : rounded(compute, x * slope), x > min};
  }
  return {};
}

// Ordinary numbers, and among them those that need care.
Array elements(Dtype dtype, int64_t count) {
  Array array = random_array(dtype, count);
  const double special[] = {0.0, -0.0, NAN, INFINITE, -INFINITE, 6.0, 1.0, -1.0, 0x1p-24, -0x1p-133, 0.3, 7.0};
  for (int64_t i = 0; i < count; i += 3) array.set(i, special[i / 3 % 12]);
  return array;
}

TRADY_TEST(rectify) {
  for (const Dtype dtype : DTYPES) {
    for (const auto& [name, rectifier] : RECTIFIERS) {
      for (const int64_t count : COUNTS) {
        for (const bool in_place : {false, true}) {
          const Case words(name_of(dtype), ", ", name, ", ", count, " elements", in_place ? ", in place" : "");
          const Array input = elements(dtype, count);
          Array source = input, other(dtype, count);
          Array& target = in_place ? source : other;
          std::vector<uint8_t> bits((count + 7) / 8, 0xff);
          TRADY_KERNEL(rectify)(dtype, rectifier, source.at(0), target.at(0), bits.data(), count);
          for (int64_t i = 0; i < count; ++i) {
            const auto [value, bit] = rectified(rectifier, dtype, input.get(i));
            expect_identical("target", i, target.get(i), rounded(dtype, value));
            expect((bits[i / 8] >> i % 8 & 1) == bit, "bit ", i, " of ", input.get(i), ": expected ", bit);
          }
          for (int64_t i = count; i < static_cast<int64_t>(bits.size()) * 8; ++i) {
            expect((bits[i / 8] >> i % 8 & 1) == 0, "bit ", i, ", behind the last: expected 0");
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace trady
