// Low-latency dispatch: each token goes once to every rank that has an expert of it, and there into a slot of each of
// these experts. low_latency.cuh says why this is safe.
//
// What moves: in S, the routing of all tokens (2 bytes an entry) to all ranks, and rows, as they are or quantised to
// e4m3 with one fp32 scale per 128 channels behind the values, by 16-byte stores to peers. In R, rows from the landing
// buffer to their slots. A block sends, then receives, one (rank, token) at a time.
//
// The slots of an expert are filled by source rank, then token. The slot of a token is the number of tokens before it
// that have the expert; every receiving block counts them in the routing table, so nothing is handed out by atomics.
#include <cuda_fp8.h>

#include "element.cuh"
#include "launch.cuh"
#include "low_latency.cuh"

namespace ep_moe {

struct LowLatencyDispatchArgs {
  LowLatency ll;
  const __nv_bfloat16* x;   // [tokens][hidden]
  const int64_t* topk_idx;  // [tokens][top_k], global expert or -1
  uint8_t* rows;            // out [local_experts][ranks * max_tokens][hidden], of bf16 or e4m3
  void* scales;             // out, of e4m3 rows: float [...][hidden / 128], or uint8 [...][hidden / 512 rounded up * 4]
  int32_t* counts;          // out [local_experts]: rows of each expert
  int64_t* ranges;          // out [local_experts][ranks]: first slot << 32 | rows, of each source rank
  int32_t* source_token;    // out [local_experts][ranks * max_tokens]
  int32_t* slots;           // out [ranks * max_tokens][top_k]: slot in [local_experts * ranks * max_tokens], or -1
  uint32_t* round;          // of the handle: written by S, read by R
  int32_t* received;        // [local_experts]: counts are added; or nullptr
  uint64_t* wait_ns;        // [ranks]: time waited for the routing of each rank is added; or nullptr
  int32_t tokens;
  int32_t top_k;
  int32_t scale_format;  // ScaleFormat
  int32_t table_bytes;   // of shared memory for the routing table; 0: read it where it landed
};

namespace {

enum class ScaleFormat : int32_t { kNone = 0, kFloat32 = 1, kUe8m0 = 2 };

constexpr int kMaxThreads = 448;
constexpr int kPerThread = 16;  // channels: 8 threads a block of 128
constexpr int kLooks = 2;       // vectors of a row that a thread looks at side by side
constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

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

// All ranks learn the experts of a token, one `given` to each lane; of one that does not exist, that it has none.
// Returns its owners to all threads.
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
    const bool writes = lane < ll.shape.ranks && (present >> lane & 1);
    uint4* place =
        landing_place<uint4>(ll, writes ? lane : ll.rank, ll.layout.routing, round, ll.rank, token, routing_bytes(ll));
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

// The largest magnitude of 16 channels, or NaN; bf16 holds it exactly, so it is found in pairs.
__device__ __forceinline__ float max_magnitude(const Vector<__nv_bfloat16> (&x)[2]) {
  __nv_bfloat162 pairs[kPerThread / 2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const auto* of_vector = reinterpret_cast<const __nv_bfloat162*>(&x[j].bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[4 * j + i] = __habs2(of_vector[i]);
  }
#pragma unroll
  for (int half = kPerThread / 4; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) pairs[i] = __hmax2_nan(pairs[i], pairs[i + half]);
  return max_nan(__low2float(pairs[0]), __high2float(pairs[0]));
}

// 16 channels as e4m3. The 8 threads of a block of 128 channels work together and all get its scale. All threads of a
// warp.
__device__ uint4 quantize(const Vector<__nv_bfloat16> (&x)[2], bool power_of_two, float& scale) {
  float amax = max_magnitude(x);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) amax = max_nan(amax, __shfl_xor_sync(~0u, amax, distance));
  amax = max_nan(amax, kMinAmax);
  scale = amax / kE4m3Max;
  float factor = kE4m3Max / amax;
  if (power_of_two) {  // rounded up; infinity and NaN become 2^128, which is NaN as UE8M0
    const uint32_t exponent = min((__float_as_uint(scale) + 0x7fffff) >> 23, 255u);
    scale = __uint_as_float(exponent << 23);
    factor = 1.0f / scale;
  }
  float values[kPerThread];
#pragma unroll
  for (int j = 0; j < 2; ++j) x[j].to_float(reinterpret_cast<float (&)[8]>(values[8 * j]));
  __align__(16) __nv_fp8x2_storage_t quantised[kPerThread / 2];
#pragma unroll
  for (int i = 0; i < kPerThread / 2; ++i) {
    const float2 pair = make_float2(values[2 * i] * factor, values[2 * i + 1] * factor);
    quantised[i] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
  }
  return *reinterpret_cast<const uint4*>(quantised);
}

using Piece = Vector<__nv_bfloat16>[2];  // kPerThread channels

// Which vectors of a row are a thread's piece of this number: neighbours where they are quantised together; else as far
// apart as the block is wide, so that a warp's stores fill whole sectors and lines of a peer's memory.
__device__ __forceinline__ int vector_of_piece(bool quantised, int number, int j) {
  return quantised ? 2 * (number * blockDim.x + threadIdx.x) + j : (2 * number + j) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ void load_piece(const LowLatencyDispatchArgs& args, int token, int number, Piece& piece) {
  if (token >= args.tokens) return;
  const int vectors = args.ll.shape.hidden / Vector<__nv_bfloat16>::kCount;
  const uint4* x = reinterpret_cast<const uint4*>(args.x) + static_cast<int64_t>(token) * vectors;
  const bool quantised = static_cast<ScaleFormat>(args.scale_format) != ScaleFormat::kNone;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = vector_of_piece(quantised, number, j);
    if (i < vectors) piece[j].bits = x[i];
  }
}

// A token's row to the ranks of the mask, this one last: its peers have the longer way. `piece` is the thread's first.
__device__ void send_row(const LowLatencyDispatchArgs& args, int token, Piece& piece, uint32_t round, uint32_t owners) {
  const LowLatency& ll = args.ll;
  const auto format = static_cast<ScaleFormat>(args.scale_format);
  const int ranks = ll.shape.ranks, hidden = ll.shape.hidden, vectors = hidden / Vector<__nv_bfloat16>::kCount;
  for (int number = 0; 2 * number * blockDim.x < vectors; ++number) {
    if (number > 0) load_piece(args, token, number, piece);
    const int block = number * blockDim.x + threadIdx.x;  // of kPerThread channels, quantised
    uint4 quantised;
    float scale;
    if (format == ScaleFormat::kNone) {
#pragma unroll
      for (int j = 0; j < 2; ++j) piece[j].bits = fill_empty(piece[j].bits);
    } else {
      quantised = fill_empty(quantize(piece, format == ScaleFormat::kUe8m0, scale));
    }
    int peer = ll.rank;
#pragma unroll 1
    for (int step = 0; step < ranks; ++step) {
      if (++peer == ranks) peer = 0;
      if ((owners >> peer & 1) == 0) continue;
      uint8_t* place =
          landing_place<uint8_t>(ll, peer, ll.layout.rows, round, ll.rank, token, static_cast<int>(ll.shape.row_bytes));
      uint4* row = reinterpret_cast<uint4*>(place);
      if (format == ScaleFormat::kNone) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = vector_of_piece(false, number, j);
          if (i < vectors) st_volatile(row + i, piece[j].bits);
        }
      } else if (block < hidden / kPerThread) {
        st_volatile(row + block, quantised);
        if (block % 8 == 0)
          st_volatile(reinterpret_cast<uint32_t*>(place + hidden) + block / 8, __float_as_uint(scale));
      }
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
__device__ RoutingTable receive_routing(const LowLatencyDispatchArgs& args, uint32_t round, uint32_t present,
                                        uint4* shared_table) {
  const LowLatency& ll = args.ll;
  const int pieces = routing_bytes(ll) / 16, of_rank = ll.shape.max_tokens * pieces;
  uint4* landed = landing_place<uint4>(ll, ll.rank, ll.layout.routing, round, 0, 0, routing_bytes(ll));
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
__device__ void mark_places(const LowLatency& ll, const RoutingTable& table, int expert, uint32_t round,
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
__device__ void count_expert(const LowLatencyDispatchArgs& args, int expert, const uint32_t* marks) {
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
#pragma unroll
  for (int distance = 1; distance < kMaxRanks; distance *= 2) {
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
__device__ void count_experts(const LowLatencyDispatchArgs& args, const RoutingTable& table, uint32_t round,
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
__device__ int count_before(const LowLatencyDispatchArgs& args, const RoutingTable& table, int place, int expert,
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

// Where the row of a (rank, token) lands.
__device__ __forceinline__ uint8_t* landed_row(const LowLatency& ll, int source, int token, uint32_t round) {
  return landing_place<uint8_t>(ll, ll.rank, ll.layout.rows, round, source, token,
                                static_cast<int>(ll.shape.row_bytes));
}

// What a thread sees of a row at a glance: kLooks vectors, a block's width apart, and a scale.
struct Glance {
  uint4 vectors[kLooks];
  uint32_t scale;
};

__device__ __forceinline__ int row_bytes_of(const LowLatencyDispatchArgs& args) {
  return static_cast<ScaleFormat>(args.scale_format) == ScaleFormat::kNone ? 2 * args.ll.shape.hidden
                                                                           : args.ll.shape.hidden;
}

// Looks at vectors from `start` on, side by side, whether or not they are here.
__device__ __forceinline__ void glance_at(const uint4* row, int start, int vectors, Glance& glance) {
#pragma unroll
  for (int j = 0; j < kLooks; ++j) {
    const int i = start + j * blockDim.x + threadIdx.x;
    if (i < vectors) glance.vectors[j] = ld_volatile(row + i);
  }
}

// The first look at a row, which may be here before anybody knows its slots.
__device__ __forceinline__ void glance_at(const LowLatencyDispatchArgs& args, int source, int token, uint32_t round,
                                          Glance& glance) {
  const uint8_t* landed = landed_row(args.ll, source, token, round);
  glance_at(reinterpret_cast<const uint4*>(landed), 0, row_bytes_of(args) / 16, glance);
  if (static_cast<ScaleFormat>(args.scale_format) != ScaleFormat::kNone && threadIdx.x < args.ll.shape.hidden / 128)
    glance.scale = ld_volatile(reinterpret_cast<const uint32_t*>(landed + args.ll.shape.hidden) + threadIdx.x);
}

// The row of one (rank, token) into `slot` of every lane that has one. `glance` is the first look at it.
__device__ void place_row(const LowLatencyDispatchArgs& args, int source, int token, int slot, uint32_t round,
                          Glance glance) {
  const LowLatency& ll = args.ll;
  const auto format = static_cast<ScaleFormat>(args.scale_format);
  const int hidden = ll.shape.hidden, row_bytes = row_bytes_of(args), vectors = row_bytes / 16;
  const uint32_t wanted = __ballot_sync(~0u, slot >= 0);
  uint8_t* landed = landed_row(ll, source, token, round);
  uint4* row = reinterpret_cast<uint4*>(landed);
  // Threads of a warp leave the loops together, for the shuffles.
  for (int start = 0; start < vectors; start += kLooks * blockDim.x) {
    if (start > 0) glance_at(row, start, vectors, glance);
#pragma unroll
    for (int j = 0; j < kLooks; ++j) {
      const int i = start + j * blockDim.x + threadIdx.x;
      if (i / 32 * 32 >= vectors) break;
      uint4& value = glance.vectors[j];
      bool here = i < vectors;
      if (here && is_empty(value))
        here = wait_for(ll, Step::kRows, source, round, [&] {
          value = ld_volatile(row + i);
          return !is_empty(value);
        });
      for (uint32_t left = wanted; left != 0; left &= left - 1) {
        const int64_t target = __shfl_sync(~0u, slot, __ffs(left) - 1);
        if (here) reinterpret_cast<uint4*>(args.rows + target * row_bytes)[i] = value;
      }
      if (here) empty(row + i);
    }
  }
  if (format == ScaleFormat::kNone) return;
  uint32_t* landed_scales = reinterpret_cast<uint32_t*>(landed + hidden);
  const int scales = hidden / 128, packed = (scales + 3) / 4 * 4;
  for (int first = threadIdx.x / 32 * 32; first < packed; first += blockDim.x) {
    const int i = first + threadIdx.x % 32;
    uint32_t word = 0;  // behind the last scale
    bool here = i < packed;
    if (i < scales) {
      if (i == threadIdx.x) word = glance.scale;
      here = (i == threadIdx.x && word != kEmptyWord) || wait_for(ll, Step::kRows, source, round, [&] {
               word = ld_volatile(landed_scales + i);
               return word != kEmptyWord;
             });
    }
    for (uint32_t left = wanted; left != 0; left &= left - 1) {
      const int64_t target = __shfl_sync(~0u, slot, __ffs(left) - 1);
      if (!here) continue;
      if (format == ScaleFormat::kUe8m0) {
        static_cast<uint8_t*>(args.scales)[target * packed + i] = static_cast<uint8_t>(word >> 23);
      } else if (i < scales) {
        static_cast<float*>(args.scales)[target * scales + i] = __uint_as_float(word);
      }
    }
    if (here && i < scales) st_volatile(landed_scales + i, kEmptyWord);
  }
}

__device__ Round send(const LowLatencyDispatchArgs& args) {
  const LowLatency& ll = args.ll;
  // All that the block's first token needs is read side by side, before any of it is used.
  Piece piece;
  load_piece(args, blockIdx.x, 0, piece);
  int64_t given = load_expert(args, blockIdx.x);
  const uint32_t present = present_ranks(ll), round = ld_volatile(&ll.workspace->dispatches[blockIdx.x]) + 1;
  for (int token = blockIdx.x; token < ll.shape.max_tokens; token += gridDim.x) {
    if (token != blockIdx.x) {
      load_piece(args, token, 0, piece);
      given = load_expert(args, token);
    }
    const uint32_t owners = send_routing(args, token, given, round, present);
    if (owners != 0) send_row(args, token, piece, round, owners);
  }
  __syncthreads();  // all threads have read the counter
  if (threadIdx.x == 0) {
    ll.workspace->dispatches[blockIdx.x] = round;
    if (blockIdx.x == 0) *args.round = round;
  }
  return {round, present};
}

// A (rank, token), and what is known of its row before its slots are.
struct Arrival {
  int place;
  RankAndRest token;
  int expert;  // a local one of the token, one each lane; or -1
  bool any;    // the row comes here
  Glance glance;
};

// The one of number `place`, if there is one. All threads of a warp.
__device__ __forceinline__ Arrival arrival(const LowLatencyDispatchArgs& args, const RoutingTable& table, int place,
                                           uint32_t round) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32, local_experts = ll.shape.experts_per_rank;
  const bool exists = place < ll.shape.ranks * ll.shape.max_tokens;
  Arrival next = {place, RankAndRest(exists ? place : 0, ll.shape.max_tokens), -1, false, {}};
  if (!exists) return next;
  if (lane < args.top_k) {
    const uint32_t entry = table.entries[static_cast<int64_t>(place) * table.stride + lane];
    const int local = static_cast<int>(entry & kNoExpert) - ll.rank * local_experts;
    if (entry == tagged(entry & kNoExpert, round) && local >= 0 && local < local_experts) next.expert = local;
  }
  next.any = __any_sync(~0u, next.expert >= 0);
  if (next.any) glance_at(args, next.token.rank, next.token.rest, round, next.glance);
  return next;
}

__device__ void receive(const LowLatencyDispatchArgs& args, uint32_t round, uint32_t present, uint4* shared_table) {
  const LowLatency& ll = args.ll;
  const int places = ll.shape.ranks * ll.shape.max_tokens;
  const int lane = threadIdx.x % 32;
  __shared__ int partial[2][kMaxThreads / 32][kMaxTopK];
  const RoutingTable table = receive_routing(args, round, present, shared_table);
  int turn = 0;
  for (Arrival next = arrival(args, table, blockIdx.x, round); next.place < places;) {
    const Arrival now = next;
    int slot = -1;
    if (now.any) {  // the same in all warps
      const int before = count_before(args, table, now.place, now.expert, round, partial[turn]);
      turn ^= 1;
      if (now.expert >= 0) slot = now.expert * places + before;
    }
    next = arrival(args, table, now.place + gridDim.x, round);  // looked at before this one is stored
    if (now.any) place_row(args, now.token.rank, now.token.rest, slot, round, now.glance);
    if (threadIdx.x < args.top_k) {
      args.slots[static_cast<int64_t>(now.place) * args.top_k + lane] = slot;
      if (slot >= 0) args.source_token[slot] = now.token.rest;
    }
  }
  count_experts(args, table, round, reinterpret_cast<uint32_t*>(shared_table) + args.table_bytes / 4);
}

}  // namespace

__global__ void __launch_bounds__(kMaxThreads, 2) dispatch(const __grid_constant__ LowLatencyDispatchArgs args) {
  const LowLatency& ll = args.ll;
  extern __shared__ __align__(16) uint4 shared_table[];
  griddepcontrol_launch_dependents();
  fetch_parameters(args);
  griddepcontrol_wait();
  const Round round = ll.phases & kSend ? send(args) : Round{ld_volatile(args.round), present_ranks(ll)};
  if (ll.phases & kReceive) receive(args, round.number, round.present, shared_table);
}

}  // namespace ep_moe

// Runs the kernel above; requires blocks <= kMaxBlocks, two of them resident on a multiprocessor, the same in every
// call.
EP_MOE_API const char* ep_moe_low_latency_dispatch(const ep_moe::LowLatencyDispatchArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const int marks_bytes = (args->ll.shape.ranks * args->ll.shape.max_tokens + 31) / 32 * 4;
  return launch("low-latency dispatch kernel", dispatch, *args, args->ll.blocks, args->ll.threads,
                args->table_bytes + marks_bytes, LaunchMode::kProgrammatic, stream);
}

EP_MOE_API size_t ep_moe_low_latency_dispatch_args_bytes() { return sizeof(ep_moe::LowLatencyDispatchArgs); }
