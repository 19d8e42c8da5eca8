// The hop between "nodes" that are GPUs of one host: puts are stores to mapped memory.
#include "node_exchange.cuh"

namespace ep_moe {
namespace {

struct Loopback {
  static __device__ void put(const NodeExchangeArgs& args, int node, int64_t from, int64_t to, int bytes, int64_t flag,
                             uint64_t value) {
    const uint8_t* source = node_memory<const uint8_t>(args, args.node, from);
    uint8_t* target = node_memory<uint8_t>(args, node, to);
    copy_bytes<uint4, kNodeThreads>(source, target, bytes, threadIdx.x);
    __syncthreads();
    if (threadIdx.x == 0) signal(args, node, flag, value);
  }

  static __device__ void signal(const NodeExchangeArgs& args, int node, int64_t flag, uint64_t value) {
    __threadfence_system();  // what other threads of the block did before the barrier
    st_release_sys(node_memory<uint64_t>(args, node, flag), value);
  }

  static __device__ uint64_t fetch(uint64_t* word) { return ld_acquire_sys(word); }
};

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_node_exchange(const ep_moe::NodeExchangeArgs* args, cudaStream_t stream) {
  return ep_moe::launch_node_exchange<ep_moe::Loopback>(*args, stream);
}

EP_MOE_API size_t ep_moe_node_exchange_args_bytes() { return sizeof(ep_moe::NodeExchangeArgs); }
