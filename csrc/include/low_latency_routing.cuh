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
  bool own;  // every thread has one place, its own number, which fits `mine`
  uint4 mine;

  __device__ bool has(int place, uint32_t tagged_expert) const {
    const uint32_t both = tagged_expert | tagged_expert << 16;
    if (own) return has_entry(mine, both);
    const uint4* pieces = reinterpret_cast<const uint4*>(entries + static_cast<int64_t>(place) * stride);
    bool found = false;
    for (int i = 0; i < stride / 8; ++i) found |= has_entry(pieces[i], both);
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
  uint4 last = make_uint4(~0u, ~0u, ~0u, ~0u);
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
    last = value;
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
  const bool own = pieces == 1 && ll.shape.ranks * of_rank <= blockDim.x;
  return {reinterpret_cast<const uint16_t*>(table), routing_stride(ll.shape.max_top_k), own, last};
}

// Which places have an expert, a bit each, 32 to a word; whole after a barrier. All threads.
__device__ inline void mark_places(const LowLatency& ll, const RoutingTable& table, int expert, uint32_t round,
                                   uint32_t* marks) {
  const int places = ll.shape.ranks * ll.shape.max_tokens;
  const uint32_t wanted = tagged(ll.rank * ll.shape.experts_per_rank + expert, round);
  for (int first = threadIdx.x / 32 * 32; first < places; first += blockDim.x) {
    const int i = first + threadIdx.x % 32;
    const uint32_t hits = __ballot_sync(~0u, i < places && table.has(i, wanted));
    if (threadIdx.x % 32 == 0) marks[first / 32] = hits;
  }
}

// One warp: an expert's rows, by source rank, from its marks. A lane counts a rank.
__device__ inline void count_expert(const LowLatencyDispatchArgs& args, int expert, const uint32_t* marks) {
  const LowLatency& ll = args.ll;
  const int ranks = ll.shape.ranks, rank = threadIdx.x % 32;
  const int begin = rank * ll.shape.max_tokens, end = begin + ll.shape.max_tokens;
  int count = 0;
  for (int word = begin / 32; rank < ranks && word * 32 < end; ++word) {
    uint32_t bits = marks[word];
    if (word * 32 < begin) bits &= ~0u << (begin % 32);
    if (word * 32 + 32 > end) bits &= (1u << (end % 32)) - 1;
    count += __popc(bits);
  }
  int sum = count;
#pragma unroll 1
  for (int distance = 1; distance < ranks; distance *= 2) {
    const int below = __shfl_up_sync(~0u, sum, distance);
    if (rank >= distance) sum += below;
  }
  if (rank >= ranks) return;
  args.ranges[static_cast<int64_t>(expert) * ranks + rank] = static_cast<int64_t>(sum - count) << 32 | count;
  if (rank != ranks - 1) return;
  args.counts[expert] = sum;
  if (args.received != nullptr) atomicAdd(&args.received[expert], sum);
}

// The rows of experts, behind the block's own rows, which are more urgent; the last blocks begin, which most often have
// none. All threads; `marks` in shared memory.
__device__ inline void count_experts(const LowLatencyDispatchArgs& args, const RoutingTable& table, uint32_t round,
                                     uint32_t* marks) {
  const int local_experts = args.ll.shape.experts_per_rank;
  for (int expert = gridDim.x - 1 - blockIdx.x; expert < local_experts; expert += gridDim.x) {
    mark_places(args.ll, table, expert, round, marks);
    __syncthreads();
    if (threadIdx.x / 32 == blockDim.x / 32 - 1) count_expert(args, expert, marks);
    if (expert + gridDim.x < local_experts) __syncthreads();  // before the marks are overwritten
  }
}

// All threads: for every lane with an expert, how many tokens before `place` have it too. Each warp counts its own, and
// warps that have none leave no trace. `partial` is rewritten by the call after next only.
__device__ inline int count_before(const LowLatencyDispatchArgs& args, const RoutingTable& table, int place, int expert,
                                   uint32_t round, int (&partial)[kMaxThreads / 32][kMaxTopK]) {
  const int first_expert = args.ll.rank * args.ll.shape.experts_per_rank;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (uint32_t left = warp * 32 < place ? __ballot_sync(~0u, expert >= 0) : 0; left != 0; left &= left - 1) {
    const int k = __ffs(left) - 1;
    const uint32_t same = tagged(first_expert + __shfl_sync(~0u, expert, k), round);
    int count = 0;
    for (int i = threadIdx.x; i < place; i += blockDim.x) count += table.has(i, same);
    count = __reduce_add_sync(~0u, count);
    if (lane == 0) partial[warp][k] = count;
  }
  __syncthreads();
  int before = 0;
  if (expert >= 0)
#pragma unroll
    for (int w = 0; w < kMaxThreads / 32; ++w)
      if (w * 32 < min(static_cast<int>(blockDim.x), place)) before += partial[w][lane];
  return before;
}

}  // namespace ep_moe
