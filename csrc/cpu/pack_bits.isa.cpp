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
