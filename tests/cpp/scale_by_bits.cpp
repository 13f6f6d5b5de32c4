#include "cpu/scale_by_bits.h"

#include "check.h"

namespace trady {
namespace {

struct Factors {
  double on, off;
  bool selects_zero;
};
constexpr Factors FACTORS[] = {{1, 0, true}, {1.25, 0, true}, {1, 0.01, false}, {0.7, -1.5, false}, {1, 0, false}};

TRADY_TEST(scale_by_bits) {
  for (const Dtype dtype : DTYPES) {
    const Dtype compute = accumulate_type(dtype);
    for (const Factors& f : FACTORS) {
      for (const int64_t count : {1, 7, 63, 64, 65, 130, 1000}) {
        for (const bool in_place : {false, true}) {
          const Case words(name_of(dtype), ", ", f.on, " and ", f.off, ", ", count, " elements",
                           in_place ? ", in place" : "");
          Array input = random_array(dtype, count);
          if (count > 9) {
            input.set(3, NAN);
            input.set(5, INFINITY);
            input.set(9, -0.0);
          }
          Array source = input, other(dtype, count);
          Array& target = in_place ? source : other;
          std::vector<uint8_t> bits((count + 7) / 8);
          for (auto& byte : bits) byte = static_cast<uint8_t>(random_integer(0, 255));
          TRADY_KERNEL(scale_by_bits)
          (dtype, f.on, f.off, f.selects_zero, source.at(0), bits.data(), target.at(0), count);
          for (int64_t i = 0; i < count; ++i) {
            const bool bit = bits[i / 8] >> i % 8 & 1;
            const double factor = rounded(compute, bit ? f.on : f.off);
            const double expected = !bit && f.selects_zero ? 0 : rounded(compute, input.get(i) * factor);
            expect_identical("target", i, target.get(i), rounded(dtype, expected));
          }
        }
      }
    }
  }
}

// A factor of one leaves each of the 65,536 values as it is: widening and narrowing are exact.
TRADY_TEST(every_half_survives) {
  constexpr int64_t count = 65536;
  const std::vector<uint8_t> bits(count / 8, 0xff);
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    const Case words(name_of(dtype));
    Array source(dtype, count), target(dtype, count);
    for (int64_t i = 0; i < count; ++i) {
      source.data()[2 * i] = static_cast<char>(i);
      source.data()[2 * i + 1] = static_cast<char>(i >> 8);
    }
    TRADY_KERNEL(scale_by_bits)(dtype, 1, 0, true, source.at(0), bits.data(), target.at(0), count);
    for (int64_t i = 0; i < count; ++i) expect_identical("target", i, target.get(i), source.get(i));
  }
}

// Products that fall between two values of the dtype, on all exponents and on ties.
TRADY_TEST(narrowing_rounds_to_nearest_even) {
  constexpr int64_t count = 65536;
  const std::vector<uint8_t> bits(count / 8, 0xff);
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    for (const double factor : {1.0 + 0x1p-8, 1.0 + 0x1p-11, 0.7, 1.5, 0x1p-9, 3e4}) {
      const Case words(name_of(dtype), " times ", factor);
      Array source(dtype, count), target(dtype, count);
      for (int64_t i = 0; i < count; ++i) {
        source.data()[2 * i] = static_cast<char>(i);
        source.data()[2 * i + 1] = static_cast<char>(i >> 8);
      }
      TRADY_KERNEL(scale_by_bits)(dtype, factor, 0, true, source.at(0), bits.data(), target.at(0), count);
      for (int64_t i = 0; i < count; ++i) {
        const double product = rounded(Dtype::float32, source.get(i) * rounded(Dtype::float32, factor));
        expect_identical("target", i, target.get(i), rounded(dtype, product));
      }
    }
  }
}

}  // namespace
}  // namespace trady
