#include "cpu/pack_bits.h"

#include "check.h"

namespace trady {
namespace {

TRADY_TEST(pack_bits) {
  for (const int64_t count : {1, 7, 8, 63, 64, 65, 130, 1000}) {
    const Case words(count, " bytes");
    std::vector<uint8_t> mask(count), bits((count + 7) / 8, 0xff);
    for (auto& byte : mask) byte = static_cast<uint8_t>(random_integer(0, 1) * random_integer(1, 255));
    TRADY_KERNEL(pack_bits)(mask.data(), bits.data(), count);
    for (int64_t i = 0; i < static_cast<int64_t>(bits.size()) * 8; ++i) {
      const bool expected = i < count && mask[i] != 0;
      expect((bits[i / 8] >> i % 8 & 1) == expected, "bit ", i, ": expected ", expected);
    }
  }
}

}  // namespace
}  // namespace trady
