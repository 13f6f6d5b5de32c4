#pragma once

#include <stdint.h>

#include "isa.h"

namespace trady {

// Sixteen neighbouring channels of which some are selected.
struct ChannelMask {
  int64_t first;
  uint32_t selected;  // bit i: channel first + i
  int32_t readable;   // of the sixteen, the rest is past the last channel
};

}  // namespace trady

// target[i * count + j] = source[i * step + offsets[j]] for i < rows, j < count, all in elements of `element_size`
// bytes (1, 2, 4, 8 or 16).
TRADY_DECLARE_KERNEL(void, gather_rows, const void* source, int64_t step, void* target, int64_t rows,
                     const int64_t* offsets, int64_t count, int element_size)

// The same for ascending channels, given as masks; whether there is such a kernel for this size of element.
TRADY_DECLARE_KERNEL(bool, gather_rows_by_mask, const void* source, int64_t step, void* target, int64_t rows,
                     const trady::ChannelMask* masks, int64_t mask_count, int element_size)

// target[i] = source[i] in another dtype, rounded as ATen rounds; neither may be the other's memory.
TRADY_DECLARE_KERNEL(void, convert, const void* source, trady::Dtype from, void* target, trady::Dtype to, int64_t count)

// Copies `count` planes of `bytes` each, plane i from source + offsets[i], one after another into target.
TRADY_DECLARE_KERNEL(void, copy_planes, const void* source, const int64_t* offsets, void* target, int64_t count,
                     int64_t bytes)
