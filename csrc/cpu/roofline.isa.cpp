#include "roofline.h"

#include "vector.h"

namespace trady::TRADY_ISA {

namespace {

// Between passes: what memory holds may have changed, so that no pass is merged with the one before.
TRADY_INLINE void forget_memory() { asm volatile("" ::: "memory"); }

}  // namespace

void copy_passes(const float* source, float* target, int64_t count, int64_t passes) {
  constexpr int64_t lanes = LANES<float>;
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (int64_t i = 0; i < count; i += 8 * lanes) {
      f32 values[8];
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) values[v] = keep(load(source + i + v * lanes));
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) store(target + i + v * lanes, values[v]);
    }
    forget_memory();
  }
}

int64_t fma_passes(float* sink, int64_t passes) {
  // Twelve independent chains hide the latency of two FMA units of four or five cycles.
  constexpr int chains = 12;
  const int64_t rounds = passes * 1000;
  f32 sums[chains];
  for (int c = 0; c < chains; ++c) sums[c] = f32{} + static_cast<float>(c);
  f32 factor = keep(f32{} + 0.999f), addend = keep(f32{} + 0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sums[c] = sums[c] * factor + addend;
  }
  f32 total = sums[0];
  for (int c = 1; c < chains; ++c) total += sums[c];
  *sink = sum(total);
  return rounds * chains * LANES<float> * 2;
}

}  // namespace trady::TRADY_ISA
