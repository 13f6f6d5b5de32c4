#include "cpu/isa.h"

#include <set>
#include <utility>

#include "check.h"
#include "cpu/pack_bits.h"

namespace trady {
namespace {

TRADY_TEST(sets_have_names_and_baseline_is_there) {
  std::set<std::string> names;
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) names.insert(isa_name(static_cast<Isa>(i)));
  expect(names.size() == static_cast<size_t>(Isa::count), "expected as many names as sets");
  expect(isa_name(static_cast<Isa>(0)) == std::string("baseline"), "expected baseline first");
  expect(isa_available(static_cast<Isa>(0)), "expected every CPU to have baseline");
}

void of_baseline() {}
void of_the_set() {}

TRADY_TEST(kernel_is_the_one_of_the_set_or_of_the_nearest_before_it) {
  constexpr int count = static_cast<int>(Isa::count);
  using Kernel = void();
  Kernel* kernels[count] = {&of_baseline};
  expect(kernel_of_current_isa(std::move(kernels)) == &of_baseline, "expected the baseline's where the set has none");
  kernels[static_cast<int>(current_isa())] = &of_the_set;
  expect(kernel_of_current_isa(std::move(kernels)) == &of_the_set, "got the kernel of another set");
}

TRADY_TEST(baseline_has_every_kernel) {
  expect(&baseline::pack_bits != nullptr, "expected a kernel");
  const Isa before = current_isa();
  set_isa(static_cast<Isa>(0));
  expect(TRADY_KERNEL(pack_bits) == &baseline::pack_bits, "got the kernel of another set");
  set_isa(before);
}

}  // namespace
}  // namespace trady
