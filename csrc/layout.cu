// Routing exchange and layout: every rank learns which rows it receives, the place of each in a tensor that holds every
// row once, and which slots of its expert-major tensor each of them fills.
//
// What moves: each rank's routing (2 bytes an entry) and routing weights (4 bytes), from the rank to all ranks.
//
//   writer                       reader                     ordered by
//   routing, weights[e % 2]      peers, same round          chunk flag: st.release after __syncthreads / ld.acquire
//   (reuse of the copy)          peers, round e - 2         rule (1) of communicator.cuh
//   histogram (local)            all blocks, same round     grid barrier
//
// Slots follow the order local expert, source rank, token, position among the token's top-k; rows the order source
// rank, token. Rows are counted like one more expert, behind the local ones, that every received token has: a `bin` is
// a local expert or the rows. Blocks own consecutive chunks of every rank's tokens; a histogram per block and a prefix
// sum over (rank, block) give each block the place of its first entry in each bin. Within a chunk a bit mask per (rank,
// bin) tells a token its place: no slot is handed out by an atomic counter, so the layout is the same in every run.
//
// A rank that brings more tokens than the buffers were made for sends what fits; the flags carry the true number, so
// that all ranks learn of it in the same round and can grow their buffers together.
#include "launch.cuh"
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
  int32_t alignment;     // of segments
  int32_t max_rows;      // slots there is room for; what lies beyond gets none
  int32_t max_received;  // rows there is room for; what lies beyond has no place
};

namespace {

constexpr int kThreads = 1024;
constexpr int kColumnsAtOnce = 8;  // of the histogram that a thread reads side by side

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

  __device__ int local(int64_t token, int k) const { return local(table[token * stride + k]); }
};

// Entry i of a chunk: of all ranks, tokens and top-k positions.
struct ChunkEntry {
  int source;
  int place;  // of the token in the chunk
  int k;
  int expert;     // local, or -1
  int64_t token;  // row of tables indexed [rank][max_tokens]
};

__device__ __forceinline__ ChunkEntry chunk_entry(int i, const LayoutArgs& args, const Routing& routing,
                                                  const int* rank_tokens, int first_token) {
  ChunkEntry entry;
  entry.k = i % args.top_k;
  entry.place = i / args.top_k % kChunkTokens;
  entry.source = i / (args.top_k * kChunkTokens);
  entry.token = static_cast<int64_t>(entry.source) * args.comm.shape.max_tokens + first_token + entry.place;
  const bool real = first_token + entry.place < rank_tokens[entry.source];
  entry.expert = real ? routing.local(entry.token, entry.k) : -1;
  return entry;
}

// Entries of the same chunk, rank and expert that come first in (token, top-k position) order.
__device__ int count_before(const ChunkEntry& entry, const Routing& routing, int top_k) {
  int count = 0;
  for (int place = 0; place <= entry.place; ++place)
    for (int k = 0; k < (place < entry.place ? top_k : entry.k); ++k)
      count += routing.local(entry.token - entry.place + place, k) == entry.expert;
  return count;
}

// A block's shared memory.
struct Tables {
  int* next;         // [ranks][bins]: histogram, then the next free place
  uint32_t* masks;   // [ranks][bins]: tokens of the chunk
  int* bin_start;    // [bins]
  int* total;        // [bins]
  int* part_sums;    // [parts][bins]
  int* rank_tokens;  // [ranks]: tokens of each rank
  int ranks, bins, parts;

  __device__ Tables(int* shared, int ranks, int local_experts) : ranks(ranks), bins(local_experts + 1) {
    const int width = (bins + 31) / 32 * 32, pairs = ranks * bins;
    parts = max(kThreads / width, 1);
    next = shared;
    masks = reinterpret_cast<uint32_t*>(next + pairs);
    bin_start = next + 2 * pairs;
    total = bin_start + bins;
    rank_tokens = total + bins;
    part_sums = rank_tokens + ranks;
  }

  // Of 4 bytes each.
  static __host__ __device__ int words(int ranks, int local_experts) {
    const int bins = local_experts + 1;
    return 2 * ranks * bins + 2 * bins + ranks + (kThreads > bins ? kThreads : bins);
  }
};

// How many entries of each rank's share fall into each bin.
__device__ void count_share(const LayoutArgs& args, const Routing& routing, const Tables& tables, Share share) {
  const int share_tokens = (share.end_chunk - share.first_chunk) * kChunkTokens;
  for (int i = threadIdx.x; i < tables.ranks * share_tokens; i += kThreads) {
    const int source = i / share_tokens, token = share.first_chunk * kChunkTokens + i % share_tokens;
    if (token >= tables.rank_tokens[source]) continue;
    const int64_t entry = static_cast<int64_t>(source) * args.comm.shape.max_tokens + token;
    bool wanted = false;
    for (int base = 0; base < args.top_k; base += 8) {  // entries behind the last are not routed
      const uint4 piece = *reinterpret_cast<const uint4*>(routing.table + entry * routing.stride + base);
      const uint16_t* entries = reinterpret_cast<const uint16_t*>(&piece);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int expert = routing.local(entries[i]);
        if (expert < 0) continue;
        wanted = true;
        atomicAdd(&tables.next[source * tables.bins + expert], 1);
      }
    }
    if (wanted) atomicAdd(&tables.next[source * tables.bins + tables.bins - 1], 1);
  }
}

// Turns the histograms of all blocks into where this block's entries of each rank start within each bin, and the total
// of each bin. The columns are summed in `parts` pieces side by side, each by one thread a bin.
__device__ void scan_blocks(const LayoutArgs& args, const Tables& tables) {
  const int bins = tables.bins, blocks = gridDim.x, columns = tables.ranks * blocks;
  const int width = (bins + 31) / 32 * 32, per_part = (columns + tables.parts - 1) / tables.parts;
  for (int i = threadIdx.x; i < tables.parts * width; i += kThreads) {
    const int piece = i / width, bin = i % width;
    if (bin >= bins) continue;
    const int start = piece * per_part, end = min(start + per_part, columns), block = blockIdx.x;
    int source = (start - block + blocks - 1) / blocks;  // whose column of this block comes next
    int sum = 0;
    for (int base = start; base < end; base += kColumnsAtOnce) {
      int counts[kColumnsAtOnce];
#pragma unroll
      for (int j = 0; j < kColumnsAtOnce; ++j)  // all loads before the first use, also of the last columns
        counts[j] = base + j < end ? __ldcg(&args.histogram[static_cast<int64_t>(base + j) * bins + bin]) : 0;
#pragma unroll
      for (int j = 0; j < kColumnsAtOnce; ++j) {
        if (base + j == source * blocks + block && base + j < end) tables.next[source++ * bins + bin] = sum;
        sum += counts[j];
      }
    }
    tables.part_sums[piece * bins + bin] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tables.ranks * bins; i += kThreads) {
    const int source = i / bins, bin = i % bins;
    const int piece = (source * blocks + static_cast<int>(blockIdx.x)) / per_part;
    for (int before = 0; before < piece; ++before) tables.next[i] += tables.part_sums[before * bins + bin];
  }
  for (int bin = threadIdx.x; bin < bins; bin += kThreads) {
    int sum = 0;
    for (int piece = 0; piece < tables.parts; ++piece) sum += tables.part_sums[piece * bins + bin];
    tables.total[bin] = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ int padded(int count, int alignment) {
  return (count + alignment - 1) / alignment * alignment;
}

// One warp: where each expert's segment starts, by a scan of the padded sizes; rows start at 0. Returns all slots.
__device__ int place_segments(const LayoutArgs& args, const Tables& tables, int lane) {
  const int local_experts = tables.bins - 1;
  int carry = 0;
  for (int base = 0; base < local_experts; base += 32) {
    const int expert = base + lane;
    const int size = expert < local_experts ? padded(tables.total[expert], args.alignment) : 0;
    int sum = size;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += below;
    }
    if (expert < local_experts) tables.bin_start[expert] = carry + sum - size;
    carry += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) tables.bin_start[local_experts] = 0;
  return carry;
}

// One warp of block 0, whose rows of a rank are the first of that rank: how many rows of each rank have a place.
__device__ void publish_rows_per_rank(const LayoutArgs& args, const Tables& tables, int lane) {
  const int row_bin = tables.bins - 1;
  if (args.rows_per_rank == nullptr || lane >= tables.ranks) return;
  const int start = tables.next[lane * tables.bins + row_bin];
  const int end = lane + 1 < tables.ranks ? tables.next[(lane + 1) * tables.bins + row_bin] : tables.total[row_bin];
  args.rows_per_rank[lane] = min(end, args.max_received) - min(start, args.max_received);
}

// One warp of one block: sizes to the device and, where the host waits for them, to the host; faults to the host.
__device__ void publish_sizes(const LayoutArgs& args, const Tables& tables, int slots, uint32_t round, int lane) {
  const Communicator& comm = args.comm;
  const int local_experts = tables.bins - 1;
  for (int expert = lane; expert < local_experts; expert += 32) {  // what lies beyond max_rows is not there
    const int start = min(tables.bin_start[expert], args.max_rows), room = args.max_rows - start;
    args.counts[expert] = min(tables.total[expert], room);
    args.ends[expert] = start + min(padded(tables.total[expert], args.alignment), room);
  }
  int most_tokens = 0;
  for (int rank = 0; rank < tables.ranks; ++rank) most_tokens = max(most_tokens, tables.rank_tokens[rank]);
  if (args.host_counts == nullptr) {
    if (lane == 0 && most_tokens > comm.shape.max_tokens)
      report_fault(comm, Fault::kTokens, Step::kRouting, comm.rank, round, most_tokens, comm.shape.max_tokens);
    if (lane == 0 && slots > args.max_rows)
      report_fault(comm, Fault::kOverflow, Step::kRouting, comm.rank, round, slots, args.max_rows);
    else if (lane == 0 && tables.total[local_experts] > args.max_received)
      report_fault(comm, Fault::kOverflow, Step::kRouting, comm.rank, round, tables.total[local_experts],
                   args.max_received);
    return;
  }
  for (int bin = lane; bin < tables.bins; bin += 32) args.host_counts[2 + bin] = tables.total[bin];
  if (lane == 0) args.host_counts[1] = most_tokens;
  __syncwarp();
  __threadfence_system();  // sizes (and a fault) are in host memory before the host sees that they are
  if (lane == 0) args.host_counts[0] = 1;
}

// Slots that no row fills; each block takes some experts.
__device__ void fill_padding(const LayoutArgs& args, const Tables& tables) {
  if (args.alignment == 1) return;
  for (int expert = blockIdx.x; expert < tables.bins - 1; expert += gridDim.x) {
    const int start = tables.bin_start[expert], count = tables.total[expert];
    const int end = min(start + padded(count, args.alignment), args.max_rows);
    for (int slot = start + count + threadIdx.x; slot < end; slot += kThreads) {
      args.row_of_slot[slot] = -1;
      if (args.slot_weights != nullptr) args.slot_weights[slot] = 0.0f;
    }
  }
}

// Entries of rows that did not come, which nobody else fills where the host does not know how many did.
__device__ void fill_unused(const LayoutArgs& args, const Tables& tables) {
  if (args.received_topk_idx == nullptr || args.host_counts != nullptr) return;
  const int64_t first = static_cast<int64_t>(tables.total[tables.bins - 1]) * args.top_k + blockIdx.x * kThreads;
  const int64_t end = static_cast<int64_t>(args.max_received) * args.top_k;
  for (int64_t i = first + threadIdx.x; i < end; i += gridDim.x * kThreads) {
    args.received_topk_idx[i] = -1;
    if (args.received_topk_weights != nullptr) args.received_topk_weights[i] = 0.0f;
  }
}

// What a received row's source wants done with it, one entry.
__device__ __forceinline__ void place_received(const LayoutArgs& args, const ChunkEntry& entry, int row,
                                               const float* weights) {
  const int64_t place = static_cast<int64_t>(row) * args.top_k + entry.k;
  if (args.received_topk_idx != nullptr) args.received_topk_idx[place] = entry.expert;
  if (args.received_topk_weights == nullptr) return;
  args.received_topk_weights[place] =
      entry.expert < 0 ? 0.0f : weights[entry.token * args.comm.shape.max_top_k + entry.k];
}

// The places of all entries of one chunk of every rank's tokens.
__device__ void place_chunk(const LayoutArgs& args, const Routing& routing, const Tables& tables, const float* weights,
                            int first_token) {
  const int top_k = args.top_k, bins = tables.bins, row_bin = bins - 1;
  const int entries = tables.ranks * kChunkTokens * top_k, pairs = tables.ranks * bins;
  for (int i = threadIdx.x; i < pairs; i += kThreads) tables.masks[i] = 0;
  __syncthreads();
  bool repeated = false;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const ChunkEntry entry = chunk_entry(i, args, routing, tables.rank_tokens, first_token);
    if (entry.expert < 0) continue;
    const uint32_t bit = 1u << entry.place;
    repeated |= (atomicOr(&tables.masks[entry.source * bins + entry.expert], bit) & bit) != 0;
    atomicOr(&tables.masks[entry.source * bins + row_bin], bit);
  }
  // A token that names an expert twice fills two slots, which one bit cannot say: such a chunk is counted out.
  repeated = __syncthreads_or(repeated);
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const ChunkEntry entry = chunk_entry(i, args, routing, tables.rank_tokens, first_token);
    const uint32_t before = (1u << entry.place) - 1, rows = tables.masks[entry.source * bins + row_bin];
    int row = -1, slot = -1;
    if (rows >> entry.place & 1) row = tables.next[entry.source * bins + row_bin] + __popc(rows & before);
    if (entry.expert >= 0) {
      const int pair = entry.source * bins + entry.expert;
      slot = tables.next[pair] + (repeated ? count_before(entry, routing, top_k) : __popc(tables.masks[pair] & before));
    }
    if (row >= args.max_received) row = -1;
    if (slot >= args.max_rows) slot = -1;
    args.slots[entry.token * top_k + entry.k] = slot;
    if (entry.k == 0) args.rows[entry.token] = row;
    if (row >= 0) place_received(args, entry, row, weights);
    if (slot < 0) continue;
    args.row_of_slot[slot] = row;
    if (args.slot_weights != nullptr)
      args.slot_weights[slot] = weights[entry.token * args.comm.shape.max_top_k + entry.k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += kThreads)
    if (!repeated || i % bins == row_bin) tables.next[i] += __popc(tables.masks[i]);
  if (repeated) {
    for (int i = threadIdx.x; i < entries; i += kThreads) {
      const ChunkEntry entry = chunk_entry(i, args, routing, tables.rank_tokens, first_token);
      if (entry.expert >= 0) atomicAdd(&tables.next[entry.source * bins + entry.expert], 1);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1) layout_kernel(const __grid_constant__ LayoutArgs args) {
  const Communicator& comm = args.comm;
  const int ranks = comm.shape.ranks, local_experts = args.num_experts / ranks, tid = threadIdx.x;
  extern __shared__ int shared[];
  const Tables tables(shared, ranks, local_experts);
  const int pairs = ranks * tables.bins;
  const uint32_t round = begin_round(comm);
  const Share share = my_chunks(comm);
  const int share_chunks = share.end_chunk - share.first_chunk;

  griddepcontrol_launch_dependents();  // staging
  announce_round(comm, round);
  send_routing(comm, {args.topk_idx, args.topk_weights, args.owners, args.tokens, args.top_k, args.num_experts}, share,
               round);
  for (int i = tid; i < pairs; i += kThreads) tables.next[i] = 0;
  if (tid < ranks) tables.rank_tokens[tid] = 0;
  __syncthreads();
  for (int i = tid; i < ranks * share_chunks; i += kThreads) {
    const int source = i / share_chunks;
    const int tokens = wait_chunk(comm, source, share.first_chunk + i % share_chunks, round);
    atomicMax(&tables.rank_tokens[source], tokens);  // the same from every chunk
  }
  __syncthreads();

  const int64_t copy_start = static_cast<int64_t>(round % 2) * ranks * comm.shape.max_tokens;
  const Routing routing = {
      part<uint16_t>(comm, comm.rank, comm.layout.routing) + copy_start * routing_stride(comm.shape.max_top_k),
      routing_stride(comm.shape.max_top_k), comm.rank * local_experts, local_experts};
  const float* weights = part<float>(comm, comm.rank, comm.layout.weights) + copy_start * comm.shape.max_top_k;

  count_share(args, routing, tables, share);
  __syncthreads();
  for (int i = tid; i < pairs; i += kThreads) {
    const int64_t column = static_cast<int64_t>(i / tables.bins) * gridDim.x + blockIdx.x;
    args.histogram[column * tables.bins + i % tables.bins] = tables.next[i];
  }
  grid_barrier(comm, round);
  scan_blocks(args, tables);
  if (tid < 32) {
    const int slots = place_segments(args, tables, tid);
    if (blockIdx.x == 0) publish_rows_per_rank(args, tables, tid);
    if (blockIdx.x == 0) publish_sizes(args, tables, slots, round, tid);
  }
  __syncthreads();
  for (int i = tid; i < pairs; i += kThreads) tables.next[i] += tables.bin_start[i % tables.bins];
  __syncthreads();
  fill_padding(args, tables);
  fill_unused(args, tables);
  for (int chunk = 0; chunk < share_chunks; ++chunk)
    place_chunk(args, routing, tables, weights, (share.first_chunk + chunk) * kChunkTokens);
  if (blockIdx.x == 0 && tid < ranks) wait_entered(comm, Step::kRouting, tid, round);  // rule (1)
  end_round(comm, round);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above. All pointers but the host ones are on the device; requires 1 <= blocks <= multiprocessors.
EP_MOE_API const char* ep_moe_layout(const ep_moe::LayoutArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const int ranks = args->comm.shape.ranks;
  const int shared_bytes = 4 * Tables::words(ranks, args->num_experts / ranks);
  return launch("layout kernel", layout_kernel, *args, args->comm.blocks, kThreads, shared_bytes,
                LaunchMode::kCooperative, stream);
}

EP_MOE_API size_t ep_moe_layout_args_bytes() { return sizeof(ep_moe::LayoutArgs); }
