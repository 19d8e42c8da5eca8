// What a block of the layout kernel (layout.cu) keeps in shared memory: the routing of its share of every rank's
// tokens, a batch of chunks at a time, as bit masks of tokens, and what they count.
#pragma once

#include "node_chunks.cuh"
#include "routing_exchange.cuh"

namespace ep_moe {

struct LayoutArgs {
  Communicator comm;
  const int64_t* topk_idx;        // [tokens][top_k], global expert or -1
  const float* topk_weights;      // [tokens][top_k], or nullptr
  int32_t* slots;                 // out [ranks][max_tokens][top_k]: slot of each arrived entry, or -1
  int32_t* rows;                  // out [ranks][max_tokens]: place of each received row, or -1
  int32_t* row_of_slot;           // out [max_rows]: the row that fills each slot, or -1 in padding
  uint8_t* owners;                // out [tokens]: bit r says that rank r has an expert of this token
  float* slot_weights;            // out [max_rows], 0 in padding; or nullptr
  int64_t* received_topk_idx;     // out [max_received][top_k]: local expert or -1, of received rows; or nullptr
  float* received_topk_weights;   // out [max_received][top_k], 0 where the expert is elsewhere; or nullptr
  int64_t* rows_per_rank;         // out [ranks]: received rows of each rank there is room for; or nullptr
  int64_t* counts;                // out [local_experts]: real slots there is room for
  int32_t* ends;                  // out [local_experts]: end of each segment, padding included, at most max_rows
  int32_t* histogram;             // scratch [ranks * blocks][bins]
  volatile int32_t* host_counts;  // out, host memory [2 + bins]: 1 once the rest is there, most tokens of a rank, then
                                  // the entries of each bin; or nullptr
  int32_t tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t alignment;      // of segments
  int32_t max_rows;       // slots there is room for; what lies beyond gets none
  int32_t max_received;   // rows there is room for; what lies beyond has no place
  NodeChunks nodes;       // that tokens came from, if `shifts`
  const int32_t* shifts;  // [ranks][nodes][bins]: by how much places move so that slots are ordered by expert, node,
                          // rank and token, rows by node, rank and token; nullptr leaves nodes behind ranks
};

namespace {

constexpr int kLayoutThreads = 512;     // which leave staging room beside them
constexpr int kBatchBytes = 96 * 1024;  // of shared memory for chunks that are placed together
constexpr int kEntriesAtOnce = 2;       // that a thread reads side by side

// The part of the routing tables that one block works on.
struct Routing {
  const uint16_t* table;
  int stride;
  int first_expert;
  int local_experts;

  // An entry as local expert, or -1.
  __device__ int local(uint16_t entry) const {
    const int expert = static_cast<int>(entry) - first_expert;
    return expert >= 0 && expert < local_experts ? expert : -1;
  }
};

// Chunks, of every rank's tokens, that are placed together.
struct Batch {
  uint32_t first_token;
  uint32_t chunks;
};

// Entry i of a batch: of all ranks, their tokens and top-k positions, in this order.
struct Entry {
  uint32_t k;
  uint32_t place;  // of the token in its chunk
  uint32_t chunk;  // of the batch
  uint32_t source;
  uint32_t token;  // row of tables indexed [rank][max_tokens]

  __device__ Entry(uint32_t i, uint32_t top_k, uint32_t max_tokens, Batch batch) {
    const uint32_t row = i / top_k, chunk_of_all = row / kChunkTokens;
    k = i - row * top_k;
    place = row % kChunkTokens;
    source = chunk_of_all / batch.chunks;
    chunk = chunk_of_all - source * batch.chunks;
    token = source * max_tokens + batch.first_token + row - source * batch.chunks * kChunkTokens;
  }
};

// A block's shared memory.
struct Tables {
  int* next;              // [ranks][bins]: histogram, then the next free place
  int* bin_start;         // [bins]
  int* total;             // [bins]
  int* part_sums;         // [parts][bins]
  uint32_t* rank_tokens;  // [ranks]: tokens of each rank
  uint32_t* masks;        // [ranks][chunks of the batch][bins]: tokens of a chunk
  float* weights;         // of the entries of the batch
  int16_t* experts;       // of the entries of the batch: local, or -1
  int ranks, bins, parts;

  __device__ Tables(int* shared, int ranks, int local_experts, int top_k, int batch_chunks)
      : ranks(ranks), bins(local_experts + 1) {
    const int width = (bins + 31) / 32 * 32, pairs = ranks * bins;
    parts = max(kLayoutThreads / width, 1);
    next = shared;
    bin_start = next + pairs;
    total = bin_start + bins;
    part_sums = total + bins;
    rank_tokens = reinterpret_cast<uint32_t*>(part_sums + max(kLayoutThreads, bins));
    masks = rank_tokens + ranks;
    weights = reinterpret_cast<float*>(masks + pairs * batch_chunks);
    experts = reinterpret_cast<int16_t*>(weights + ranks * batch_chunks * kChunkTokens * top_k);
  }

  static __host__ __device__ int chunk_bytes(int ranks, int local_experts, int top_k) {
    return ranks * ((local_experts + 1) * 4 + kChunkTokens * top_k * 6);
  }

  // How many of `chunks` are placed together.
  static __host__ __device__ int batch_chunks(int ranks, int local_experts, int top_k, int chunks) {
    const int fit = kBatchBytes / chunk_bytes(ranks, local_experts, top_k);
    return fit < 1 ? 1 : fit < chunks ? fit : chunks;
  }

  static __host__ __device__ int bytes(int ranks, int local_experts, int top_k, int batch_chunks) {
    const int bins = local_experts + 1;
    return 4 * (ranks * bins + 2 * bins + ranks + (kLayoutThreads > bins ? kLayoutThreads : bins)) +
           chunk_bytes(ranks, local_experts, top_k) * batch_chunks;
  }
};

// Fills masks, experts and weights of a batch. True, for all threads, if a token names an expert twice: it then fills
// two slots, which one bit cannot say, and the entries of the batch are counted out instead.
__device__ bool read_batch(const LayoutArgs& args, const Routing& routing, const Tables& tables, const float* weights,
                           Batch batch) {
  const int masks = tables.ranks * batch.chunks * tables.bins;
  const int entries = tables.ranks * batch.chunks * kChunkTokens * args.top_k;
  const bool wanted = args.slot_weights != nullptr || args.received_topk_weights != nullptr;  // weights
#pragma unroll 1
  for (int i = threadIdx.x; i < masks; i += kLayoutThreads) tables.masks[i] = 0;
  __syncthreads();
  bool repeated = false;
#pragma unroll 1
  for (int base = threadIdx.x; base < entries; base += kEntriesAtOnce * kLayoutThreads) {
    uint16_t routed[kEntriesAtOnce];
    float weight[kEntriesAtOnce];
    uint32_t* bins[kEntriesAtOnce];
    uint32_t bit[kEntriesAtOnce];
#pragma unroll
    for (int j = 0; j < kEntriesAtOnce; ++j) {  // all loads before the first use, of entries that did not come too
      const int i = base + j * kLayoutThreads;
      if (i >= entries) break;
      const Entry entry(i, args.top_k, args.comm.shape.max_tokens, batch);
      const uint32_t in_rank = batch.first_token + entry.chunk * kChunkTokens + entry.place;
      routed[j] = routing.table[static_cast<int64_t>(entry.token) * routing.stride + entry.k];
      if (wanted) weight[j] = weights[static_cast<int64_t>(entry.token) * args.comm.shape.max_top_k + entry.k];
      bins[j] = tables.masks + (entry.source * batch.chunks + entry.chunk) * tables.bins;
      bit[j] = in_rank < tables.rank_tokens[entry.source] ? 1u << entry.place : 0u;
    }
#pragma unroll
    for (int j = 0; j < kEntriesAtOnce; ++j) {
      const int i = base + j * kLayoutThreads;
      if (i >= entries) break;
      const int expert = bit[j] != 0 ? routing.local(routed[j]) : -1;
      tables.experts[i] = static_cast<int16_t>(expert);
      if (wanted) tables.weights[i] = weight[j];  // of entries that are not ours, whatever was there
      if (expert >= 0) repeated |= (atomicOr(&bins[j][expert], bit[j]) & bit[j]) != 0;
      // Chunks hold a multiple of 32 entries, so a warp has entries of one chunk, and all of its lanes are here.
      const uint32_t tokens = __reduce_or_sync(~0u, expert >= 0 ? bit[j] : 0u);
      if (threadIdx.x % 32 == 0) atomicOr(&bins[j][tables.bins - 1], tokens);
    }
  }
  return __syncthreads_or(repeated);
}

// Adds the entries of a batch to `next`.
__device__ void count_batch(const LayoutArgs& args, const Tables& tables, Batch batch, bool repeated) {
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.ranks * tables.bins; i += kLayoutThreads) {
    const int source = i / tables.bins, bin = i % tables.bins;
    if (repeated && bin != tables.bins - 1) continue;
    int sum = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < batch.chunks; ++chunk)
      sum += __popc(tables.masks[(source * batch.chunks + chunk) * tables.bins + bin]);
    tables.next[i] += sum;
  }
  if (repeated) {
    const int rank_entries = batch.chunks * kChunkTokens * args.top_k;
#pragma unroll 1
    for (int i = threadIdx.x; i < tables.ranks * rank_entries; i += kLayoutThreads)
      if (tables.experts[i] >= 0) atomicAdd(&tables.next[i / rank_entries * tables.bins + tables.experts[i]], 1);
  }
  __syncthreads();
}

}  // namespace
}  // namespace ep_moe
