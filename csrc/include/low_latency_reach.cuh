// How what a rank writes reaches another one, in low-latency mode: by stores, or through the network by puts.
//
// A rank of the same node is written to where its buffer is mapped. For a rank of another node the same words go to a
// staging place in this rank's own symmetric memory, and from there, by a put, to the landing place that a store would
// have written. That is one hop: every rank puts to every rank.
//
// Why no signal and no fence follows a put. Every 4-byte word is its own flag (low_latency.cuh): who waits for a word
// waits for no other, so the words of a put may become visible in any order, and puts may overtake one another. What is
// assumed of the network: an aligned word becomes visible whole, once a put has been made it lands without help from
// its kernel, and it does not land again after its words have been read (a reliable connection drops duplicates). The
// fence before a put is for the staging place alone: what the network card reads was written by all threads.
//
// Why a staging place is free when it is written again. A put holds no word but those that its reader waits for and
// takes in this round. S(n + 4) of this rank follows its R(n + 2), which heard from S(n + 2) of every peer, which
// follows their S(n) and R(n), in which they read all words that this rank's S(n) put to them: those puts have landed
// whole, and have read their staging place. It is the chain that frees landing places, seen from the writer; hence as
// many staging buffers as landing buffers, and a kernel that ends need not wait for its puts.
//
// A rank that has been masked breaks this chain: a put made before may land until the network gives up on the rank,
// with words of later rounds. Let a rank take part again only when nothing is under way to it any more.
//
//   staged, for other nodes      written by                       put by            of
//   routing[n % 4], each peer    the block of the peer            its first warp    all tokens
//   rows[n % 4], each token      the block that sends the token   a warp a peer     one token, once for all peers
//   sums[n % 4], each peer       the block that sends the sum     its first warp    one token
//   weights[n % 4], each peer    the first warp of a block        this warp         one token
//
// What a put is, the template argument `Put` says:
//   put(ll, rank, from, to, bytes)   all threads of a warp; bytes at offset `from` of this rank's buffer go to offset
//                                    `to` of the rank's; multiples of 4
//   put_word(ll, rank, to, value)    one thread; 4 bytes
#pragma once

#include "low_latency.cuh"

namespace ep_moe {

constexpr int kMaxNodeRanks = 32;  // of a group that spans nodes: masks have 32 bits

// Offsets in the symmetric buffer, behind the landing places.
struct LowLatencyStaging {
  int64_t routing;  // uint16 [4][ranks][max_tokens][top_k rounded up to 8]
  int64_t rows;     // [4][max_tokens] dispatched rows
  int64_t sums;     // bf16 [4][ranks][max_tokens][hidden]
  int64_t weights;  // float [4][ranks][max_tokens][max_top_k]
  int64_t total;    // bytes, with the landing places
};

inline LowLatencyStaging low_latency_staging(const LowLatencyShape& shape) {
  const int64_t tokens = static_cast<int64_t>(kLandingBuffers) * shape.max_tokens;
  int64_t end = low_latency_layout(shape).total;
  auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end = (end + bytes + 255) / 256 * 256;
    return start;
  };
  LowLatencyStaging staging;
  staging.routing = place(tokens * shape.ranks * routing_stride(shape.max_top_k) * 2);
  staging.rows = place(tokens * shape.row_bytes);
  staging.sums = place(tokens * shape.ranks * shape.hidden * 2);
  staging.weights = place(tokens * shape.ranks * shape.max_top_k * 4);
  staging.total = end;
  return staging;
}

// In local device memory: parameters of a kernel that are too many for the fast ones of one host.
struct LowLatencyNodes {
  uint8_t* buffers[kMaxNodeRanks];  // symmetric buffer of every rank, where it is mapped here
  LowLatencyStaging staging;
  uint32_t near;  // bit r: rank r is of this node, and written to by stores
  uint32_t reserved;
};

// All ranks are near.
struct OneHost {
  static constexpr bool kPuts = false;

  static __device__ __forceinline__ uint8_t* buffer(const LowLatency& ll, int rank) { return ll.buffers[rank]; }
  static __device__ __forceinline__ uint32_t near(const LowLatency&) { return ~0u; }
};

template <typename Put>
struct BetweenNodes : Put {
  static constexpr bool kPuts = true;

  static __device__ __forceinline__ uint8_t* buffer(const LowLatency& ll, int rank) { return ll.nodes->buffers[rank]; }
  static __device__ __forceinline__ uint32_t near(const LowLatency& ll) { return ll.nodes->near; }
};

// All threads of the block: what they have staged may be put by any of them.
__device__ __forceinline__ void finish_staging() {
  __threadfence_system();  // each thread's own words, before the network card reads them
  __syncthreads();
}

// Where in a buffer the place of (rank, token) is, in the copy of a part that `round` uses: landing places are the
// writer's, staging places the reader's.
__device__ __forceinline__ int64_t place_offset(const LowLatency& ll, int64_t offset, uint32_t round, int rank,
                                                int token, int bytes_per_token) {
  return offset + static_cast<int64_t>(place_number(ll, round, rank, token)) * bytes_per_token;
}

}  // namespace ep_moe
