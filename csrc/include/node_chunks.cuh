// Tokens that nodes sent to the ranks of one of them: where they lie among a rank's tokens, and in which order kernels
// of the node go through them.
//
// Chunks of kChunkTokens tokens travel, and each has a place of its own: node n's tokens start at a multiple of that,
// and behind the last of them are places that are routed nowhere. Chunks of all nodes arrive beside each other, and
// their sums return so, which is why kernels visit them in turn: the q-th is chunk q / nodes of node q % nodes.
#pragma once

#include "buffer.cuh"

namespace ep_moe {

struct NodeChunks {
  const int32_t* first;  // [ranks][nodes + 1]: where each node's tokens start among a rank's, and the end of the last
  int32_t nodes;         // 0: tokens are the rank's own
  int32_t most;          // chunks that a node sent to a rank

  // Places in the order of visits.
  __device__ __forceinline__ int places() const { return nodes * most * kChunkTokens; }

  // The token of a rank that is visited at `place`, or -1.
  __device__ __forceinline__ int token(int rank, int place) const {
    const int chunk = place / kChunkTokens;
    const int32_t* start = first + rank * (nodes + 1) + chunk % nodes;
    const int token = start[0] + chunk / nodes * kChunkTokens + place % kChunkTokens;
    return token < start[1] ? token : -1;
  }

  // The node that sent a token, which must be a real one.
  __device__ __forceinline__ int node_of(int rank, int token) const {
    const int32_t* start = first + rank * (nodes + 1);
    int node = 0;
#pragma unroll 1
    while (token >= start[node + 1]) ++node;
    return node;
  }
};

}  // namespace ep_moe
