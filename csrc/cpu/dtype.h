// torch's dtypes as the kernels see them. Only for <operator>.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "isa.h"

namespace trady {

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::float32;
    case torch::headeronly::ScalarType::Double:
      return Dtype::float64;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::bfloat16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, argument, ": got dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      ", expected float32, float64, bfloat16 or float16");
  }
}

// The dtype that sums over elements of `tensor` are taken and returned in.
inline torch::headeronly::ScalarType accumulate_type(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Double ? torch::headeronly::ScalarType::Double
                                                                       : torch::headeronly::ScalarType::Float;
}

}  // namespace trady
