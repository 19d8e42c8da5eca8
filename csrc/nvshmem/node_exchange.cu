// The second library, for several nodes: the exchange between nodes over NVSHMEM, and NVSHMEM's start and end.
//
// NVSHMEM ends the process where it meets no GPU, so callers look for one first. Its processing elements are the ranks
// of the expert-parallel group.
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstdio>

#include "node_exchange.cuh"

#ifndef EP_MOE_VERSION
#error "EP_MOE_VERSION is not defined: compile with csrc/build.py"
#endif

namespace ep_moe {
namespace {

struct Nvshmem {
  static __device__ void put(const NodeExchangeArgs& args, int node, int64_t from, int64_t to, int bytes, int64_t flag,
                             uint64_t value) {
    uint8_t* memory = args.memory[args.node];
    nvshmemx_putmem_signal_nbi_block(memory + to, memory + from, bytes, reinterpret_cast<uint64_t*>(memory + flag),
                                     value, NVSHMEM_SIGNAL_SET, args.ranks[node]);
  }

  static __device__ void signal(const NodeExchangeArgs& args, int node, int64_t flag, uint64_t value) {
    __threadfence_system();  // what other threads of the block read before the barrier
    nvshmemx_signal_op(node_memory<uint64_t>(args, args.node, flag), value, NVSHMEM_SIGNAL_SET, args.ranks[node]);
  }

  static __device__ uint64_t fetch(uint64_t* word) {
    const uint64_t value = nvshmem_signal_fetch(word);
    __threadfence_system();
    return value;
  }
};

const char* status_text(int status, const char* what) {
  if (status == 0) return nullptr;
  thread_local char text[128];
  std::snprintf(text, sizeof text, "%s failed with status %d; NVSHMEM_DEBUG=INFO says more", what, status);
  return text;
}

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_nvshmem_version() { return EP_MOE_VERSION; }

EP_MOE_API size_t ep_moe_nvshmem_id_bytes() { return sizeof(nvshmemx_uniqueid_t); }

// Fills `id` (ep_moe_nvshmem_id_bytes), which one rank passes to all others.
EP_MOE_API const char* ep_moe_nvshmem_new_id(void* id) {
  nvshmemx_uniqueid_t fresh = NVSHMEMX_UNIQUEID_INITIALIZER;
  const char* error = ep_moe::status_text(nvshmemx_get_uniqueid(&fresh), "nvshmemx_get_uniqueid");
  *static_cast<nvshmemx_uniqueid_t*>(id) = fresh;
  return error;
}

// Collective; the current device is the rank's.
EP_MOE_API const char* ep_moe_nvshmem_start(const void* id, int rank, int ranks) {
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  const auto* unique = static_cast<const nvshmemx_uniqueid_t*>(id);
  const int status = nvshmemx_set_attr_uniqueid_args(rank, ranks, unique, &attributes);
  if (status != 0) return ep_moe::status_text(status, "nvshmemx_set_attr_uniqueid_args");
  return ep_moe::status_text(nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes), "nvshmemx_init_attr");
}

// Symmetric memory, or null; collective, with the same size on all ranks.
EP_MOE_API void* ep_moe_nvshmem_allocate(size_t bytes) { return nvshmem_malloc(bytes); }

// Collective.
EP_MOE_API void ep_moe_nvshmem_free(void* memory) { nvshmem_free(memory); }

// Collective; all memory has been freed.
EP_MOE_API void ep_moe_nvshmem_end() { nvshmem_finalize(); }

EP_MOE_API const char* ep_moe_node_exchange(const ep_moe::NodeExchangeArgs* args, cudaStream_t stream) {
  return ep_moe::launch_node_exchange<ep_moe::Nvshmem>(*args, stream);
}

EP_MOE_API size_t ep_moe_node_exchange_args_bytes() { return sizeof(ep_moe::NodeExchangeArgs); }
