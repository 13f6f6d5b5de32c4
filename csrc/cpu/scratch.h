// Memory for intermediate values, one block a thread, kept between calls. Only for <operator>.cpp.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace trady {

// At least `bytes`, 64-byte aligned, its values unspecified; the same block at the next call on this thread.
inline void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> block;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = (bytes + 63) / 64 * 64;
    block.reset(std::aligned_alloc(64, size));
  }
  return block.get();
}

}  // namespace trady
