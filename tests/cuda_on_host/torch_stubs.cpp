// What a CPU build of torch lacks of the functions that csrc/cuda calls.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  if (error) std::abort();
  *message = nullptr;
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char*) {}
}
