// Host side of an entry point: launching, and turning CUDA errors into text.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#define EP_MOE_API extern "C" __attribute__((visibility("default")))

namespace ep_moe {

// The text of an error, or nullptr. Valid until the thread's next call.
inline const char* error_text(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return nullptr;
  thread_local char text[256];
  std::snprintf(text, sizeof text, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
  cudaGetLastError();  // a launch error is sticky only until it is read
  return text;
}

constexpr int kSharedBytesUnasked = 32 * 1024;  // of 48 KB a block with what a kernel declares itself and 1 KB more

enum class LaunchMode {
  kPlain,
  kCooperative,   // all blocks resident, or an error
  kProgrammatic,  // may start before the kernel ahead of it has ended, for which it waits by griddepcontrol_wait
  kLeavesShared,  // SMs keep their shared memory for the kernel behind it: one that is set up otherwise takes no block
                  // that wants more before all others have left
};

// Launches `kernel(args)`; an error if there is no kernel.
template <typename Args>
const char* launch(const char* what, void (*kernel)(Args), const Args& args, int blocks, int threads, int shared_bytes,
                   LaunchMode mode, cudaStream_t stream) {
  if (kernel == nullptr) return error_text(cudaErrorInvalidValue, what);
  if (shared_bytes > kSharedBytesUnasked) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error_text(error, what);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (mode == LaunchMode::kCooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else if (mode == LaunchMode::kLeavesShared) {
#if CUDART_VERSION >= 12050  // older ones launch without: only the overlap is lost
    attribute.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attribute.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
#endif
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = mode == LaunchMode::kPlain ? 0 : 1;
  return error_text(cudaLaunchKernelEx(&config, kernel, args), what);
}

}  // namespace ep_moe
