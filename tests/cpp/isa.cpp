#include "cpu/isa.h"

#include <set>

#include "check.h"
#include "cpu/roofline.h"

namespace trady {
namespace {

TRADY_TEST(sets_have_names_and_baseline_is_there) {
  std::set<std::string> names;
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) names.insert(isa_name(static_cast<Isa>(i)));
  expect(names.size() == static_cast<size_t>(Isa::count), "expected as many names as sets");
  expect(isa_name(static_cast<Isa>(0)) == std::string("baseline"), "expected baseline first");
  expect(isa_available(static_cast<Isa>(0)), "expected every CPU to have baseline");
}

TRADY_TEST(kernel_is_the_one_of_the_set) {
  using Pass = float(const float*, int64_t);
  Pass* const kernels[] = {
#define TRADY_ADDRESS(isa, ...) &trady::isa::read_pass,
      TRADY_FOR_EACH_ISA(TRADY_ADDRESS)
#undef TRADY_ADDRESS
  };
  expect(TRADY_KERNEL(read_pass) == kernels[static_cast<int>(current_isa())], "got the kernel of another set");
}

TRADY_TEST(read_pass) {
  const Array source = random_array(Dtype::float32, 4096);
  double total = 0, magnitude = 0;
  for (int64_t i = 0; i < source.count(); ++i) {
    total += source.get(i);
    magnitude += std::abs(source.get(i));
  }
  const float got = TRADY_KERNEL(read_pass)(static_cast<const float*>(source.at(0)), source.count());
  expect_sum("sum", 0, Dtype::float32, got, total, magnitude, source.count());
}

TRADY_TEST(copy_pass) {
  const Array source = random_array(Dtype::float32, 4096);
  Array target(Dtype::float32, source.count());
  TRADY_KERNEL(copy_pass)
  (static_cast<const float*>(source.at(0)), static_cast<float*>(target.at(0)), source.count());
  for (int64_t i = 0; i < source.count(); ++i) expect_identical("target", i, target.get(i), source.get(i));
}

TRADY_TEST(fma_pass) {
  float sink = NAN;
  const int64_t operations = TRADY_KERNEL(fma_pass)(&sink);
  // Every lane tends to the fixed point 0.001 / (1 - 0.999).
  const double lanes = static_cast<double>(operations) / (2 * 20000 * 12);
  expect(std::abs(sink - 12 * lanes) < 0.01 * lanes, "got ", sink, ", expected 12 times ", lanes);
}

}  // namespace
}  // namespace trady
