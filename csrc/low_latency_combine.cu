// Low-latency combine between GPUs of one host, and the buffer of both kernels.
#include "low_latency_combine.cuh"

EP_MOE_API const char* ep_moe_low_latency_combine(const ep_moe::LowLatencyCombineArgs* args, cudaStream_t stream) {
  return ep_moe::launch_low_latency_combine<ep_moe::OneHost>(*args, stream);
}

EP_MOE_API size_t ep_moe_low_latency_combine_args_bytes() { return sizeof(ep_moe::LowLatencyCombineArgs); }

EP_MOE_API void ep_moe_low_latency_layout(const ep_moe::LowLatencyShape* shape, ep_moe::LowLatencyLayout* layout) {
  *layout = ep_moe::low_latency_layout(*shape);
}
