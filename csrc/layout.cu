// Routing exchange and layout: every rank learns which rows it receives, the place of each in a tensor that holds every
// row once, and which slots of its expert-major tensor each of them fills.
//
// What moves: each rank's routing (2 bytes an entry) and routing weights (4 bytes), from the rank to all ranks.
//
//   writer                       reader                     ordered by
//   routing, weights[e % 2]      peers, same round          chunk flag: st.release after __syncthreads / ld.acquire
//   (reuse of the copy)          peers, round e - 2         rule (1) of communicator.cuh
//   histogram (local)            all blocks, same round     grid barrier
//   results                      dispatch, beside the end   `placed`: st.release after end_round / ld.acquire
//
// Slots follow the order local expert, source rank, token, position among the token's top-k; rows the order source
// rank, token. Rows are counted like one more expert, behind the local ones, that every received token has: a `bin` is
// a local expert or the rows. Blocks own consecutive chunks of every rank's tokens; a histogram per block and a prefix
// sum over (rank, block) give each block the place of its first entry in each bin. Within a chunk a bit mask per (rank,
// bin) tells a token its place: no slot is handed out by an atomic counter, so the layout is the same in every run. The
// masks count the histogram too, before the barrier, and stay in shared memory where those of all chunks fit.
//
// Where other nodes sent a rank its tokens, these lie node by node (node_chunks.cuh). A table of shifts, from counts
// that the host knows, then makes the order expert, node, rank, token, which is that of the ranks the tokens came from.
//
// Loops are not unrolled here: the kernel runs once a dispatch, and the code of unrolled ones, which comes from a cold
// cache, took longer to fetch than it saved.
//
// A rank that brings more tokens than the buffers were made for sends what fits; the flags carry the true number, so
// that all ranks learn of it in the same round and can grow their buffers together.
#include "launch.cuh"
#include "layout_tables.cuh"

namespace ep_moe {
namespace {

constexpr int kThreads = kLayoutThreads;
constexpr int kColumnsAtOnce = 12;  // of the histogram that a thread reads side by side

// Turns the histograms of all blocks into where this block's entries of each rank start within each bin, and the total
// of each bin. The columns are summed in `parts` pieces side by side, each by one thread a bin.
__device__ void scan_blocks(const LayoutArgs& args, const Tables& tables) {
  const int bins = tables.bins, blocks = gridDim.x, columns = tables.ranks * blocks;
  const int width = (bins + 31) / 32 * 32, per_part = (columns + tables.parts - 1) / tables.parts;
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.parts * width; i += kThreads) {
    const int piece = i / width, bin = i - piece * width;
    if (bin >= bins) continue;
    const int start = piece * per_part, end = min(start + per_part, columns), block = blockIdx.x;
    int source = (start - block + blocks - 1) / blocks;  // whose column of this block comes next
    int sum = 0;
#pragma unroll 1
    for (int base = start; base < end; base += kColumnsAtOnce) {
      const int* column = args.histogram + static_cast<int64_t>(base) * bins + bin;
      const int count = end - base;
      int own = source * blocks + block - base;
      int counts[kColumnsAtOnce];
#pragma unroll
      for (int j = 0; j < kColumnsAtOnce; ++j, column += bins)  // all loads before the first use
        counts[j] = j < count ? __ldcg(column) : 0;
#pragma unroll
      for (int j = 0; j < kColumnsAtOnce; ++j) {
        if (j == own && j < count) {
          tables.next[source * bins + bin] = sum;
          source += 1;
          own += blocks;
        }
        sum += counts[j];
      }
    }
    tables.part_sums[piece * bins + bin] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.ranks * bins; i += kThreads) {
    const int source = i / bins, bin = i % bins;
    const int piece = (source * blocks + static_cast<int>(blockIdx.x)) / per_part;
#pragma unroll 1
    for (int before = 0; before < piece; ++before) tables.next[i] += tables.part_sums[before * bins + bin];
  }
#pragma unroll 1
  for (int bin = threadIdx.x; bin < bins; bin += kThreads) {
    int sum = 0;
#pragma unroll 1
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
#pragma unroll 1
  for (int base = 0; base < local_experts; base += 32) {
    const int expert = base + lane;
    const int size = expert < local_experts ? padded(tables.total[expert], args.alignment) : 0;
    int sum = size;
#pragma unroll 1
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
#pragma unroll 1
  for (int expert = lane; expert < local_experts; expert += 32) {  // what lies beyond max_rows is not there
    const int start = min(tables.bin_start[expert], args.max_rows), room = args.max_rows - start;
    args.counts[expert] = min(tables.total[expert], room);
    args.ends[expert] = start + min(padded(tables.total[expert], args.alignment), room);
  }
  uint32_t most_tokens = 0;
#pragma unroll 1
  for (int rank = 0; rank < tables.ranks; ++rank) most_tokens = max(most_tokens, tables.rank_tokens[rank]);
  if (args.host_counts == nullptr) {
    if (lane == 0 && most_tokens > static_cast<uint32_t>(comm.shape.max_tokens))
      report_fault(comm, Fault::kTokens, Step::kRouting, comm.rank, round, most_tokens, comm.shape.max_tokens);
    if (lane == 0 && slots > args.max_rows)
      report_fault(comm, Fault::kOverflow, Step::kRouting, comm.rank, round, slots, args.max_rows);
    else if (lane == 0 && tables.total[local_experts] > args.max_received)
      report_fault(comm, Fault::kOverflow, Step::kRouting, comm.rank, round, tables.total[local_experts],
                   args.max_received);
    return;
  }
#pragma unroll 1
  for (int bin = lane; bin < tables.bins; bin += 32) args.host_counts[2 + bin] = tables.total[bin];
  if (lane == 0) args.host_counts[1] = most_tokens;
  __syncwarp();
  __threadfence_system();  // sizes (and a fault) are in host memory before the host sees that they are
  if (lane == 0) args.host_counts[0] = 1;
}

// Slots that no row fills; each block takes some experts.
__device__ void fill_padding(const LayoutArgs& args, const Tables& tables) {
  if (args.alignment == 1) return;
#pragma unroll 1
  for (int expert = blockIdx.x; expert < tables.bins - 1; expert += gridDim.x) {
    const int start = tables.bin_start[expert], count = tables.total[expert];
    const int end = min(start + padded(count, args.alignment), args.max_rows);
#pragma unroll 1
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
#pragma unroll 1
  for (int64_t i = first + threadIdx.x; i < end; i += gridDim.x * kThreads) {
    args.received_topk_idx[i] = -1;
    if (args.received_topk_weights != nullptr) args.received_topk_weights[i] = 0.0f;
  }
}

// What a received row's source wants done with it, one entry.
__device__ __forceinline__ void place_received(const LayoutArgs& args, int row, int k, int expert, float weight) {
  const int64_t place = static_cast<int64_t>(row) * args.top_k + k;
  if (args.received_topk_idx != nullptr) args.received_topk_idx[place] = expert;
  if (args.received_topk_weights != nullptr) args.received_topk_weights[place] = expert < 0 ? 0.0f : weight;
}

// The places of all entries of a batch.
template <bool kFromNodes>
__device__ void place_batch(const LayoutArgs& args, const Tables& tables, Batch batch, bool repeated) {
  const int top_k = args.top_k, bins = tables.bins, row_bin = bins - 1;
  const int rank_entries = batch.chunks * kChunkTokens * top_k;
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.ranks * rank_entries; i += kThreads) {
    const Entry entry(i, top_k, args.comm.shape.max_tokens, batch);
    const uint32_t* masks = tables.masks + entry.source * batch.chunks * bins;
    const int* next = tables.next + entry.source * bins;
    const uint32_t before = (1u << entry.place) - 1;
    // Tokens of this rank in the bin that come before this one.
    auto earlier = [&](int bin) {
      int count = __popc(masks[entry.chunk * bins + bin] & before);
#pragma unroll 1
      for (int chunk = 0; chunk < entry.chunk; ++chunk) count += __popc(masks[chunk * bins + bin]);
      return count;
    };
    const int expert = tables.experts[i];
    int row = -1, slot = -1;
    if (masks[entry.chunk * bins + row_bin] >> entry.place & 1) row = next[row_bin] + earlier(row_bin);
    if (expert >= 0 && !repeated) slot = next[expert] + earlier(expert);
    if (expert >= 0 && repeated) {
      slot = next[expert];
#pragma unroll 1
      for (int j = entry.source * rank_entries; j < i; ++j) slot += tables.experts[j] == expert;
    }
    if (kFromNodes && row >= 0) {
      const int token = static_cast<int>(entry.token - entry.source * args.comm.shape.max_tokens);
      const int node = args.nodes.node_of(entry.source, token);
      const int32_t* shifts = args.shifts + (entry.source * args.nodes.nodes + node) * bins;
      row += shifts[row_bin];
      if (slot >= 0) slot += shifts[expert];
    }
    if (row >= args.max_received) row = -1;
    if (slot >= args.max_rows) slot = -1;
    args.slots[static_cast<int64_t>(entry.token) * top_k + entry.k] = slot;
    if (entry.k == 0) args.rows[entry.token] = row;
    const float weight = tables.weights[i];  // of entries that are not ours, whatever was there
    if (row >= 0) place_received(args, row, entry.k, expert, weight);
    if (slot < 0) continue;
    args.row_of_slot[slot] = row;
    if (args.slot_weights != nullptr) args.slot_weights[slot] = weight;
  }
  __syncthreads();
}

// Two could be resident, that is, it takes half of the registers: the rest is for the push.
template <bool kFromNodes>
__global__ void __launch_bounds__(kThreads, 2) layout_kernel(const __grid_constant__ LayoutArgs args) {
  const Communicator& comm = args.comm;
  const int ranks = comm.shape.ranks, local_experts = args.num_experts / ranks, tid = threadIdx.x;
  extern __shared__ int shared[];
  const uint32_t round = begin_round(comm);
  const Share share = my_chunks(comm);
  const LocalRouting local = {args.topk_idx, args.topk_weights, args.owners, args.tokens, args.top_k, args.num_experts};
  const SentShare sent(comm, local, share);
  const SentEntry first_entry = sent.entry(local, tid);  // under way while the rest is prepared

  if (tid == 0) {
    if (blockIdx.x == 0) {
      comm.workspace->placed = 0;
      __threadfence();  // dispatch, which starts once all blocks have passed here, does not see the last layout's 1
    }
    griddepcontrol_launch_dependents();  // the push, or the exchange between nodes
  }
  const int share_chunks = share.end_chunk - share.first_chunk;
  const int batch_chunks = Tables::batch_chunks(ranks, local_experts, args.top_k, max(share_chunks, 1));
  const Tables tables(shared, ranks, local_experts, args.top_k, batch_chunks);
  const int pairs = ranks * tables.bins;
#pragma unroll 1
  for (int i = tid; i < pairs; i += kThreads) tables.next[i] = 0;
  if (tid < ranks) tables.rank_tokens[tid] = 0;
  send_routing(comm, local, share, sent, first_entry, round);
#pragma unroll 1
  for (int i = tid; i < ranks * share_chunks; i += kThreads) {
    const int source = i / share_chunks;
    // Also says that the rank has entered the round, which rule (1) asks block 0 to wait for: it always has a chunk.
    const int tokens = wait_chunk(comm, source, share.first_chunk + i % share_chunks, round);
    atomicMax(&tables.rank_tokens[source], tokens);  // the same from every chunk
  }
  __syncthreads();

  const int64_t copy_start = static_cast<int64_t>(round % 2) * ranks * comm.shape.max_tokens;
  const Routing routing = {
      part<uint16_t>(comm, comm.rank, comm.layout.routing) + copy_start * routing_stride(comm.shape.max_top_k),
      routing_stride(comm.shape.max_top_k), comm.rank * local_experts, local_experts};
  const float* weights = part<float>(comm, comm.rank, comm.layout.weights) + copy_start * comm.shape.max_top_k;

  // First every batch is counted, then, behind the barrier, every batch is placed; a single one is read only once.
  bool repeated = false;
  const bool once = share_chunks <= batch_chunks;
#pragma unroll 1
  for (int placing = 0; placing < 2; ++placing) {
#pragma unroll 1
    for (int chunk = 0; chunk < share_chunks; chunk += batch_chunks) {
      const Batch batch = {static_cast<uint32_t>(share.first_chunk + chunk) * kChunkTokens,
                           static_cast<uint32_t>(min(batch_chunks, share_chunks - chunk))};
      if (placing == 0 || !once) repeated = read_batch(args, routing, tables, weights, batch);
      if (placing == 1) place_batch<kFromNodes>(args, tables, batch, repeated);
      if (placing == 0 || !once) count_batch(args, tables, batch, repeated);
    }
    if (placing == 1) break;
#pragma unroll 1
    for (int i = tid; i < pairs; i += kThreads) {
      const int64_t column = static_cast<int64_t>(i / tables.bins) * gridDim.x + blockIdx.x;
      args.histogram[column * tables.bins + i % tables.bins] = tables.next[i];
    }
    grid_barrier(comm);
    scan_blocks(args, tables);
    if (tid < 32) {
      const int slots = place_segments(args, tables, tid);
      if (blockIdx.x == 0) publish_rows_per_rank(args, tables, tid);
      if (blockIdx.x == 0) publish_sizes(args, tables, slots, round, tid);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < pairs; i += kThreads) tables.next[i] += tables.bin_start[i % tables.bins];
    __syncthreads();
    fill_padding(args, tables);
    fill_unused(args, tables);
  }
  if (end_round(comm, round)) st_release_gpu(&comm.workspace->placed, 1);  // pairs with wait_placed of dispatch.cu
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above. All pointers but the host ones are on the device; requires 1 <= blocks <= multiprocessors.
EP_MOE_API const char* ep_moe_layout(const ep_moe::LayoutArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const int ranks = args->comm.shape.ranks, local_experts = args->num_experts / ranks;
  const int chunks = args->comm.shape.max_tokens / kChunkTokens, blocks = args->comm.blocks;
  const int batch_chunks = Tables::batch_chunks(ranks, local_experts, args->top_k, (chunks + blocks - 1) / blocks);
  const int shared_bytes = Tables::bytes(ranks, local_experts, args->top_k, batch_chunks);
  const auto kernel = args->shifts != nullptr ? layout_kernel<true> : layout_kernel<false>;
  return launch("layout kernel", kernel, *args, args->comm.blocks, kThreads, shared_bytes, LaunchMode::kCooperative,
                stream);
}

EP_MOE_API size_t ep_moe_layout_args_bytes() { return sizeof(ep_moe::LayoutArgs); }
