// Low-latency dispatch between GPUs of one host.
#include "low_latency_dispatch.cuh"

EP_MOE_API const char* ep_moe_low_latency_dispatch(const ep_moe::LowLatencyDispatchArgs* args, cudaStream_t stream) {
  return ep_moe::launch_low_latency_dispatch<ep_moe::OneHost>(*args, stream);
}

EP_MOE_API size_t ep_moe_low_latency_dispatch_args_bytes() { return sizeof(ep_moe::LowLatencyDispatchArgs); }
