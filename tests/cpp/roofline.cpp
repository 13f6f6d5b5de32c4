#include "cpu/roofline.h"

#include "check.h"

namespace trady {
namespace {

constexpr int64_t COUNT = 32 * kProbeStep;

TRADY_TEST(copy_passes) {
  const Array source = random_array(Dtype::float32, COUNT);
  Array target(Dtype::float32, COUNT);
  TRADY_KERNEL(copy_passes)(static_cast<const float*>(source.at(0)), static_cast<float*>(target.at(0)), COUNT, 2);
  for (int64_t i = 0; i < COUNT; ++i) expect_identical("target", i, target.get(i), source.get(i));
}

TRADY_TEST(fma_passes) {
  float sink = NAN;
  constexpr int64_t passes = 20, chains = 12;
  const int64_t operations = TRADY_KERNEL(fma_passes)(&sink, passes);
  // Every lane tends to the fixed point of x * 0.999 + 0.001, which is 1.
  const double lanes = static_cast<double>(operations) / (2 * 1000 * passes * chains);
  expect(std::abs(sink - chains * lanes) < 0.01 * lanes, "got ", sink, ", expected ", chains, " times ", lanes);
}

}  // namespace
}  // namespace trady
