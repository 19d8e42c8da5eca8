// Low-latency combine: the experts' rows of each token are weighted and summed where they are, and the sum goes to the
// token's rank, which adds what its peers sent. low_latency.cuh says why this is safe.
//
// What moves: in S, the routing weights of this rank's tokens to the ranks of their experts, unless they came with the
// dispatch, then a sum a (rank, token), by 16-byte stores to that rank. In R, the sums from the landing buffer to the
// output. Sums run in fp32: over a rank's rows in top-k order, rounded to bf16, then over the ranks in ascending order.
#pragma once

#include "element.cuh"
#include "launch.cuh"
#include "low_latency_reach.cuh"

namespace ep_moe {

struct LowLatencyCombineArgs {
  LowLatency ll;
  const uint8_t* rows;      // bf16 [local_experts * ranks * max_tokens][hidden]
  const int32_t* slots;     // [ranks * max_tokens][top_k], of the handle: slot of each arrived entry, or -1
  const float* weights;     // [ranks * max_tokens][top_k], of the handle: those that came with the dispatch; or nullptr
  const int64_t* topk_idx;  // [tokens][top_k], as dispatched
  const float* topk_weights;  // [tokens][top_k]; nullptr if there are `weights`
  uint8_t* out;               // bf16 [tokens][hidden]
  uint32_t* round;            // of this combine: written by S, read by R
  uint64_t* wait_ns;          // [ranks]: time until each rank had begun is added; or nullptr
  int32_t tokens;
  int32_t top_k;
};

constexpr int kBatch = 8;        // rows of a token in flight
constexpr int kRanksAtOnce = 2;  // ranks whose sums of a token are looked for at once

using Row = Vector<__nv_bfloat16>;

__device__ __forceinline__ uint32_t* weight_place(const LowLatency& ll, uint8_t* buffer, uint32_t round, int writer,
                                                  int token) {
  return landing_place<uint32_t>(ll, buffer, ll.layout.weights, round, writer, token, ll.shape.max_top_k * 4);
}

__device__ __forceinline__ uint4* sum_place(const LowLatency& ll, uint8_t* buffer, uint32_t round, int writer,
                                            int token) {
  return landing_place<uint4>(ll, buffer, ll.layout.sums, round, writer, token, ll.shape.hidden * 2);
}

// One of the experts of a token of this rank, and its weight.
struct Entry {
  int64_t expert;  // or -1
  float weight;
};

// That of the thread's number, if the token has so many.
__device__ __forceinline__ Entry load_entry(const LowLatencyCombineArgs& args, int token) {
  Entry entry = {-1, 0.0f};
  if (args.weights == nullptr && token < args.tokens && threadIdx.x < args.top_k) {
    const int64_t place = static_cast<int64_t>(token) * args.top_k + threadIdx.x;
    entry.expert = args.topk_idx[place];
    entry.weight = args.topk_weights[place];
  }
  return entry;
}

// The weight to the rank `reader`, if the expert is there. To another node all weights of a token travel, in one put.
template <typename Reach>
__device__ __forceinline__ void send_weight(const LowLatencyCombineArgs& args, const Entry& entry, int reader,
                                            int token, uint32_t round) {
  const LowLatency& ll = args.ll;
  const bool valid = entry.expert >= 0 && entry.expert < ll.shape.num_experts;
  const bool there = valid && rank_of(ll, static_cast<int>(entry.expert)) == reader;
  uint32_t weight = __float_as_uint(entry.weight);
  if (weight == kEmptyWeight) weight = 0x7fffffff;
  if (Reach::near(ll) >> reader & 1) {
    if (there) st_volatile(weight_place(ll, Reach::buffer(ll, reader), round, ll.rank, token) + threadIdx.x, weight);
  } else if constexpr (Reach::kPuts) {
    if (threadIdx.x >= 32 || !__any_sync(~0u, there)) return;
    const int bytes = ll.shape.max_top_k * 4;
    const int64_t from = place_offset(ll, ll.nodes->staging.weights, round, reader, token, bytes);
    if (threadIdx.x < args.top_k) reinterpret_cast<uint32_t*>(own_buffer(ll) + from)[threadIdx.x] = weight;
    __threadfence_system();  // each lane's own word, before the network card reads it
    __syncwarp();
    Reach::put(ll, reader, from, place_offset(ll, ll.layout.weights, round, ll.rank, token, bytes), args.top_k * 4);
  }
}

// A thread's 16 bytes of row `slot`; `column` is where those of row 0 are.
__device__ __forceinline__ uint4 load_row(const uint4* column, int slot, int row_bytes) {
  return *reinterpret_cast<const uint4*>(reinterpret_cast<const uint8_t*>(column) + mul_wide(slot, row_bytes));
}

// Those of the entries from `first` on that have a row here; bit j of `left` says whether entry first + j does.
__device__ __forceinline__ void load_rows(const uint4* column, int row_bytes, int slot, int first, uint32_t left,
                                          Row (&batch)[kBatch]) {
#pragma unroll
  for (int j = 0; j < kBatch; ++j)
    if (left >> j & 1) batch[j].bits = load_row(column, __shfl_sync(~0u, slot, first + j), row_bytes);
}

// The routing weight of the lane's entry of a token of `owner`, which sends it in this round.
__device__ __forceinline__ float take_weight(const LowLatency& ll, int owner, int token, uint32_t round) {
  uint32_t* place = weight_place(ll, own_buffer(ll), round, owner, token) + threadIdx.x % 32;
  uint32_t weight = 0;
  const bool here = wait_for(ll, Step::kWeights, owner, round, [&] {
    weight = ld_volatile(place);
    return weight != kEmptyWeight;
  });
  if (here) st_volatile(place, kEmptyWeight);
  return __uint_as_float(weight);
}

// Vectors of a row, from `begin` to `end`.
struct Part {
  uint32_t begin;
  uint32_t end;
};

// Where the second half of a row begins, at a whole line; a short row has none.
__device__ __forceinline__ uint32_t middle_of(uint32_t vectors) { return min((vectors / 2 + 31) / 32 * 32, vectors); }

// A part of the sum of a token's rows here, to its rank. `slot` is that of the lane's entry, or -1. Weights that did
// not come with the dispatch are waited for by the first warp, which shares them in `weights`; then, and to other
// nodes, the part is the whole.
template <typename Reach>
__device__ void send_sum(const LowLatencyCombineArgs& args, float (&weights)[kMaxTopK], int owner, int token, int slot,
                         Part part, uint32_t round) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32, vectors = ll.shape.hidden / Row::kCount, row_bytes = ll.shape.hidden * 2;
  const uint32_t wanted = __ballot_sync(~0u, slot >= 0);
  // Threads behind the end of a row load its last vector, so that all threads of a warp do the same.
  const auto column = [&](int i) { return reinterpret_cast<const uint4*>(args.rows) + min(i, vectors - 1); };
  Row batch[kBatch];
  const uint32_t first_column = part.begin + threadIdx.x;
  load_rows(column(first_column), row_bytes, slot, 0, wanted, batch);  // before the weights are waited for
  const bool near = Reach::near(ll) >> owner & 1;
  float weight = 0.0f;
  if (args.weights != nullptr) {
    const int64_t place = static_cast<int64_t>(owner) * ll.shape.max_tokens + token;
    if (slot >= 0) weight = args.weights[place * args.top_k + lane];
  } else {
    // To other nodes the weights of experts elsewhere came too.
    const bool sent = slot >= 0 || (Reach::kPuts && !near && lane < args.top_k);
    if (threadIdx.x < 32 && sent) weights[lane] = take_weight(ll, owner, token, round);
    __syncthreads();
    weight = weights[lane];
    __syncthreads();  // before the weights are overwritten
  }
  uint4* target;
  int64_t staged = 0;
  if (near) {
    target = sum_place(ll, Reach::buffer(ll, owner), round, ll.rank, token);
  } else if constexpr (Reach::kPuts) {
    staged = place_offset(ll, ll.nodes->staging.sums, round, owner, token, row_bytes);
    target = reinterpret_cast<uint4*>(own_buffer(ll) + staged);
  }
  const bool ahead = args.top_k <= kBatch;  // one batch holds all rows: the next vectors are loaded as these are added
#pragma unroll 1
  for (uint32_t i = first_column; i - lane < part.end; i += blockDim.x) {
    const uint32_t next = i - lane + blockDim.x;  // of the warp's first thread
    const uint4* next_column = column(next + lane);
    float sum[Row::kCount] = {};
#pragma unroll 1
    for (int first = 0; first < args.top_k; first += kBatch) {
      const uint32_t left = wanted >> first;
      if (!ahead && (first > 0 || i != first_column)) load_rows(column(i), row_bytes, slot, first, left, batch);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if ((left >> j & 1) == 0) continue;
        float values[Row::kCount];
        batch[j].to_float(values);
        const int source = __shfl_sync(~0u, slot, first + j);
        const float factor = __shfl_sync(~0u, weight, first + j);
        if (ahead && next < part.end) batch[j].bits = load_row(next_column, source, row_bytes);
        // Not fused, so that any implementation can compute the same bits.
#pragma unroll
        for (int c = 0; c < Row::kCount; ++c) sum[c] = __fadd_rn(sum[c], __fmul_rn(factor, values[c]));
      }
    }
    Row rounded;
    rounded.from_float(sum);
    if (i < part.end) st_volatile(target + i, fill_empty(rounded.bits));
  }
  if constexpr (Reach::kPuts) {
    if (near) return;
    finish_staging();
    const int64_t to = place_offset(ll, ll.layout.sums, round, ll.rank, token, row_bytes);
    if (threadIdx.x < 32) Reach::put(ll, owner, staged, to, row_bytes);
  }
}

// A (rank, token) in the order in which a block sends: peers' first, which have the longer way.
struct Owned {
  int owner;
  int token;

  __device__ __forceinline__ Owned(int owner, int token) : owner(owner), token(token) {}

  __device__ __forceinline__ Owned(const LowLatency& ll, int place) {
    const RankAndRest parts(place, ll.shape.max_tokens);
    owner = ll.rank + 1 + parts.rank;
    if (owner >= ll.shape.ranks) owner -= ll.shape.ranks;
    token = parts.rest;
  }
};

__device__ __forceinline__ int slot_of_lane(const LowLatencyCombineArgs& args, const Owned& owned) {
  const int lane = threadIdx.x % 32;
  const int64_t place = static_cast<int64_t>(owned.owner) * args.ll.shape.max_tokens + owned.token;
  return lane < args.top_k ? args.slots[place * args.top_k + lane] : -1;
}

template <typename Reach>
__device__ Round send(const LowLatencyCombineArgs& args) {
  const LowLatency& ll = args.ll;
  const int ranks = ll.shape.ranks, places = ranks * ll.shape.max_tokens;
  __shared__ float weights[kMaxTopK];
  const bool kept = args.weights != nullptr;
  // All that the block's first weights and sum need is read side by side, before any of it is used.
  const Owned first(ll, blockIdx.x);
  const Entry entry = load_entry(args, first.token);
  int slot = -1;
  if (blockIdx.x < places) slot = slot_of_lane(args, first);
  // With a block for each place, the blocks of tokens 0 and max_tokens - 1, 1 and max_tokens - 2, ... of a rank help
  // each other: one whose own token has no rows adds half of the other sum. With few tokens only half of each is left.
  const int last_token = ll.shape.max_tokens - 1;
  const uint32_t vectors = ll.shape.hidden / Row::kCount;
  const bool helps = kept && gridDim.x == places && (Reach::near(ll) >> first.owner & 1);
  int other_slot = -1;
  if (helps) other_slot = slot_of_lane(args, {first.owner, last_token - first.token});
  const uint32_t present = present_ranks(ll), round = ld_volatile(&ll.workspace->combines[blockIdx.x]) + 1;
  if (blockIdx.x == 0 && threadIdx.x < ranks && (present >> threadIdx.x & 1)) {
    const int64_t to = ll.layout.entered + (round % kLandingBuffers * ranks + ll.rank) * 4;
    if (Reach::near(ll) >> threadIdx.x & 1) {
      st_volatile(reinterpret_cast<uint32_t*>(Reach::buffer(ll, threadIdx.x) + to), round);
    } else if constexpr (Reach::kPuts) {
      Reach::put_word(ll, threadIdx.x, to, round);
    }
  }
  if (!kept && blockIdx.x < places && (present >> first.owner & 1))
    send_weight<Reach>(args, entry, first.owner, first.token, round);
  for (int i = blockIdx.x + gridDim.x; !kept && i < places; i += gridDim.x) {
    const Owned reader(ll, i);
    if (present >> reader.owner & 1)
      send_weight<Reach>(args, load_entry(args, reader.token), reader.owner, reader.token, round);
  }
  for (int i = blockIdx.x; i < places; i += gridDim.x) {
    Owned owned(ll, i);
    if (i != blockIdx.x) slot = slot_of_lane(args, owned);
    Part part = {0, vectors};
    if (helps) {
      const uint32_t middle = middle_of(vectors);
      if (!__any_sync(~0u, slot >= 0)) {
        slot = other_slot;
        owned.token = last_token - owned.token;
        part.begin = middle;
      } else if (!__any_sync(~0u, other_slot >= 0)) {
        part.end = middle;
      }
    }
    if ((present >> owned.owner & 1) == 0 || !__any_sync(~0u, slot >= 0)) continue;  // the same in all warps
    send_sum<Reach>(args, weights, owned.owner, owned.token, slot, part, round);
  }
  __syncthreads();  // all threads have read the counter
  if (threadIdx.x == 0) {
    ll.workspace->combines[blockIdx.x] = round;
    if (blockIdx.x == 0) *args.round = round;
  }
  return {round, present};
}

// The ranks that return a sum for a token of this rank. All threads of a warp.
__device__ __forceinline__ uint32_t owners_of(const LowLatencyCombineArgs& args, int token, uint32_t present) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32;
  int64_t expert = -1;
  if (token < args.tokens && lane < args.top_k) expert = args.topk_idx[token * args.top_k + lane];
  const bool valid = expert >= 0 && expert < ll.shape.num_experts;
  return __reduce_or_sync(~0u, valid ? 1u << rank_of(ll, static_cast<int>(expert)) : 0u) & present;
}

// Adds what the token's owners sent, of a part of it. A thread takes kPieces vectors at a time, a block's width apart,
// of kRanksAtOnce ranks, and looks for all of them side by side until they are here: the last one to come costs one
// latency.
template <int kPieces>
__device__ void receive_token(const LowLatencyCombineArgs& args, int token, Part part, uint32_t owners,
                              uint32_t round) {
  const LowLatency& ll = args.ll;
  const int vectors = ll.shape.hidden / Row::kCount;
  for (uint32_t start = part.begin + threadIdx.x; start < part.end; start += kPieces * blockDim.x) {
    float sum[kPieces][Row::kCount] = {};
#pragma unroll 1
    for (int first = 0; first < ll.shape.ranks; first += kRanksAtOnce) {
      Row landed[kRanksAtOnce][kPieces];
      uint4* places[kRanksAtOnce];
#pragma unroll
      for (int j = 0; j < kRanksAtOnce; ++j) places[j] = sum_place(ll, own_buffer(ll), round, first + j, token) + start;
      const auto sent = [&](int j) { return (owners >> (first + j) & 1) != 0; };
      const auto place = [&](int j, int p) { return places[j] + p * blockDim.x; };
      const auto exists = [&](int p) { return start + p * blockDim.x < part.end; };
      // Bit j: something of rank first + j is missing.
      const auto look = [&] {
        uint32_t missing = 0;
#pragma unroll
        for (int j = 0; j < kRanksAtOnce; ++j)
#pragma unroll
          for (int p = 0; p < kPieces; ++p)
            if (sent(j) && exists(p)) landed[j][p].bits = ld_volatile(place(j, p));
#pragma unroll
        for (int j = 0; j < kRanksAtOnce; ++j)
#pragma unroll
          for (int p = 0; p < kPieces; ++p)
            if (sent(j) && exists(p) && is_empty(landed[j][p].bits)) missing |= 1u << j;
        return missing;
      };
      uint32_t missing = owners >> first & ((1u << kRanksAtOnce) - 1), failed = 0;
      while (missing != 0) {
        const int j = __ffs(missing) - 1;
        const bool here = wait_for(ll, Step::kCombine, first + j, round, [&] {
          missing = look() & ~failed;
          return (missing >> j & 1) == 0;
        });
        if (here) continue;
        failed |= 1u << j;
        missing &= ~failed;
      }
#pragma unroll
      for (int j = 0; j < kRanksAtOnce; ++j) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          if (!sent(j) || !exists(p)) continue;
          if ((failed >> j & 1) && is_empty(landed[j][p].bits)) continue;
          empty(place(j, p));
          float values[Row::kCount];
          landed[j][p].to_float(values);
#pragma unroll
          for (int c = 0; c < Row::kCount; ++c) sum[p][c] += values[c];
        }
      }
    }
    asm("" : "+r"(token));  // or its row's begin is kept in a register during the waits, which need all
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const uint32_t i = start + p * blockDim.x;
      Row rounded;
      rounded.from_float(sum[p]);
      if (i < part.end) reinterpret_cast<uint4*>(args.out)[token * vectors + i] = rounded.bits;
    }
  }
}

__device__ inline void receive(const LowLatencyCombineArgs& args, uint32_t round, uint32_t present) {
  const LowLatency& ll = args.ll;
  const int ranks = ll.shape.ranks;
  const uint64_t start = args.wait_ns != nullptr ? global_timer_ns() : 0;
  // Two blocks to a token, if there are so many.
  const uint32_t vectors = ll.shape.hidden / Row::kCount, middle = middle_of(vectors);
  if (2 * args.tokens <= gridDim.x) {
    const bool second = blockIdx.x >= args.tokens;
    const int token = second ? blockIdx.x - args.tokens : blockIdx.x;
    const Part half = second ? Part{middle, vectors} : Part{0, middle};
    if (token < args.tokens) receive_token<1>(args, token, half, owners_of(args, token, present), round);
  } else {
    for (int token = blockIdx.x; token < args.tokens; token += gridDim.x)
      receive_token<2>(args, token, {0, vectors}, owners_of(args, token, present), round);
  }
  if (blockIdx.x != gridDim.x - 1 || threadIdx.x >= ranks || (present >> threadIdx.x & 1) == 0) return;
  const int rank = threadIdx.x;
  const uint32_t* entered =
      reinterpret_cast<const uint32_t*>(own_buffer(ll) + ll.layout.entered) + round % kLandingBuffers * ranks + rank;
  wait_for(ll, Step::kCall, rank, round, [&] { return ld_volatile(entered) == round; });
  if (args.wait_ns != nullptr)
    atomicAdd(reinterpret_cast<unsigned long long*>(&args.wait_ns[rank]), global_timer_ns() - start);
}

template <typename Reach>
__global__ void __launch_bounds__(kMaxThreads, 2) combine(const __grid_constant__ LowLatencyCombineArgs args) {
  const LowLatency& ll = args.ll;
  griddepcontrol_launch_dependents();
  fetch_parameters(args);
  griddepcontrol_wait();
  const Round round = ll.phases & kSend ? send<Reach>(args) : Round{ld_volatile(args.round), present_ranks(ll)};
  if (ll.phases & kReceive) receive(args, round.number, round.present);
}

// Runs the kernel above; requires blocks <= kMaxBlocks, two of them resident on a multiprocessor, the same in every
// call.
template <typename Reach>
const char* launch_low_latency_combine(const LowLatencyCombineArgs& args, cudaStream_t stream) {
  return launch("low-latency combine kernel", combine<Reach>, args, args.ll.blocks, args.ll.threads, 0,
                LaunchMode::kProgrammatic, stream);
}

}  // namespace ep_moe
