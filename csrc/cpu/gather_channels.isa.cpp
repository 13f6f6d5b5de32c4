#include "gather_channels.h"
#include "vector.h"

namespace trady::TRADY_ISA {
namespace {

// Rows; 8192 x 768 features, 192 of them: 7.1 ms without, 2.9 with.
constexpr int64_t AHEAD = 4;

struct Pair {
  uint64_t low, high;
};

template <class T>
void rows_of(const T* __restrict source, int64_t step, T* __restrict target, int64_t rows,
             const int64_t* __restrict offsets, int64_t count) {
  // Wide rows of which little is taken are no stream that the hardware follows.
  const bool wide = count > 1 && step * static_cast<int64_t>(sizeof(T)) >= 1024;
  for (int64_t i = 0; i < rows; ++i, source += step, target += count) {
    if (wide && i + AHEAD < rows) {
      for (int64_t j = 0; j < count; ++j) prefetch(source + AHEAD * step + offsets[j]);
    }
    for (int64_t j = 0; j < count; ++j) target[j] = source[offsets[j]];
  }
}

}  // namespace

void gather_rows(const void* source, int64_t step, void* target, int64_t rows, const int64_t* offsets, int64_t count,
                 int element_size) {
  switch (element_size) {
#define TRADY_CASE(T) \
  case sizeof(T):     \
    return rows_of(static_cast<const T*>(source), step, static_cast<T*>(target), rows, offsets, count);
    TRADY_CASE(uint8_t)
    TRADY_CASE(uint16_t)
    TRADY_CASE(uint32_t)
    TRADY_CASE(uint64_t)
    TRADY_CASE(Pair)
#undef TRADY_CASE
  }
}

}  // namespace trady::TRADY_ISA
