#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "elements.h"
#include "launch.h"
#include "layout.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace trady {
namespace {

constexpr int THREADS = 128;

// Of one value an output each; null where there is none. A mean of null: no shift is wanted.
struct Norm {
  const float *bias, *weight, *norm_bias, *mean, *variance;
  float eps;
};

// A block an output: its scale, its shift, and its row of the weight.
template <class T>
__global__ void __launch_bounds__(THREADS)
    fold_rows(const float* __restrict__ weight, T* __restrict__ scaled, float* __restrict__ scales,
              float* __restrict__ shifts, Norm norm, int64_t length) {
  const int64_t output = blockIdx.x;
  float scale = rsqrtf(norm.variance[output] + norm.eps);
  if (norm.weight) scale *= norm.weight[output];
  if (threadIdx.x == 0) {
    scales[output] = scale;
    if (norm.mean) {
      const float mean = norm.bias ? norm.mean[output] - norm.bias[output] : norm.mean[output];
      shifts[output] = norm.norm_bias ? norm.norm_bias[output] - mean * scale : -mean * scale;
    }
  }
  weight += output * length;
  scaled += output * length;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < length; i += THREADS) scaled[i] = static_cast<T>(weight[i] * scale);
}

// ---- host ---------------------------------------------------------------------------------------------------

Tensor empty_strided_like(const Tensor& tensor, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  const std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  const std::vector<int64_t> strides(tensor.strides().begin(), tensor.strides().end());
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(tensor.dim(), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               tensor.get_device_index(), &result));
  return Tensor(result);
}

std::tuple<Tensor, Tensor, Tensor> fold_norm(const Tensor& weight, const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& norm_weight,
                                             const std::optional<Tensor>& norm_bias,
                                             const std::optional<Tensor>& running_mean, const Tensor& running_var,
                                             double eps, ScalarType dtype) {
  const OnDeviceOf device(weight);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight: expected float32");
  STD_TORCH_CHECK(is_dense(weight) && (weight.numel() == 0 || weight.stride(0) * weight.size(0) == weight.numel() ||
                                       weight.size(0) == 1),
                  "weight: expected each output's values side by side");
  const int64_t outputs = weight.size(0), length = outputs ? weight.numel() / outputs : 0;
  std::vector<Tensor> dense;  // keeps what it had to copy
  dense.reserve(5);
  const auto values = [&](const Tensor& tensor, const char* name) {
    check_device_of(weight, tensor, name);
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == outputs, name,
                    ": expected a float32 value for each of ", outputs, " outputs");
    dense.push_back(torch::stable::contiguous(tensor));
    return static_cast<const float*>(dense.back().const_data_ptr());
  };
  const auto values_of = [&](const std::optional<Tensor>& tensor, const char* name) {
    return tensor ? values(*tensor, name) : nullptr;
  };
  const Norm norm{values_of(bias, "bias"),
                  values_of(norm_weight, "norm_weight"),
                  values_of(norm_bias, "norm_bias"),
                  values_of(running_mean, "running_mean"),
                  values(running_var, "running_var"),
                  static_cast<float>(eps)};
  Tensor scaled = empty_strided_like(weight, dtype);
  Tensor scale = new_empty(weight, {outputs}, ScalarType::Float);
  Tensor shift = new_empty(weight, {running_mean ? outputs : 0}, ScalarType::Float);
  for_floating_type(scaled, "dtype", [&]<class T>() {
    if (outputs == 0) return;
    launch(fold_rows<T>, dim3(static_cast<unsigned>(outputs)), THREADS, device.stream,
           static_cast<const float*>(weight.const_data_ptr()), static_cast<T*>(scaled.mutable_data_ptr()),
           static_cast<float*>(scale.mutable_data_ptr()), static_cast<float*>(shift.mutable_data_ptr()), norm, length);
  });
  return {scaled, scale, shift};
}

}  // namespace
}  // namespace trady

STABLE_TORCH_LIBRARY_IMPL(TRADY_LIBRARY, TRADY_DISPATCH_KEY, m) { m.impl("fold_norm", TORCH_BOX(&trady::fold_norm)); }
