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

// The ranks that have one of a token's experts, from what it was sent as.
__device__ inline uint32_t owners_of(const uint16_t* routing, int top_k, float ranks_per_expert) {
  uint32_t owners = 0;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    const uint16_t expert = routing[k];
    // A division: exact, because of at most kMaxExperts experts.
    if (expert != kNotRouted) owners |= 1u << static_cast<uint32_t>((expert + 0.5f) * ranks_per_expert);
  }
  return owners;
}

// One entry of a token.
struct SentEntry {
  int64_t expert;
  float weight;
};

// The entries that a block sends: those of its share that this rank has and that there is room for.
struct SentShare {
  int first_token;
  int end_token;
  int64_t start;  // of the entries in tables of this rank
  int entries;

  __device__ SentShare(const Communicator& comm, const LocalRouting& local, Share share)
      : first_token(share.first_chunk * kChunkTokens),
        end_token(min(share.end_chunk * kChunkTokens, min(local.tokens, comm.shape.max_tokens))),
        start(static_cast<int64_t>(first_token) * local.top_k),
        entries(max(end_token - first_token, 0) * local.top_k) {}

  __device__ SentEntry entry(const LocalRouting& local, int i) const {
    if (i >= entries) return {-1, 0.0f};
    return {local.topk_idx[start + i], local.topk_weights == nullptr ? 0.0f : local.topk_weights[start + i]};
  }
};

// All threads of a block: the routing of its share to all ranks. `entry` is the first one of each thread, number
// threadIdx.x, loaded before the call so that the caller can do something else meanwhile. Orders what the block did
// before the call as __syncthreads does.
//
// A thread sends one entry and its weight at a time: one load from cold memory, few instructions and a store to each
// rank lie between the start and the flags. What peers do not wait for, owners and faults, comes behind these.
__device__ inline void send_routing(const Communicator& comm, const LocalRouting& local, Share share, SentShare sent,
                                    SentEntry entry, uint32_t round) {
  const int ranks = comm.shape.ranks, copy = round % 2;
  const int first = sent.first_token, entries = sent.entries;
  const uint32_t top_k = local.top_k;
  const int64_t table = (static_cast<int64_t>(copy) * ranks + comm.rank) * comm.shape.max_tokens + first;
  const int64_t routing = comm.layout.routing + table * routing_stride(comm.shape.max_top_k) * sizeof(uint16_t);
  const int64_t weights = comm.layout.weights + table * comm.shape.max_top_k * sizeof(float);
  int64_t bad = -1;
#pragma unroll 1
  for (int i = threadIdx.x; i < entries; i += blockDim.x) {
    if (i != threadIdx.x) entry = sent.entry(local, i);
    const bool routed = entry.expert >= 0 && entry.expert < local.num_experts;
    if (!routed && entry.expert != -1) bad = entry.expert;
    const uint16_t value = routed ? static_cast<uint16_t>(entry.expert) : kNotRouted;
    const uint32_t token = i / top_k, k = i - token * top_k;
    const uint32_t place = token * routing_stride(comm.shape.max_top_k) + k;
    const uint32_t weight_place = token * comm.shape.max_top_k + k;
#pragma unroll 1
    for (int peer = 0; peer < ranks; ++peer) {
      part<uint16_t>(comm, peer, routing)[place] = value;
      if (local.topk_weights != nullptr) part<float>(comm, peer, weights)[weight_place] = entry.weight;
    }
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
  if (bad != -1) report_fault(comm, Fault::kExpertRange, Step::kRouting, comm.rank, round, bad, local.num_experts);
  // By the last threads: the first ones release flags, which takes them some time.
  const float ranks_per_expert = 1.0f / static_cast<float>(local.num_experts / ranks);
#pragma unroll 1
  for (int token = first + blockDim.x - 1 - threadIdx.x; token < sent.end_token; token += blockDim.x) {
    const uint16_t* experts =
        part<uint16_t>(comm, comm.rank, routing) + (token - first) * routing_stride(comm.shape.max_top_k);
    local.owners[token] = static_cast<uint8_t>(owners_of(experts, top_k, ranks_per_expert));
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
