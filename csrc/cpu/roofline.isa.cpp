#include "roofline.h"

#include "vector.h"

namespace trady::TRADY_ISA {

float read_pass(const float* source, int64_t count) {
  constexpr int64_t lanes = LANES<float>;
  f32 sums[8] = {};
  for (int64_t i = 0; i + 8 * lanes <= count; i += 8 * lanes) {
    for (int v = 0; v < 8; ++v) sums[v] += load(source + i + v * lanes);
  }
  f32 total = sums[0];
  for (int v = 1; v < 8; ++v) total += sums[v];
  return sum(total);
}

void copy_pass(const float* source, float* target, int64_t count) {
  constexpr int64_t lanes = LANES<float>;
  for (int64_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int v = 0; v < 4; ++v) store(target + i + v * lanes, load(source + i + v * lanes));
  }
}

int64_t fma_pass(float* sink) {
  // Twelve independent chains hide the latency of two FMA units of four or five cycles.
  constexpr int chains = 12;
  constexpr int64_t rounds = 20000;
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
