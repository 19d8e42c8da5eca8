// Low-latency dispatch: each token goes once to every rank that has an expert of it, and there into a slot of each of
// these experts. low_latency.cuh says why this is safe, low_latency_routing.cuh which slots these are.
//
// What moves: in S, the routing of all tokens (2 bytes an entry) to all ranks, and rows, as they are or quantised to
// e4m3 with one fp32 scale per 128 channels behind the values, by 16-byte stores to peers. Behind a row travel the
// routing weights of its token, if they are given. In R, rows from the landing buffer to their slots, and weights to
// the handle. A block sends, then receives, one (rank, token) at a time.
#pragma once

#include <cuda_fp8.h>

#include "element.cuh"
#include "launch.cuh"
#include "low_latency_routing.cuh"

namespace ep_moe {

constexpr int kPerThread = 16;  // channels: 8 threads a block of 128
constexpr int kLooks = 2;       // vectors of a row that a thread looks at side by side
constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

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
__device__ inline uint4 quantize(const Vector<__nv_bfloat16> (&x)[2], bool power_of_two, float& scale) {
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
  const int vectors = args.ll.shape.hidden / Vector<__nv_bfloat16>::kCount;
  const uint4* x = reinterpret_cast<const uint4*>(args.x) + static_cast<int64_t>(token) * vectors;
  const bool quantised = static_cast<ScaleFormat>(args.scale_format) != ScaleFormat::kNone;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = vector_of_piece(quantised, number, j);
    if (token < args.tokens && i < vectors) piece[j].bits = x[i];
  }
}

// Offset of the place where the row of a token is staged, for all ranks of other nodes.
__device__ __forceinline__ int64_t staged_row(const LowLatency& ll, int token, uint32_t round) {
  const int place = static_cast<int>(round % kLandingBuffers) * ll.shape.max_tokens + token;
  return ll.nodes->staging.rows + static_cast<int64_t>(place) * ll.shape.row_bytes;
}

// Bytes of a row that routing weights follow: values, and scales.
__device__ __forceinline__ int payload_bytes(const LowLatencyDispatchArgs& args) {
  const int hidden = args.ll.shape.hidden;
  return static_cast<ScaleFormat>(args.scale_format) == ScaleFormat::kNone ? 2 * hidden : hidden + hidden / 128 * 4;
}

// Whether the thread sends and receives a routing weight, that of its lane's number: in the last warp, for the first
// ones have scales.
__device__ __forceinline__ bool has_weight(const LowLatencyDispatchArgs& args) {
  return args.weights != nullptr && threadIdx.x / 32 == blockDim.x / 32 - 1 && threadIdx.x % 32 < args.top_k;
}

// The thread's, in bits; not looked at, which would make the loads behind it wait.
__device__ __forceinline__ uint32_t load_weight(const LowLatencyDispatchArgs& args, int token) {
  if (token >= args.tokens || !has_weight(args)) return 0;
  return __float_as_uint(args.topk_weights[static_cast<int64_t>(token) * args.top_k + threadIdx.x % 32]);
}

// A token's row to the ranks of the mask, this one last: its peers have the longer way; those of other nodes last of
// all, in one put each. `piece` and `weight` are the thread's first.
template <typename Reach>
__device__ void send_row(const LowLatencyDispatchArgs& args, int token, Piece& piece, uint32_t weight, uint32_t round,
                         uint32_t owners) {
  const LowLatency& ll = args.ll;
  const auto format = static_cast<ScaleFormat>(args.scale_format);
  const int ranks = ll.shape.ranks, hidden = ll.shape.hidden, vectors = hidden / Vector<__nv_bfloat16>::kCount;
  const uint32_t near = owners & Reach::near(ll), far = owners & ~Reach::near(ll);
  if (weight == kEmptyWord) --weight;  // -4.6e-41 looks empty, and travels as its neighbour
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
    // One step more where rows are staged.
#pragma unroll 1
    for (int step = 0; step < ranks + Reach::kPuts; ++step) {
      uint8_t* place;
      if (Reach::kPuts && step == ranks) {
        if (far == 0) break;
        place = own_buffer(ll) + staged_row(ll, token, round);
      } else {
        if (++peer == ranks) peer = 0;
        if ((near >> peer & 1) == 0) continue;
        place = landing_place<uint8_t>(ll, Reach::buffer(ll, peer), ll.layout.rows, round, ll.rank, token,
                                       static_cast<int>(ll.shape.row_bytes));
      }
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
      if (number == 0 && has_weight(args))
        st_volatile(reinterpret_cast<uint32_t*>(place + payload_bytes(args)) + threadIdx.x % 32, weight);
    }
  }
  if constexpr (Reach::kPuts) {
    if (far == 0) return;
    finish_staging();
    const int64_t to = place_offset(ll, ll.layout.rows, round, ll.rank, token, static_cast<int>(ll.shape.row_bytes));
    const int bytes = payload_bytes(args) + (args.weights != nullptr ? args.top_k * 4 : 0);
    int warp = 0;
    for (uint32_t left = far; left != 0; left &= left - 1) {
      if (warp == threadIdx.x / 32) Reach::put(ll, __ffs(left) - 1, staged_row(ll, token, round), to, bytes);
      if (++warp == blockDim.x / 32) warp = 0;
    }
  }
}

// Where the row of place `rank * max_tokens + token` lands.
__device__ __forceinline__ uint8_t* landed_row(const LowLatency& ll, int place, uint32_t round) {
  const int row_bytes = static_cast<int>(ll.shape.row_bytes);
  return landing_place<uint8_t>(ll, own_buffer(ll), ll.layout.rows, round, 0, 0, row_bytes) +
         mul_wide(place, row_bytes);
}

// What a thread takes of a landed row in one step, if it is here: kLooks vectors, a block's width apart, a scale, and
// in the first step a routing weight. What the thread does not take is 0.
struct Glance {
  uint4 vectors[kLooks];
  uint32_t scale;
  uint32_t weight;
};

__device__ __forceinline__ int row_bytes_of(const LowLatencyDispatchArgs& args) {
  return static_cast<ScaleFormat>(args.scale_format) == ScaleFormat::kNone ? 2 * args.ll.shape.hidden
                                                                           : args.ll.shape.hidden;
}

__device__ __forceinline__ int vector_of_step(int step, int j) {
  return (kLooks * step + j) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int scale_of_step(int step) { return step * blockDim.x + threadIdx.x; }

__device__ __forceinline__ uint32_t* landed_scales(const LowLatencyDispatchArgs& args, uint8_t* landed) {
  return reinterpret_cast<uint32_t*>(landed + args.ll.shape.hidden);
}

__device__ __forceinline__ uint32_t* landed_weight(const LowLatencyDispatchArgs& args, uint8_t* landed) {
  return reinterpret_cast<uint32_t*>(landed + payload_bytes(args)) + threadIdx.x % 32;
}

// Looks at all that the thread takes in a step, side by side, so that one latency finds what is here.
__device__ __forceinline__ void glance_at(const LowLatencyDispatchArgs& args, uint8_t* landed, int step,
                                          Glance& glance) {
  const bool quantised = static_cast<ScaleFormat>(args.scale_format) != ScaleFormat::kNone;
#pragma unroll
  for (int j = 0; j < kLooks; ++j) {
    const int i = vector_of_step(step, j);
    if (i < row_bytes_of(args) / 16) glance.vectors[j] = ld_volatile(reinterpret_cast<const uint4*>(landed) + i);
  }
  const int i = scale_of_step(step);
  if (quantised && i < args.ll.shape.hidden / 128) glance.scale = ld_volatile(landed_scales(args, landed) + i);
  if (step == 0 && has_weight(args)) glance.weight = ld_volatile(landed_weight(args, landed));
}

__device__ __forceinline__ bool is_whole(const Glance& glance) {
  bool whole = glance.scale != kEmptyWord && glance.weight != kEmptyWord;
#pragma unroll
  for (int j = 0; j < kLooks; ++j) whole &= !is_empty(glance.vectors[j]);
  return whole;
}

// A (rank, token), and what is known of its row before its slots are.
struct Arrival {
  int place;      // rank * max_tokens + token
  int expert;     // a local one of the token, one each lane; or -1
  bool any;       // the row comes here
  Glance glance;  // of the first step; the row may be here before anybody knows its slots
};

// The row of an arrival into `slot` of every lane that has one, and the routing weights of its token to the handle.
__device__ inline void place_row(const LowLatencyDispatchArgs& args, Arrival& row, int slot, uint32_t round) {
  const LowLatency& ll = args.ll;
  const auto format = static_cast<ScaleFormat>(args.scale_format);
  const int row_bytes = row_bytes_of(args), vectors = row_bytes / 16, lane = threadIdx.x % 32;
  const int scales = format == ScaleFormat::kNone ? 0 : ll.shape.hidden / 128, packed = (scales + 3) / 4 * 4;
  const uint32_t wanted = __ballot_sync(~0u, slot >= 0);
  Glance& glance = row.glance;
  uint8_t* landed = landed_row(ll, row.place, round);
  // Threads of a warp go through the loops together, for the shuffles.
#pragma unroll 1
  for (int step = 0; kLooks * step * static_cast<int>(blockDim.x) < vectors; ++step) {
    if (step > 0) {
      glance = {};
      glance_at(args, landed, step, glance);
    }
    const int source = RankAndRest(row.place, ll.shape.max_tokens).rank;
    const bool whole = is_whole(glance) || wait_for(ll, Step::kRows, source, round, [&] {
                         glance_at(args, landed, step, glance);
                         return is_whole(glance);
                       });
    // What has come of a row that did not come whole is taken too.
    bool here[kLooks];
#pragma unroll
    for (int j = 0; j < kLooks; ++j)
      here[j] = vector_of_step(step, j) < vectors && (whole || !is_empty(glance.vectors[j]));
    const int scale = scale_of_step(step);
    const bool scale_here = scale < packed && glance.scale != kEmptyWord;  // behind the last scale: 0
#pragma unroll 1
    for (uint32_t left = wanted; left != 0; left &= left - 1) {
      const int target = __shfl_sync(~0u, slot, __ffs(left) - 1);
      uint4* placed = reinterpret_cast<uint4*>(args.rows + mul_wide(target, row_bytes));
#pragma unroll
      for (int j = 0; j < kLooks; ++j)
        if (here[j]) placed[vector_of_step(step, j)] = glance.vectors[j];
      if (!scale_here) continue;
      if (format == ScaleFormat::kUe8m0) {
        (static_cast<uint8_t*>(args.scales) + mul_wide(target, packed))[scale] = glance.scale >> 23;
      } else if (scale < scales) {
        (static_cast<uint32_t*>(args.scales) + mul_wide(target, scales))[scale] = glance.scale;
      }
    }
#pragma unroll
    for (int j = 0; j < kLooks; ++j)
      if (here[j]) empty(reinterpret_cast<uint4*>(landed) + vector_of_step(step, j));
    if (scale_here && scale < scales) st_volatile(landed_scales(args, landed) + scale, kEmptyWord);
    // Weights wanted or not: what a rank has sent must be taken.
    if (step == 0 && has_weight(args) && glance.weight != kEmptyWord) {
      args.weights[row.place * args.top_k + lane] = __uint_as_float(glance.weight);
      st_volatile(landed_weight(args, landed), kEmptyWord);
    }
  }
}

template <typename Reach>
__device__ Round send(const LowLatencyDispatchArgs& args) {
  const LowLatency& ll = args.ll;
  // All that the block's first token needs is read side by side, before any of it is used.
  uint32_t weight = load_weight(args, blockIdx.x);
  const uint32_t present = present_ranks(ll), round = ld_volatile(&ll.workspace->dispatches[blockIdx.x]) + 1;
  int64_t given = load_expert(args, blockIdx.x);
  Piece piece;
  load_piece(args, blockIdx.x, 0, piece);
  if constexpr (Reach::kPuts) put_routing<Reach>(args, round, present);
  for (int token = blockIdx.x; token < ll.shape.max_tokens; token += gridDim.x) {
    if (token != blockIdx.x) {
      load_piece(args, token, 0, piece);
      given = load_expert(args, token);
      weight = load_weight(args, token);
    }
    const uint32_t owners = send_routing<Reach>(args, token, given, round, present);
    if (owners != 0) send_row<Reach>(args, token, piece, weight, round, owners);
  }
  __syncthreads();  // all threads have read the counter
  if (threadIdx.x == 0) {
    ll.workspace->dispatches[blockIdx.x] = round;
    if (blockIdx.x == 0) *args.round = round;
  }
  return {round, present};
}

// The one of number `place`, if there is one. All threads of a warp.
__device__ __forceinline__ Arrival arrival(const LowLatencyDispatchArgs& args, const RoutingTable& table, int place,
                                           uint32_t round) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32, local_experts = ll.shape.experts_per_rank;
  const bool exists = place < ll.shape.ranks * ll.shape.max_tokens;
  Arrival row = {place, -1, false, {}};
  if (!exists) return row;
  if (lane < args.top_k) {
    const uint32_t entry = table.entries[place * table.stride + lane];
    const int local = static_cast<int>(entry & kNoExpert) - ll.rank * local_experts;
    if (entry == tagged(entry & kNoExpert, round) && local >= 0 && local < local_experts) row.expert = local;
  }
  row.any = __any_sync(~0u, row.expert >= 0);
  if (row.any) glance_at(args, landed_row(ll, place, round), 0, row.glance);
  return row;
}

__device__ inline void receive(const LowLatencyDispatchArgs& args, uint32_t round, uint32_t present,
                               uint4* shared_table) {
  const LowLatency& ll = args.ll;
  const int places = ll.shape.ranks * ll.shape.max_tokens;
  const int lane = threadIdx.x % 32;
  __shared__ Counts counts[2];
  const RoutingTable table = receive_routing(args, round, present, shared_table);
  Arrival row = arrival(args, table, blockIdx.x, round);
  count_experts(args, table, round, counts);  // while rows are on their way
  int turn = 0;
  while (row.place < places) {
    int slot = -1;
    if (row.any) {  // the same in all warps
      const int before = count_before(args, table, row.place, row.expert, round, counts[turn]);
      turn ^= 1;
      if (row.expert >= 0) slot = row.expert * places + before;
      place_row(args, row, slot, round);
    }
    if (threadIdx.x < args.top_k) {
      args.slots[row.place * args.top_k + lane] = slot;
      if (slot >= 0) args.source_token[slot] = RankAndRest(row.place, ll.shape.max_tokens).rest;
    }
    row = arrival(args, table, row.place + gridDim.x, round);
  }
}

template <typename Reach>
__global__ void __launch_bounds__(kMaxThreads, 2) dispatch(const __grid_constant__ LowLatencyDispatchArgs args) {
  const LowLatency& ll = args.ll;
  extern __shared__ __align__(16) uint4 shared_table[];
  griddepcontrol_launch_dependents();
  fetch_parameters(args);
  griddepcontrol_wait();
  const Round round = ll.phases & kSend ? send<Reach>(args) : Round{ld_volatile(args.round), present_ranks(ll)};
  if (ll.phases & kReceive) receive(args, round.number, round.present, shared_table);
}

// Runs the kernel above; requires blocks <= kMaxBlocks, two of them resident on a multiprocessor, the same in every
// call.
template <typename Reach>
const char* launch_low_latency_dispatch(const LowLatencyDispatchArgs& args, cudaStream_t stream) {
  return launch("low-latency dispatch kernel", dispatch<Reach>, args, args.ll.blocks, args.ll.threads, args.table_bytes,
                LaunchMode::kProgrammatic, stream);
}

}  // namespace ep_moe
