// Stands in for torch's own header, whose guards need an accelerator.
#pragma once

#include <cstdint>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator
