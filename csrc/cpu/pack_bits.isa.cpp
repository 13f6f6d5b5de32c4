#include "pack_bits.h"

#include "bits.h"

namespace trady::TRADY_ISA {
namespace {

// 64 bytes of a mask as 64 bits.
TRADY_INLINE uint64_t word_of(const uint8_t* mask) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  uint64_t zeros = 0;
  for (int i = 0; i < WORD; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
    const auto zero = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
    zeros |= static_cast<uint64_t>(zero) << i;
  }
  return ~zeros;
#elif defined(__SSE2__)
  uint64_t zeros = 0;
  for (int i = 0; i < WORD; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
    const auto zero = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())));
    zeros |= static_cast<uint64_t>(zero) << i;
  }
  return ~zeros;
#elif defined(__aarch64__)
  static constexpr uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t place = vld1q_u8(places);
  uint8x16_t bits[4];
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t bytes = vld1q_u8(mask + 16 * i);
    bits[i] = vandq_u8(vtstq_u8(bytes, bytes), place);
  }
  // Neighbours added three times: eight bytes, each the bit of its place, become one.
  const uint8x16_t fours = vpaddq_u8(vpaddq_u8(bits[0], bits[1]), vpaddq_u8(bits[2], bits[3]));
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(fours, fours)), 0);
#else
  uint64_t word = 0;
  for (int i = 0; i < WORD; ++i) word |= static_cast<uint64_t>(mask[i] != 0) << i;
  return word;
#endif
}

}  // namespace

void pack_bits(const uint8_t* mask, uint8_t* bits, int64_t count) {
  for (; count >= WORD; count -= WORD, mask += WORD, bits += 8) store_word(bits, word_of(mask));
  if (count == 0) return;
  uint8_t rest[WORD] = {};
  __builtin_memcpy(rest, mask, count);
  store_word(bits, word_of(rest), static_cast<int>(count + 7) / 8);
}

}  // namespace trady::TRADY_ISA
