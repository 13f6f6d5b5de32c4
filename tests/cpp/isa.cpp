#include "cpu/isa.h"

#include <set>

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

TRADY_TEST(kernel_is_the_one_of_the_set) {
  using Kernel = void(const uint8_t*, uint8_t*, int64_t);
  Kernel* const kernels[] = {
#define TRADY_ADDRESS(isa, ...) &trady::isa::pack_bits,
      TRADY_FOR_EACH_ISA(TRADY_ADDRESS)
#undef TRADY_ADDRESS
  };
  expect(TRADY_KERNEL(pack_bits) == kernels[static_cast<int>(current_isa())], "got the kernel of another set");
}

}  // namespace
}  // namespace trady
