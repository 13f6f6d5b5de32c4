// Threads of torch's own pool. Only for <operator>.cpp: the hot files know neither torch nor threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace trady {

// Work below which a second thread does not pay: about 10 us at one byte or operation a cycle and lane.
constexpr int64_t GRAIN = 32768;

// Calls f(begin, end) on parts of [0, items), each worth at least GRAIN operations of `cost` an item. Where the
// parts fall depends on the number of threads, so an item must be computed by itself: no sums across items.
template <class F>
void parallel_for(int64_t items, int64_t cost, const F& f) {
  if (items <= 0) return;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, cost));
  if (items <= grain) {
    f(int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, f);
}

// Parts to cut a sum over [0, items) into, from the shape alone: the same number of threads or another, the same
// parts, the same rounding. Sum each part by itself, then the parts in order. Part p is
// [part_begin(items, parts, p), part_begin(items, parts, p + 1)).
inline int64_t reduction_parts(int64_t items, int64_t cost, int64_t most) {
  return std::clamp<int64_t>(items * std::max<int64_t>(1, cost) / (4 * GRAIN), 1,
                             std::min(most, std::max<int64_t>(1, items)));
}

inline int64_t part_begin(int64_t items, int64_t parts, int64_t part) {
  return items / parts * part + std::min(part, items % parts);
}

}  // namespace trady
