// The exchange of routing between ranks: each rank stores the routing of its tokens (2 bytes an entry) and their
// weights (4 bytes) to every rank, a chunk of tokens at a time, and a flag behind each chunk. layout.cu says what is
// made of it, and why loops are not unrolled.
#pragma once

#include "communicator.cuh"

namespace ep_moe {

// What a rank's tokens want.
struct LocalRouting {
  const int64_t* topk_idx;    // [tokens][top_k], global expert or -1
  const float* topk_weights;  // [tokens][top_k], or nullptr
  uint8_t* owners;            // out [tokens]: bit r says that rank r has an expert of this token
  int32_t tokens;
  int32_t top_k;
  int32_t num_experts;
};

// The chunks of every rank's tokens that a block takes care of.
struct Share {
  int first_chunk;
  int end_chunk;
};

__device__ inline Share my_chunks(const Communicator& comm) {
  const int chunks = comm.shape.max_tokens / kChunkTokens;
  const int each = (chunks + gridDim.x - 1) / gridDim.x;
  const int first = min(static_cast<int>(blockIdx.x) * each, chunks);
  return {first, min(first + each, chunks)};
}

// All threads of a block: the routing of its share to all ranks.
__device__ inline void send_routing(const Communicator& comm, const LocalRouting& local, Share share, uint32_t round) {
  const int ranks = comm.shape.ranks, top_k = local.top_k, copy = round % 2;
  const int stride = routing_stride(comm.shape.max_top_k);
  const float ranks_per_expert = 1.0f / static_cast<float>(local.num_experts / ranks);
  const int first = share.first_chunk * kChunkTokens;
  const int end = min(share.end_chunk * kChunkTokens, min(local.tokens, comm.shape.max_tokens));
  const int64_t table = (static_cast<int64_t>(copy) * ranks + comm.rank) * comm.shape.max_tokens;
  const int entries = local.topk_weights == nullptr ? 0 : max(end - first, 0) * top_k;
  const float* weights = local.topk_weights + static_cast<int64_t>(first) * top_k;
  float weight = threadIdx.x < entries ? weights[threadIdx.x] : 0.0f;  // under way while routing is sent
#pragma unroll 1
  for (int token = first + threadIdx.x; token < end; token += blockDim.x) {
    uint32_t owners = 0;
    int64_t bad = -1;
#pragma unroll 1
    for (int base = 0; base < top_k; base += 8) {
      int64_t experts[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)  // all loads before the first use
        experts[i] = base + i < top_k ? local.topk_idx[static_cast<int64_t>(token) * top_k + base + i] : -1;
      __align__(16) uint16_t packed[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int expert = static_cast<int>(experts[i]);
        const bool routed = experts[i] >= 0 && experts[i] < local.num_experts;
        if (!routed && experts[i] != -1) bad = experts[i];
        packed[i] = routed ? static_cast<uint16_t>(expert) : kNotRouted;
        // A division: exact, because of at most kMaxExperts experts.
        if (routed) owners |= 1u << static_cast<uint32_t>((expert + 0.5f) * ranks_per_expert);
      }
      const uint4 value = *reinterpret_cast<const uint4*>(packed);
#pragma unroll 1
      for (int peer = 0; peer < ranks; ++peer)
        *reinterpret_cast<uint4*>(part<uint16_t>(comm, peer, comm.layout.routing) + (table + token) * stride + base) =
            value;
    }
    if (bad != -1) report_fault(comm, Fault::kExpertRange, Step::kRouting, comm.rank, round, bad, local.num_experts);
    local.owners[token] = static_cast<uint8_t>(owners);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    if (i != threadIdx.x) weight = weights[i];
    const int token = first + i / top_k, k = i % top_k;
#pragma unroll 1
    for (int peer = 0; peer < ranks; ++peer)
      part<float>(comm, peer, comm.layout.weights)[(table + token) * comm.shape.max_top_k + k] = weight;
  }
  __syncthreads();  // all routing of the share is written before its flags are released
  const int share_chunks = share.end_chunk - share.first_chunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < share_chunks * ranks; i += blockDim.x) {
    const int chunk = share.first_chunk + i / ranks, peer = i % ranks;
    const int chunks = comm.shape.max_tokens / kChunkTokens;
    uint64_t* flag = part<uint64_t>(comm, peer, comm.layout.chunk_flags) +
                     (static_cast<int64_t>(copy) * ranks + comm.rank) * chunks + chunk;
    st_release_sys(flag, static_cast<uint64_t>(round) << 32 | local.tokens);  // pairs with wait_chunk
  }
}

// Tokens of a peer once the routing of its chunk is here; 0 if the wait fails.
__device__ inline int wait_chunk(const Communicator& comm, int source, int chunk, uint32_t round) {
  const int chunks = comm.shape.max_tokens / kChunkTokens;
  const uint64_t* flag = part<uint64_t>(comm, comm.rank, comm.layout.chunk_flags) +
                         (static_cast<int64_t>(round % 2) * comm.shape.ranks + source) * chunks + chunk;
  uint64_t value = 0;
  const bool here = wait_bounded(comm, Step::kRouting, source, round, [&] {
    value = ld_acquire_sys(flag);  // pairs with the release in send_routing
    return static_cast<uint32_t>(value >> 32) == round;
  });
  return here ? static_cast<int>(value & 0xffffffff) : 0;
}

}  // namespace ep_moe
