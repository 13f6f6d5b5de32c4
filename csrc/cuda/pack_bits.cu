#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#include "elements.h"
#include "launch.h"
#include "layout.h"

using torch::stable::Tensor;

namespace trady {
namespace {

// Bit i is 1 where byte i of four is not 0.
__device__ unsigned bits_of(uint32_t bytes) {
  // The highest bit of each byte: its own, or carried there from the other seven.
  const uint32_t set = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  // 2^21 + 2^14 + 2^7 + 1 takes bits 7, 15, 23 and 31 to 28, 29, 30 and 31; no two products meet, so nothing carries.
  return set * 0x00204081u >> 28;
}

template <bool WHOLE, int TOGETHER>
__device__ void pack_vectors(int vector, const uint8_t* __restrict__ mask, uint8_t* __restrict__ bits, int64_t count) {
  constexpr int LENGTH = Vector<uint8_t>::LENGTH;
  Vector<uint8_t> vectors[TOGETHER];
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    const int64_t first = first_element<uint8_t>(vector + v);
    vectors[v] = load_vector<WHOLE>(mask + first, count - first);
  }
#pragma unroll
  for (int v = 0; v < TOGETHER; ++v) {
    uint32_t words[LENGTH / 4];
    memcpy(words, &vectors[v], sizeof(words));
    unsigned packed = 0;
#pragma unroll
    for (int w = 0; w < LENGTH / 4; ++w) packed |= bits_of(words[w]) << 4 * w;
    const int64_t first = first_element<uint8_t>(vector + v);
    store_bits<WHOLE, LENGTH>(bits, packed, first, count - first);
  }
}

__global__ void __launch_bounds__(ELEMENT_THREADS)
    pack_elements(const uint8_t* __restrict__ mask, uint8_t* __restrict__ bits, int64_t count, bool aligned) {
  if (is_whole<uint8_t>(count, aligned)) {
    pack_vectors<true, VECTORS>(0, mask, bits, count);
  } else {
#pragma unroll 1
    for (int v = 0; v < VECTORS; ++v) pack_vectors<false, 1>(v, mask, bits, count);
  }
}

Tensor pack_bits(const Tensor& mask) {
  const OnDeviceOf device(mask);
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool, "mask: got ",
                  torch::headeronly::toString(mask.scalar_type()), ", expected bool");
  Tensor dense = mask;
  if (!is_dense(mask)) {
    // The order of the bits is that of this copy's memory, which only torch knows how to fill from any strides.
    dense = torch::stable::empty_like(mask);
    torch::stable::copy_(dense, mask);
  }
  Tensor bits = empty_bits(mask);
  const int64_t count = mask.numel();
  if (count == 0) return bits;
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  launch(pack_elements, blocks_for<uint8_t>(count), ELEMENT_THREADS, device.stream, from,
         static_cast<uint8_t*>(bits.mutable_data_ptr()), count, is_aligned(from));
  return bits;
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) { m.impl("pack_bits", TORCH_BOX(&trady::pack_bits)); }
