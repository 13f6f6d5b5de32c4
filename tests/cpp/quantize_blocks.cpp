#include "cpu/quantize_blocks.h"

#include <limits>

#include "check.h"

namespace trady {
namespace {

constexpr int64_t COUNTS[] = {1, 7, 63, 64, 65, 130, 1000};
constexpr int LARGEST = 127, MINUS_INFINITY = -128;
constexpr double SMALLEST = 0x1p-119;

// As trady_kernels/ops/quantize_blocks/reference.py.
void expected_block(const Array& input, int64_t begin, int64_t end, std::vector<double>& codes, double& scale) {
  const Dtype compute = accumulate_type(input.dtype());
  double largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double x = input.get(i);
    if (std::isnan(x)) largest = NAN;
    if (x != -INFINITY && std::abs(x) > largest) largest = std::abs(x);
  }
  scale = rounded(Dtype::float32, rounded(compute, largest / LARGEST));
  if (largest < SMALLEST) scale = 0;
  if (std::isinf(scale)) scale = NAN;
  if (std::isinf(rounded(Dtype::float32, scale * LARGEST))) scale = std::nextafter(static_cast<float>(scale), 0.0f);
  const double inverse = scale > 0 ? rounded(compute, 1 / scale) : 0;
  for (int64_t i = begin; i < end; ++i) {
    const double x = input.get(i);
    codes[i] = std::isnan(scale) ? 0 : x == -INFINITY ? MINUS_INFINITY : std::nearbyint(rounded(compute, x * inverse));
  }
}

// Blocks of very different size, and one of each that needs care.
Array elements(Dtype dtype, int64_t count) {
  Array array = random_array(dtype, count);
  const double most = dtype == Dtype::float16 ? 65504 : rounded(dtype, 0x1.fep127);
  const double factors[] = {1, 1e-6, 0, 0x1p-130, 300};
  for (int64_t i = 0; i < count; ++i) array.set(i, array.get(i) * factors[i / 64 % 5]);
  if (count == 130) array.set(70, NAN);
  if (count == 1000) {
    array.set(3, -INFINITY);
    array.set(200, INFINITY);
    array.set(640, most);
    array.set(641, -most);
  }
  return array;
}

TRADY_TEST(quantize_blocks) {
  for (const Dtype dtype : DTYPES) {
    for (const int64_t count : COUNTS) {
      const Case words(name_of(dtype), ", ", count, " elements");
      const Array input = elements(dtype, count);
      const int64_t blocks = (count + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
      std::vector<int8_t> codes(count, 99);
      std::vector<float> scales(blocks, -1);
      TRADY_KERNEL(quantize_blocks)(input.at(0), count, codes.data(), scales.data(), dtype);
      std::vector<double> expected(count);
      for (int64_t block = 0; block < blocks; ++block) {
        double scale = 0;
        expected_block(input, block * QUANTIZED_BLOCK, std::min(count, (block + 1) * QUANTIZED_BLOCK), expected, scale);
        expect_identical("scales", block, scales[block], scale);
      }
      for (int64_t i = 0; i < count; ++i) {
        expect(codes[i] == expected[i], "codes[", i, "]: got ", int{codes[i]}, ", expected ", expected[i]);
      }
    }
  }
}

TRADY_TEST(dequantize_blocks) {
  for (const Dtype dtype : DTYPES) {
    const Dtype compute = accumulate_type(dtype);
    for (const int64_t count : COUNTS) {
      const Case words(name_of(dtype), ", ", count, " elements");
      std::vector<int8_t> codes(count);
      for (auto& code : codes) code = static_cast<int8_t>(random_integer(-128, 127));
      std::vector<float> scales((count + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK);
      const float some[] = {0.37f, 1e-5f, NAN, 0.0f, 600.0f, 1e-9f};
      for (size_t i = 0; i < scales.size(); ++i) scales[i] = some[i % 6];
      Array output(dtype, count);
      TRADY_KERNEL(dequantize_blocks)(codes.data(), scales.data(), count, output.at(0), dtype);
      for (int64_t i = 0; i < count; ++i) {
        const double scale = scales[i / QUANTIZED_BLOCK];
        const double value = codes[i] == MINUS_INFINITY ? -INFINITY : rounded(compute, codes[i] * scale);
        expect_identical("output", i, output.get(i), rounded(dtype, value));
      }
    }
  }
}

}  // namespace
}  // namespace trady
