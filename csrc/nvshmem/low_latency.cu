// Low-latency dispatch and combine between nodes over NVSHMEM.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "low_latency_combine.cuh"
#include "low_latency_dispatch.cuh"

namespace ep_moe {
namespace {

// Puts need neither fence nor signal nor quiet: low_latency_reach.cuh says why. Where the GPU rings the network card
// itself, whoever reserved the last place of a queue rings for all before it.
struct NvshmemPut {
  static __device__ void put(const LowLatency& ll, int rank, int64_t from, int64_t to, int bytes) {
    nvshmemx_putmem_nbi_warp(own_buffer(ll) + to, own_buffer(ll) + from, bytes, rank);
  }

  static __device__ void put_word(const LowLatency& ll, int rank, int64_t to, uint32_t value) {
    nvshmem_uint32_p(reinterpret_cast<uint32_t*>(own_buffer(ll) + to), value, rank);
  }
};

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_low_latency_nodes_dispatch(const ep_moe::LowLatencyDispatchArgs* args,
                                                         cudaStream_t stream) {
  return ep_moe::launch_low_latency_dispatch<ep_moe::BetweenNodes<ep_moe::NvshmemPut>>(*args, stream);
}

EP_MOE_API const char* ep_moe_low_latency_nodes_combine(const ep_moe::LowLatencyCombineArgs* args,
                                                        cudaStream_t stream) {
  return ep_moe::launch_low_latency_combine<ep_moe::BetweenNodes<ep_moe::NvshmemPut>>(*args, stream);
}

EP_MOE_API size_t ep_moe_low_latency_dispatch_args_bytes() { return sizeof(ep_moe::LowLatencyDispatchArgs); }

EP_MOE_API size_t ep_moe_low_latency_combine_args_bytes() { return sizeof(ep_moe::LowLatencyCombineArgs); }

// Where the memory of a rank (nvshmem_malloc) is mapped here, or null.
EP_MOE_API void* ep_moe_nvshmem_pointer(const void* memory, int rank) { return nvshmem_ptr(memory, rank); }
