// Low-latency mode: the landing buffers of a rank, and the protocol that both its kernels follow.
//
// A call of dispatch or of combine is a round of it. Dispatch and combine count rounds of their own and have buffers of
// their own; what follows holds for each. A round has two phases, which one kernel runs together or two kernels one
// after the other: in S(n) a rank sends to its peers, in R(n) it receives what they sent in their S(n).
//
// Data is its own flag. A word that a peer will write holds a value that data never has (kEmptyWord, kEmptyWeight; a
// sender replaces it by an equal one), and the thread that needs the word reads it until it has another. Words are of 4
// bytes; a 16-byte read is repeated until none of its words is empty. Routing entries carry the low bits of their round
// instead, so a table is here once all its entries are of this round, and is never cleared. No word needs another's
// arrival, so nothing is ordered by fences.
//
//   written by a peer in S(n)          read in R(n) by               emptied
//   routing[n % 4], all tokens         all blocks                    never: tagged with the round
//   rows[n % 4], tokens for this rank  the thread that copies them   by that thread, once stored
//     and their routing weights
//   sums[n % 4], tokens of this rank   the thread that adds them     by that thread, at once
//   weights[n % 4], if not dispatched  the thread that needs them, in S(n), then emptied by it
//   entered[n % 4]                     one thread                    never: holds the round
//
// Why a word is empty, and nobody reads it any more, when it is written again. At most two rounds are under way: S(n)
// starts after R(n - 2) has ended, on every rank, in whatever order receives are called (the host sees to it). Every
// rank sends to every rank in every round, also with nothing to say: its routing table, or its word in `entered`; and
// no R(n) ends before it has heard from all. Now a peer's S(n + 4) starts after its R(n + 2) has ended, which heard
// from this rank's S(n + 2), which started after this rank's R(n) had ended, in which words of buffer n % 4 were read
// and emptied. Kernels end with their writes visible to the system, and what they read was written before: the chain is
// one of happens-before. With 8 ranks it is the same chain, once for each pair. With one round under way two buffers
// would do. tests/protocol/ explores all interleavings of this, and finds one that fails wherever something is
// left out.
//
// A kernel that waits never keeps what it waits for from being sent: R(n) waits for S(n) of peers, which wait for
// nothing but S(n) of their peers (weights, in combine), and every block sends before it waits. All ranks call in the
// same order.
//
// Routing weights travel once: behind the rows of a dispatch, as words of them, and R(n) keeps them in local memory, so
// that the handle may be combined at any later time, often or never; or in each combine. Each round is one or the other
// on all ranks; what a round does not use stays empty.
//
// Rounds are counted by each block for itself, so that no block waits for another one; grids have the same size in
// every call. A receive learns its round from the handle, where the send has put it.
//
// A wait for a rank ends in time. That rank is then `failed`: no later wait for it lasts, words it should have written
// are left alone, and the host learns its name. Once the host has masked the rank, nothing is sent to it or expected
// from it.
//
// Ranks may be of several nodes: low_latency_reach.cuh says how words get to those whose buffers are not mapped here.
#pragma once

#include "buffer.cuh"
#include "fault.cuh"
#include "ptx.cuh"

namespace ep_moe {

constexpr int kInFlight = 2;  // rounds under way
constexpr int kLandingBuffers = 2 * kInFlight;
constexpr int kMaxBlocks = 512;
constexpr int kMaxThreads = 448;

// Two bf16 of -0 and of +-0 in e4m3; senders write +0 instead. No scale looks like this; a routing weight may.
constexpr uint32_t kEmptyWord = 0x80008000;
// A NaN; senders write another one instead.
constexpr uint32_t kEmptyWeight = 0xffffffff;

// A routing entry: an expert, or kNoExpert, below the low 5 bits of the round. Stale entries are of 4, 8, ... rounds
// ago.
constexpr int kExpertBits = 11;
constexpr uint32_t kNoExpert = (1u << kExpertBits) - 1;

constexpr uint32_t kSend = 1, kReceive = 2;  // phases

struct LowLatencyShape {
  int32_t ranks;
  int32_t max_tokens;  // of a rank
  int32_t max_top_k;
  int32_t num_experts;
  int32_t hidden;  // a multiple of 128
  int32_t experts_per_rank;
  int64_t row_bytes;  // of a dispatched row as it travels, with routing weights; a multiple of 16
};

// Offsets in the symmetric buffer; parts written by peers are indexed by the writer's rank.
struct LowLatencyLayout {
  int64_t routing;  // uint16 [4][ranks][max_tokens][top_k rounded up to 8]
  int64_t entered;  // uint32 [4][ranks]
  int64_t rows;     // [4][ranks][max_tokens] dispatched rows: values, then scales, then routing weights
  int64_t sums;     // bf16 [4][ranks][max_tokens][hidden]
  int64_t weights;  // float [4][ranks][max_tokens][max_top_k]
  int64_t total;    // bytes
};

inline LowLatencyLayout low_latency_layout(const LowLatencyShape& shape) {
  const int64_t places = static_cast<int64_t>(kLandingBuffers) * shape.ranks * shape.max_tokens;
  int64_t end = 0;
  auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end = (end + bytes + 255) / 256 * 256;
    return start;
  };
  LowLatencyLayout layout;
  layout.routing = place(places * routing_stride(shape.max_top_k) * 2);
  layout.entered = place(kLandingBuffers * shape.ranks * 4);
  layout.rows = place(places * shape.row_bytes);
  layout.sums = place(places * shape.hidden * 2);
  layout.weights = place(places * shape.max_top_k * 4);
  layout.total = end;
  return layout;
}

// In local device memory, zero at first.
struct LowLatencyWorkspace {
  uint32_t failed;    // bit r: a wait for rank r ended in vain
  uint32_t masked;    // bit r: rank r takes no part any more; set by the host
  uint32_t reported;  // there is a fault report
  uint32_t reserved;
  uint32_t dispatches[kMaxBlocks];  // rounds each block has sent
  uint32_t combines[kMaxBlocks];
};

struct LowLatencyNodes;

// First fields of the arguments of both kernels.
struct LowLatency {
  uint8_t* buffers[kMaxRanks];   // symmetric buffer of every rank, mapped here; between nodes of this one alone
  const LowLatencyNodes* nodes;  // between nodes; otherwise nullptr
  LowLatencyLayout layout;
  LowLatencyShape shape;
  LowLatencyWorkspace* workspace;
  FaultReport* report;
  uint64_t timeout_ns;
  int32_t rank;
  uint32_t phases;  // kSend, kReceive or both
  int32_t blocks;
  int32_t threads;
  int32_t own;           // which of `buffers` is this rank's
  uint32_t rank_factor;  // 2^31 / experts_per_rank, rounded up: see rank_of
};

// The rank of an expert: expert / experts_per_rank without dividing, exact below 2^15 experts.
__device__ __forceinline__ int rank_of(const LowLatency& ll, int expert) {
  return __umulhi(2u * expert, ll.rank_factor);
}

// A number taken apart into a rank and what is left: number / size and number % size. There are few ranks, so that
// subtracting is quicker than dividing.
struct RankAndRest {
  int rank;
  int rest;

  __device__ __forceinline__ RankAndRest(int number, int size) : rank(0), rest(number) {
#pragma unroll 1
    while (rest >= size) {
      asm("" : "+r"(rest));  // or the compiler divides after all
      rest -= size;
      ++rank;
    }
  }
};

// Brings the parameters of a kernel near. Each launch has them somewhere new, and a warp that misses one line of the
// constant cache after the other waits for each; these reads run side by side, before the kernel ahead has ended.
template <typename Args>
__device__ __forceinline__ void fetch_parameters(const Args& args) {
  constexpr int kLineWords = 16, kWords = sizeof(Args) / 4;
  // Plus 0, which the compiler does not know: the reads become loads, not operands.
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&args) + blockIdx.y;
  uint32_t seen = words[kWords - 1];
#pragma unroll
  for (int i = 0; i < kWords; i += kLineWords) seen |= words[i];
  if (seen == 0) __nanosleep(0);  // never; what is read must be used
}

__device__ __forceinline__ uint8_t* own_buffer(const LowLatency& ll) { return ll.buffers[ll.own]; }

// The number of the place of (rank, token) in the copy of a part that `round` uses. 31 bits hold it: 2^26 tokens of 8
// ranks would need terabytes.
__device__ __forceinline__ int place_number(const LowLatency& ll, uint32_t round, int rank, int token) {
  return (static_cast<int>(round % kLandingBuffers) * ll.shape.ranks + rank) * ll.shape.max_tokens + token;
}

// The place of (writer, token) in the copy of a part that `round` uses, in the buffer of its reader.
template <typename T>
__device__ __forceinline__ T* landing_place(const LowLatency& ll, uint8_t* buffer, int64_t offset, uint32_t round,
                                            int writer, int token, int bytes_per_token) {
  const int place = place_number(ll, round, writer, token);
  return reinterpret_cast<T*>(buffer + offset + static_cast<int64_t>(place) * bytes_per_token);
}

__device__ __forceinline__ bool is_empty(uint4 v) {
  return v.x == kEmptyWord || v.y == kEmptyWord || v.z == kEmptyWord || v.w == kEmptyWord;
}

__device__ __forceinline__ uint32_t fill_empty(uint32_t word) { return word == kEmptyWord ? 0 : word; }

// What a sender writes in place of words that look empty.
__device__ __forceinline__ uint4 fill_empty(uint4 v) {
  return make_uint4(fill_empty(v.x), fill_empty(v.y), fill_empty(v.z), fill_empty(v.w));
}

__device__ __forceinline__ void empty(uint4* address) {
  st_volatile(address, make_uint4(kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord));
}

// Bit r: rank r takes part.
__device__ __forceinline__ uint32_t present_ranks(const LowLatency& ll) {
  return ~*reinterpret_cast<volatile uint32_t*>(&ll.workspace->masked) & (~0u >> (32 - ll.shape.ranks));
}

// What a kernel reads of its round.
struct Round {
  uint32_t number;
  uint32_t present;  // bit r: rank r takes part
};

constexpr uint64_t kOver = ~0ull;

// kOver if a wait for `rank` that began at `start` (0 at first) is to end, which it reports; else when it began. Kept
// out of the way of code that is in a hurry.
__device__ __noinline__ inline uint64_t look_at_clock(const LowLatency& ll, Step step, int rank, uint32_t round,
                                                      uint64_t start) {
  if (ld_volatile(&ll.workspace->failed) >> rank & 1) return kOver;
  const uint64_t now = global_timer_ns();
  if (start == 0) start = now;
  if (now - start <= ll.timeout_ns) return start;
  report_fault(ll.report, &ll.workspace->reported, Fault::kTimeout, step, rank, round, 0, 0);
  atomicOr(&ll.workspace->failed, 1u << rank);
  return kOver;
}

// Repeats `ready()` until it is true, or until the time is up for `rank`; false then. Any threads.
template <typename Ready>
__device__ __forceinline__ bool wait_for(const LowLatency& ll, Step step, int rank, uint32_t round, Ready ready) {
  constexpr int kTries = 128;  // between looks at the clock
  for (uint64_t start = 0; start != kOver; start = look_at_clock(ll, step, rank, round, start)) {
#pragma unroll 1
    for (int i = 0; i < kTries; ++i)
      if (ready()) return true;
  }
  return false;
}

}  // namespace ep_moe
