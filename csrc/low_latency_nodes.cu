// Low-latency dispatch and combine between "nodes" that are GPUs of one host: puts are stores to mapped memory.
#include "low_latency_combine.cuh"
#include "low_latency_dispatch.cuh"

namespace ep_moe {
namespace {

struct Loopback {
  static __device__ void put(const LowLatency& ll, int rank, int64_t from, int64_t to, int bytes) {
    const uint32_t* source = reinterpret_cast<const uint32_t*>(own_buffer(ll) + from);
    uint32_t* target = reinterpret_cast<uint32_t*>(ll.nodes->buffers[rank] + to);
    for (int i = threadIdx.x % 32; i < bytes / 4; i += 32) st_volatile(target + i, ld_volatile(source + i));
  }

  static __device__ void put_word(const LowLatency& ll, int rank, int64_t to, uint32_t value) {
    st_volatile(reinterpret_cast<uint32_t*>(ll.nodes->buffers[rank] + to), value);
  }
};

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_low_latency_nodes_dispatch(const ep_moe::LowLatencyDispatchArgs* args,
                                                         cudaStream_t stream) {
  return ep_moe::launch_low_latency_dispatch<ep_moe::BetweenNodes<ep_moe::Loopback>>(*args, stream);
}

EP_MOE_API const char* ep_moe_low_latency_nodes_combine(const ep_moe::LowLatencyCombineArgs* args,
                                                        cudaStream_t stream) {
  return ep_moe::launch_low_latency_combine<ep_moe::BetweenNodes<ep_moe::Loopback>>(*args, stream);
}

EP_MOE_API void ep_moe_low_latency_staging(const ep_moe::LowLatencyShape* shape, ep_moe::LowLatencyStaging* staging) {
  *staging = ep_moe::low_latency_staging(*shape);
}
