// Routing in low-latency dispatch: every rank learns the experts of all tokens, and each block finds out by itself
// which slots its rows have.
//
// The slots of an expert are filled by source rank, then token. The slot of a token is the number of tokens before it
// that have the expert; every receiving block counts them in the routing table, so nothing is handed out by atomics.
#pragma once

#include <cuda_bf16.h>

#include "low_latency_reach.cuh"

namespace ep_moe {

struct LowLatencyDispatchArgs {
  LowLatency ll;
  const __nv_bfloat16* x;     // [tokens][hidden]
  const int64_t* topk_idx;    // [tokens][top_k], global expert or -1
  const float* topk_weights;  // [tokens][top_k]; nullptr if there are none
  uint8_t* rows;              // out [local_experts][ranks * max_tokens][hidden], of bf16 or e4m3
  void* scales;           // out, of e4m3 rows: float [...][hidden / 128], or uint8 [...][hidden / 512 rounded up * 4]
  int32_t* counts;        // out [local_experts]: rows of each expert
  int64_t* ranges;        // out [local_experts][ranks]: first slot << 32 | rows, of each source rank
  int32_t* source_token;  // out [local_experts][ranks * max_tokens]
  int32_t* slots;         // out [ranks * max_tokens][top_k]: slot in [local_experts * ranks * max_tokens], or -1
  float* weights;         // out [ranks * max_tokens][top_k], of tokens that have a slot; nullptr if none travel
  uint32_t* round;        // of the handle: written by S, read by R
  int32_t* received;      // [local_experts]: counts are added; or nullptr
  uint64_t* wait_ns;      // [ranks]: time waited for the routing of each rank is added; or nullptr
  int32_t tokens;
  int32_t top_k;
  int32_t scale_format;  // ScaleFormat
  int32_t table_bytes;   // of shared memory for the routing table; 0: read it where it landed
};

enum class ScaleFormat : int32_t { kNone = 0, kFloat32 = 1, kUe8m0 = 2 };

// Counts of the warps of a block, by share and number of the count; in shared memory.
constexpr int kMaxShareBits = 3;
struct Counts {
  int shares[1 << kMaxShareBits][kMaxNodeRanks];
};
static_assert(kMaxTopK <= kMaxNodeRanks, "counts are of ranks, or of experts of a token");

__device__ __forceinline__ uint32_t tagged(uint32_t expert, uint32_t round) {
  return (round << kExpertBits | expert) & 0xffff;
}

__device__ __forceinline__ int routing_bytes(const LowLatency& ll) { return routing_stride(ll.shape.max_top_k) * 2; }

// The expert of the lane's number, or -1.
__device__ __forceinline__ int64_t load_expert(const LowLatencyDispatchArgs& args, int token) {
  const int lane = threadIdx.x % 32;
  const bool given = token < args.tokens && lane < args.top_k;
  return given ? args.topk_idx[static_cast<int64_t>(token) * args.top_k + lane] : -1;
}

// All ranks of the node learn the experts of a token, one `given` to each lane; of one that does not exist, that it has
// none. Returns its owners, of all nodes, to all threads.
template <typename Reach>
__device__ uint32_t send_routing(const LowLatencyDispatchArgs& args, int token, int64_t given, uint32_t round,
                                 uint32_t present) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32;
  if (given < -1 || given >= ll.shape.num_experts) {
    report_fault(ll.report, &ll.workspace->reported, Fault::kExpertRange, Step::kRouting, ll.rank, round, given,
                 ll.shape.num_experts);
    given = -1;
  }
  const int expert = static_cast<int>(given);
  if (threadIdx.x < 32) {
    // Lane i writes to rank i, 8 entries at a time.
    const uint32_t entry = tagged(expert < 0 ? kNoExpert : expert, round);
    const bool writes = lane < ll.shape.ranks && (present & Reach::near(ll)) >> lane & 1;
    uint8_t* buffer = Reach::buffer(ll, writes ? lane : ll.rank);
    uint4* place = landing_place<uint4>(ll, buffer, ll.layout.routing, round, ll.rank, token, routing_bytes(ll));
#pragma unroll 1
    for (int piece = 0; piece < routing_bytes(ll) / 16; ++piece) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int first = 8 * piece + 2 * w;
        words[w] = __shfl_sync(~0u, entry, first) | __shfl_sync(~0u, entry, first + 1) << 16;
      }
      if (writes) st_volatile(place + piece, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
  return __reduce_or_sync(~0u, expert < 0 ? 0u : 1u << rank_of(ll, expert)) & present;
}

// Ranks of other nodes learn the experts of all tokens at once: a put a rank, by the last blocks, which most often have
// no tokens. All threads.
template <typename Reach>
__device__ void put_routing(const LowLatencyDispatchArgs& args, uint32_t round, uint32_t present) {
  const LowLatency& ll = args.ll;
  const uint32_t far = present & ~Reach::near(ll);
  const int words = routing_bytes(ll) / 4;  // of a token
  for (int peer = gridDim.x - 1 - blockIdx.x; peer < ll.shape.ranks; peer += gridDim.x) {
    if ((far >> peer & 1) == 0) continue;
    const int64_t from = place_offset(ll, ll.nodes->staging.routing, round, peer, 0, routing_bytes(ll));
    uint32_t* staged = reinterpret_cast<uint32_t*>(own_buffer(ll) + from);
    for (int i = threadIdx.x; i < ll.shape.max_tokens * words; i += blockDim.x) {
      const int token = i / words;
      uint32_t word = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = i % words * 2 + half;
        int64_t expert = -1;
        if (token < args.tokens && k < args.top_k) expert = args.topk_idx[static_cast<int64_t>(token) * args.top_k + k];
        const bool valid = expert >= 0 && expert < ll.shape.num_experts;
        word |= tagged(valid ? static_cast<uint32_t>(expert) : kNoExpert, round) << 16 * half;
      }
      staged[i] = word;
    }
    finish_staging();
    if (threadIdx.x < 32) {
      const int64_t to = place_offset(ll, ll.layout.routing, round, ll.rank, 0, routing_bytes(ll));
      Reach::put(ll, peer, from, to, ll.shape.max_tokens * routing_bytes(ll));
    }
  }
}

// Not 0 if half of the word is 0: subtracting 1 from both halves turns a highest bit on that was off.
__device__ __forceinline__ uint32_t zero_half(uint32_t word) { return (word - 0x00010001) & ~word & 0x80008000; }

__device__ __forceinline__ bool has_entry(uint4 entries, uint32_t both) {
  return (zero_half(entries.x ^ both) | zero_half(entries.y ^ both) | zero_half(entries.z ^ both) |
          zero_half(entries.w ^ both)) != 0;
}

// The routing of all ranks' tokens, tagged: in shared memory, or where it landed.
struct RoutingTable {
  const uint16_t* entries;  // [ranks * max_tokens][stride]
  int stride;

  // Whether a token has an expert; `both` is that twice, tagged.
  __device__ __forceinline__ bool has(int place, uint32_t both) const {
    const uint4* pieces = reinterpret_cast<const uint4*>(entries) + place * (stride / 8);
    bool found = has_entry(pieces[0], both);
#pragma unroll 1
    for (int i = 1; i < stride / 8; ++i) found |= has_entry(pieces[i], both);
    return found;
  }
};

// All threads wait until every rank's routing is here.
__device__ inline RoutingTable receive_routing(const LowLatencyDispatchArgs& args, uint32_t round, uint32_t present,
                                               uint4* shared_table) {
  const LowLatency& ll = args.ll;
  const int pieces = routing_bytes(ll) / 16, of_rank = ll.shape.max_tokens * pieces;
  uint4* landed = landing_place<uint4>(ll, own_buffer(ll), ll.layout.routing, round, 0, 0, routing_bytes(ll));
  const uint32_t tag = tagged(0, round) | tagged(0, round) << 16, mask = ~(kNoExpert | kNoExpert << 16);
  const uint64_t start = args.wait_ns != nullptr ? global_timer_ns() : 0;
  for (int i = threadIdx.x; i < ll.shape.ranks * of_rank; i += blockDim.x) {
    const RankAndRest place(i, of_rank);
    const int source = place.rank;
    uint4 value = make_uint4(~0u, ~0u, ~0u, ~0u);
    bool here = present >> source & 1;
    if (here)
      here = wait_for(ll, Step::kRouting, source, round, [&] {
        value = ld_volatile(landed + i);
        return ((value.x ^ tag) & mask) == 0 && ((value.y ^ tag) & mask) == 0 && ((value.z ^ tag) & mask) == 0 &&
               ((value.w ^ tag) & mask) == 0;
      });
    // Of a rank that takes no part, entries of another round: no expert has that tag.
    const uint32_t none = here ? 0 : tagged(kNoExpert, round + 1) * 0x10001u;
    if (!here) value = make_uint4(none, none, none, none);
    if (args.table_bytes > 0) {
      shared_table[i] = value;
    } else if (!here) {
      landed[i] = value;
    }
    if (args.wait_ns != nullptr && blockIdx.x == 0 && place.rest == of_rank - 1)
      atomicAdd(reinterpret_cast<unsigned long long*>(&args.wait_ns[source]), global_timer_ns() - start);
  }
  __syncthreads();
  const uint4* table = args.table_bytes > 0 ? shared_table : landed;
  return {reinterpret_cast<const uint16_t*>(table), routing_stride(ll.shape.max_top_k)};
}

// Up to 32 counts that the warps of a block share: each falls to 2^bits of them, as many as there are, which take turns
// at 32 places. A team is the warps of a count, and goes on to another one if there are more counts than teams.
struct Team {
  int bits;
  int number;  // of this warp's team; `teams` or more: none
  int teams;
  int share;  // which warp of its team

  __device__ __forceinline__ explicit Team(int counts) : bits(0) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    while (bits < kMaxShareBits && counts << (bits + 1) <= warps) ++bits;
    number = warp >> bits;
    teams = warps >> bits;
    share = warp & ((1 << bits) - 1);
  }

  // The warp's share of how many of the places from `begin` to `end` have an expert. All threads of a warp.
  __device__ __forceinline__ int count(const RoutingTable& table, int begin, int end, uint32_t tagged_expert) const {
    const uint32_t both = tagged_expert | tagged_expert << 16;
    int count = 0;
#pragma unroll 2
    for (int i = begin + 32 * share + threadIdx.x % 32; i < end; i += 32 << bits) count += table.has(i, both);
    return __reduce_add_sync(~0u, count);
  }

  // A count, of all its shares.
  __device__ __forceinline__ int sum(const Counts& counts, int which) const {
    int sum = 0;
#pragma unroll 1
    for (int s = 0; s < 1 << bits; ++s) sum += counts.shares[s][which];
    return sum;
  }
};

// One warp: an expert's rows, by source rank. A lane is a rank, with `count` of them.
__device__ inline void store_counts(const LowLatencyDispatchArgs& args, int expert, int count) {
  const int ranks = args.ll.shape.ranks, rank = threadIdx.x % 32;
  int sum = count;
#pragma unroll 1
  for (int distance = 1; distance < ranks; distance *= 2) {
    const int below = __shfl_up_sync(~0u, sum, distance);
    if (rank >= distance) sum += below;
  }
  if (rank >= ranks) return;
  args.ranges[expert * ranks + rank] = static_cast<int64_t>(sum - count) << 32 | count;
  if (rank != ranks - 1) return;
  args.counts[expert] = sum;
  if (args.received != nullptr) atomicAdd(&args.received[expert], sum);
}

// The first expert whose rows the block counts: blocks of the last tokens of all ranks begin, for the first ones most
// often have rows of their own.
__device__ __forceinline__ int first_counted(const LowLatency& ll) {
  if (gridDim.x != ll.shape.ranks * ll.shape.max_tokens) return gridDim.x - 1 - blockIdx.x;
  const RankAndRest token(blockIdx.x, ll.shape.max_tokens);
  return (ll.shape.max_tokens - 1 - token.rest) * ll.shape.ranks + token.rank;
}

// The rows of experts. All threads; leaves counts[1] in use, counts[0] free.
__device__ inline void count_experts(const LowLatencyDispatchArgs& args, const RoutingTable& table, uint32_t round,
                                     Counts (&counts)[2]) {
  const LowLatency& ll = args.ll;
  const int ranks = ll.shape.ranks, tokens = ll.shape.max_tokens, lane = threadIdx.x % 32;
  for (int expert = first_counted(ll); expert < ll.shape.experts_per_rank; expert += gridDim.x) {
    const Team team(ranks);
    const uint32_t wanted = tagged(ll.rank * ll.shape.experts_per_rank + expert, round);
    for (int rank = team.number; rank < ranks && team.number < team.teams; rank += team.teams) {
      const int count = team.count(table, rank * tokens, (rank + 1) * tokens, wanted);
      if (lane == 0) counts[1].shares[team.share][rank] = count;
    }
    __syncthreads();
    if (threadIdx.x / 32 == blockDim.x / 32 - 1)
      store_counts(args, expert, lane < ranks ? team.sum(counts[1], lane) : 0);
    if (expert + gridDim.x < ll.shape.experts_per_rank) __syncthreads();  // before the counts are overwritten
  }
}

// All threads: for every lane with an expert, how many tokens before `place` have it too. `counts` is rewritten by the
// call after next only.
__device__ inline int count_before(const LowLatencyDispatchArgs& args, const RoutingTable& table, int place, int expert,
                                   uint32_t round, Counts& counts) {
  const int first_expert = args.ll.rank * args.ll.shape.experts_per_rank, lane = threadIdx.x % 32;
  const uint32_t wanted = __ballot_sync(~0u, expert >= 0);
  const Team team(__popc(wanted));
  int until_next = team.number;  // counts of other teams
  for (uint32_t left = team.number < team.teams ? wanted : 0; left != 0; left &= left - 1) {
    if (until_next-- > 0) continue;
    until_next = team.teams - 1;
    const int k = __ffs(left) - 1;
    const int count = team.count(table, 0, place, tagged(first_expert + __shfl_sync(~0u, expert, k), round));
    if (lane == 0) counts.shares[team.share][k] = count;
  }
  __syncthreads();
  return expert >= 0 ? team.sum(counts, lane) : 0;
}

}  // namespace ep_moe
