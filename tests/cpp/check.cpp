#include "check.h"

#include <bit>
#include <cstring>
#include <limits>

namespace trady {
namespace {

// Mantissa bits and the exponent of the smallest normal number of a 16-bit dtype.
struct Half {
  int mantissa, least;
};
constexpr Half half_of(Dtype dtype) { return dtype == Dtype::bfloat16 ? Half{7, -126} : Half{10, -14}; }

uint16_t encode(Half half, double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const auto infinity = static_cast<uint16_t>(0x7fff >> half.mantissa << half.mantissa);
  if (std::isnan(value)) return sign | infinity | static_cast<uint16_t>(1 << (half.mantissa - 1));
  const double magnitude = std::abs(value);
  if (magnitude == 0) return sign;
  if (magnitude >= std::ldexp(1, 2 - half.least)) return sign | infinity;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int last_place = std::max(exponent - 1, half.least) - half.mantissa;
  const auto places = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -last_place)));
  // The leading one of a normal number counts as one in the field of the exponent.
  return sign | static_cast<uint16_t>(((last_place + half.mantissa - half.least) << half.mantissa) + places);
}

double decode(Half half, uint16_t bits) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int field = (bits & 0x7fff) >> half.mantissa, one = 1 << half.mantissa, rest = bits & (one - 1);
  if (field == 0x7fff >> half.mantissa) return rest ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  const int exponent = std::max(field, 1) - 1 + half.least - half.mantissa;
  return sign * std::ldexp(field ? one + rest : rest, exponent);
}

template <class T>
T read(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

const char* name_of(Dtype dtype) {
  static constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

int size_of(Dtype dtype) {
  static constexpr int sizes[] = {4, 8, 2, 2};
  return sizes[static_cast<int>(dtype)];
}

double rounded(Dtype dtype, double value) {
  if (dtype == Dtype::float64) return value;
  if (dtype == Dtype::float32) return static_cast<float>(value);
  return decode(half_of(dtype), encode(half_of(dtype), value));
}

Array::Array(Dtype dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(count * size_of(dtype), '\xff') {}

double Array::get(int64_t i) const {
  const auto* p = static_cast<const char*>(at(i));
  if (dtype_ == Dtype::float64) return read<double>(p);
  if (dtype_ == Dtype::float32) return read<float>(p);
  return decode(half_of(dtype_), read<uint16_t>(p));
}

void Array::set(int64_t i, double value) {
  const auto narrow = static_cast<float>(value);
  const uint16_t half = encode(half_of(dtype_), value);
  const void* from = dtype_ == Dtype::float64   ? static_cast<const void*>(&value)
                     : dtype_ == Dtype::float32 ? static_cast<const void*>(&narrow)
                                                : static_cast<const void*>(&half);
  std::memcpy(at(i), from, size_of(dtype_));
}

std::mt19937_64& random() {
  static std::mt19937_64 engine(0);
  return engine;
}

int64_t random_integer(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(random());
}

Array random_array(Dtype dtype, int64_t count) {
  Array array(dtype, count);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) array.set(i, normal(random()));
  return array;
}

bool identical(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b);
}

void expect_identical(const char* what, int64_t index, double got, double expected) {
  expect(identical(got, expected), what, "[", index, "]: got ", got, ", expected ", expected);
}

void expect_sum(const char* what, int64_t index, Dtype dtype, double got, double expected, double magnitude,
                int64_t length) {
  const double roundoff = dtype == Dtype::float64 ? 0x1p-53 : 0x1p-24;
  const double bound = roundoff * (4 + std::sqrt(static_cast<double>(length)) / 8) * magnitude;
  expect(std::abs(got - expected) <= bound, what, "[", index, "]: got ", got, ", off by ", got - expected,
         ", expected ", expected, " within ", bound);
}

}  // namespace trady
