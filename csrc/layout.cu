// Routing exchange and layout: every rank learns which rows it receives and which slots of its expert-major tensor
// each of them fills.
//
// What moves: each rank's routing (2 bytes an entry) and routing weights (4 bytes), from the rank to all ranks.
//
//   writer                       reader                     ordered by
//   routing, weights[e % 2]      peers, same round          chunk flag: st.release after __syncthreads / ld.acquire
//   (reuse of the copy)          peers, round e - 2         rule (1) of communicator.cuh
//   histogram (local)            all blocks, same round     grid barrier
//
// Slots follow the order local expert, source rank, token, position among the token's top-k. Blocks own consecutive
// chunks of every rank's tokens; a histogram per block and a prefix sum over (rank, block) give each block the place
// of its first row in each expert's segment. Within a chunk a bit mask per (rank, expert) tells a token its place:
// no slot is handed out by an atomic counter, so the layout is the same in every run.
#include "communicator.cuh"
#include "launch.cuh"

namespace ep_moe {

struct LayoutArgs {
  Communicator comm;
  const int64_t* topk_idx;        // [tokens][top_k], global expert or -1
  const float* topk_weights;      // [tokens][top_k], or nullptr
  int32_t* slots;                 // out [ranks][max_tokens][top_k]: slot of each arrived entry, or -1
  uint8_t* owners;                // out [tokens]: bit r says that rank r has an expert of this token
  float* row_weights;             // out [max_rows], or nullptr
  int64_t* counts;                // out [local_experts]: real rows
  int32_t* ends;                  // out [local_experts]: end of each segment, padding included
  int32_t* histogram;             // scratch [ranks * blocks][local_experts]
  volatile int32_t* host_counts;  // out, host memory [local_experts]: real rows
  volatile uint32_t* host_ready;  // out, host memory: 1 once host_counts are there
  int32_t tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t alignment;  // of segments
  int32_t max_rows;   // room in the expert-major tensor; what lies beyond gets no slot
  int32_t reserved;
};

namespace {

constexpr int kThreads = 512;

struct Share {
  int first_chunk;
  int end_chunk;
};

__device__ Share my_chunks(const Communicator& comm) {
  const int chunks = comm.shape.max_tokens / kChunkTokens;
  const int each = (chunks + gridDim.x - 1) / gridDim.x;
  const int first = min(static_cast<int>(blockIdx.x) * each, chunks);
  return {first, min(first + each, chunks)};
}

__device__ void send_routing(const LayoutArgs& args, Share share, uint32_t round) {
  const Communicator& comm = args.comm;
  const int ranks = comm.shape.ranks, top_k = args.top_k, copy = round % 2;
  const int stride = routing_stride(comm.shape.max_top_k), experts_per_rank = args.num_experts / ranks;
  const int first = share.first_chunk * kChunkTokens;
  const int end = min(share.end_chunk * kChunkTokens, args.tokens);
  const int64_t table = (static_cast<int64_t>(copy) * ranks + comm.rank) * comm.shape.max_tokens;
  for (int token = first + threadIdx.x; token < end; token += blockDim.x) {
    uint32_t owners = 0;
    for (int base = 0; base < top_k; base += 8) {
      uint16_t packed[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int k = base + i;
        int64_t expert = k < top_k ? args.topk_idx[static_cast<int64_t>(token) * top_k + k] : -1;
        if (expert < -1 || expert >= args.num_experts) {
          report_fault(comm, Fault::kExpertRange, Step::kRouting, comm.rank, round, expert, args.num_experts);
          expert = -1;
        }
        packed[i] = expert < 0 ? kNotRouted : static_cast<uint16_t>(expert);
        if (expert >= 0) owners |= 1u << (expert / experts_per_rank);
      }
      const uint4 value = *reinterpret_cast<const uint4*>(packed);
      for (int peer = 0; peer < ranks; ++peer)
        *reinterpret_cast<uint4*>(part<uint16_t>(comm, peer, comm.layout.routing) + (table + token) * stride + base) =
            value;
    }
    args.owners[token] = static_cast<uint8_t>(owners);
  }
  if (args.topk_weights != nullptr) {
    const int entries = max(end - first, 0) * top_k;
    for (int i = threadIdx.x; i < entries; i += blockDim.x) {
      const int token = first + i / top_k, k = i % top_k;
      const float weight = args.topk_weights[static_cast<int64_t>(token) * top_k + k];
      for (int peer = 0; peer < ranks; ++peer)
        part<float>(comm, peer, comm.layout.weights)[(table + token) * comm.shape.max_top_k + k] = weight;
    }
  }
  __syncthreads();  // all routing of the share is written before its flags are released
  const int share_chunks = share.end_chunk - share.first_chunk;
  for (int i = threadIdx.x; i < share_chunks * ranks; i += blockDim.x) {
    const int chunk = share.first_chunk + i / ranks, peer = i % ranks;
    const int tokens = min(max(args.tokens - chunk * kChunkTokens, 0), kChunkTokens);
    const int chunks = comm.shape.max_tokens / kChunkTokens;
    uint64_t* flag = part<uint64_t>(comm, peer, comm.layout.chunk_flags) +
                     (static_cast<int64_t>(copy) * ranks + comm.rank) * chunks + chunk;
    st_release_sys(flag, static_cast<uint64_t>(round) << 32 | tokens);  // pairs with wait_chunk
  }
}

// Tokens in a peer's chunk once its routing is here; 0 if the wait fails.
__device__ int wait_chunk(const Communicator& comm, int source, int chunk, uint32_t round) {
  const int chunks = comm.shape.max_tokens / kChunkTokens;
  const uint64_t* flag = part<uint64_t>(comm, comm.rank, comm.layout.chunk_flags) +
                         (static_cast<int64_t>(round % 2) * comm.shape.ranks + source) * chunks + chunk;
  uint64_t value = 0;
  const bool here = wait_bounded(comm, Step::kRouting, source, round, [&] {
    value = ld_acquire_sys(flag);  // pairs with the release in send_routing
    return static_cast<uint32_t>(value >> 32) == round;
  });
  return here ? static_cast<int>(value & 0xffffffff) : 0;
}

// The part of the routing tables that one block works on.
struct Routing {
  const uint16_t* table;
  int stride;
  int first_expert;
  int local_experts;

  // Local expert of an entry, or -1.
  __device__ int local(int64_t token, int k) const {
    const int expert = static_cast<int>(table[token * stride + k]) - first_expert;
    return expert >= 0 && expert < local_experts ? expert : -1;
  }
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
                                                  const int* chunk_tokens, int share_chunks, int chunk,
                                                  int first_token) {
  ChunkEntry entry;
  entry.k = i % args.top_k;
  entry.place = i / args.top_k % kChunkTokens;
  entry.source = i / (args.top_k * kChunkTokens);
  entry.token = static_cast<int64_t>(entry.source) * args.comm.shape.max_tokens + first_token + entry.place;
  const bool real = entry.place < chunk_tokens[entry.source * share_chunks + chunk];
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

__global__ void __launch_bounds__(kThreads, 1) layout_kernel(const __grid_constant__ LayoutArgs args) {
  const Communicator& comm = args.comm;
  const int ranks = comm.shape.ranks, top_k = args.top_k;
  const int local_experts = args.num_experts / ranks, pairs = ranks * local_experts;
  extern __shared__ int shared[];
  int* next = shared;                                             // [pairs]: histogram, then the next free place
  uint32_t* masks = reinterpret_cast<uint32_t*>(shared + pairs);  // [pairs]: tokens of the chunk
  int* segment_start = shared + 2 * pairs;                        // [local_experts]
  int* total = segment_start + local_experts;                     // [local_experts]
  int* part_sums = total + local_experts;                         // [parts][local_experts]
  int* chunk_tokens = part_sums + max(kThreads, local_experts);   // [ranks][chunks of the share]
  const int tid = threadIdx.x;
  const uint32_t round = begin_round(comm);
  const Share share = my_chunks(comm);
  const int share_chunks = share.end_chunk - share.first_chunk;

  announce_round(comm, round);
  send_routing(args, share, round);
  for (int i = tid; i < pairs; i += kThreads) next[i] = 0;
  for (int i = tid; i < ranks * share_chunks; i += kThreads)
    chunk_tokens[i] = wait_chunk(comm, i / share_chunks, share.first_chunk + i % share_chunks, round);
  __syncthreads();

  const int64_t copy_start = static_cast<int64_t>(round % 2) * ranks * comm.shape.max_tokens;
  const Routing routing = {
      part<uint16_t>(comm, comm.rank, comm.layout.routing) + copy_start * routing_stride(comm.shape.max_top_k),
      routing_stride(comm.shape.max_top_k), comm.rank * local_experts, local_experts};
  const float* weights = part<float>(comm, comm.rank, comm.layout.weights) + copy_start * comm.shape.max_top_k;

  // How many rows of each rank's share go to each local expert.
  const int share_entries = share_chunks * kChunkTokens * top_k;
  for (int i = tid; i < ranks * share_entries; i += kThreads) {
    const int source = i / share_entries, entry = i % share_entries, offset = entry / top_k;
    if (offset % kChunkTokens >= chunk_tokens[source * share_chunks + offset / kChunkTokens]) continue;
    const int64_t token =
        static_cast<int64_t>(source) * comm.shape.max_tokens + share.first_chunk * kChunkTokens + offset;
    const int expert = routing.local(token, entry % top_k);
    if (expert >= 0) atomicAdd(&next[source * local_experts + expert], 1);
  }
  __syncthreads();
  for (int i = tid; i < pairs; i += kThreads) {
    const int source = i / local_experts, expert = i % local_experts;
    args.histogram[(static_cast<int64_t>(source) * gridDim.x + blockIdx.x) * local_experts + expert] = next[i];
  }
  grid_barrier(comm, round);

  // Prefix sums over (rank, block): where this block's rows of each rank start within each expert's segment. The
  // columns are summed in `parts` pieces side by side, each by one thread an expert.
  const int width = (local_experts + 31) / 32 * 32, parts = max(kThreads / width, 1);
  const int columns = ranks * static_cast<int>(gridDim.x), per_part = (columns + parts - 1) / parts;
  for (int i = tid; i < parts * width; i += kThreads) {
    const int piece = i / width, expert = i % width;
    if (expert >= local_experts) continue;
    const int end = min((piece + 1) * per_part, columns);
    int sum = 0;
#pragma unroll 8
    for (int column = piece * per_part; column < end; ++column) {
      if (column % gridDim.x == blockIdx.x) next[column / gridDim.x * local_experts + expert] = sum;
      sum += __ldcg(&args.histogram[static_cast<int64_t>(column) * local_experts + expert]);
    }
    part_sums[piece * local_experts + expert] = sum;
  }
  __syncthreads();
  for (int i = tid; i < pairs; i += kThreads) {
    const int source = i / local_experts, expert = i % local_experts;
    const int piece = (source * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) / per_part;
    for (int before = 0; before < piece; ++before) next[i] += part_sums[before * local_experts + expert];
  }
  for (int expert = tid; expert < local_experts; expert += kThreads) {
    int sum = 0;
    for (int piece = 0; piece < parts; ++piece) sum += part_sums[piece * local_experts + expert];
    total[expert] = sum;
  }
  __syncthreads();
  if (tid < 32) {  // exclusive scan of the padded segment sizes
    int carry = 0;
    for (int base = 0; base < local_experts; base += 32) {
      const int expert = base + tid;
      const int count = expert < local_experts ? total[expert] : 0;
      const int size = (count + args.alignment - 1) / args.alignment * args.alignment;
      int sum = size;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(~0u, sum, distance);
        if (tid >= distance) sum += below;
      }
      if (expert < local_experts) {
        segment_start[expert] = carry + sum - size;
        if (blockIdx.x == 0) {
          args.counts[expert] = count;
          args.ends[expert] = carry + sum;
          args.host_counts[expert] = count;
        }
      }
      carry += __shfl_sync(~0u, sum, 31);
    }
    if (blockIdx.x == 0) {
      if (tid == 0 && carry > args.max_rows)
        report_fault(comm, Fault::kOverflow, Step::kRouting, comm.rank, round, carry, args.max_rows);
      __syncwarp();
      __threadfence_system();  // counts (and a fault) are in host memory before the host sees `ready`
      if (tid == 0) *args.host_ready = 1;
    }
  }
  __syncthreads();
  for (int i = tid; i < pairs; i += kThreads) next[i] += segment_start[i % local_experts];

  // Slots, chunk by chunk.
  const int chunk_entries = ranks * kChunkTokens * top_k;
  for (int chunk = 0; chunk < share_chunks; ++chunk) {
    const int first_token = (share.first_chunk + chunk) * kChunkTokens;
    for (int i = tid; i < pairs; i += kThreads) masks[i] = 0;
    __syncthreads();
    bool repeated = false;
    for (int i = tid; i < chunk_entries; i += kThreads) {
      const ChunkEntry entry = chunk_entry(i, args, routing, chunk_tokens, share_chunks, chunk, first_token);
      if (entry.expert < 0) continue;
      const uint32_t bit = 1u << entry.place;
      repeated |= (atomicOr(&masks[entry.source * local_experts + entry.expert], bit) & bit) != 0;
    }
    // A token that names an expert twice fills two slots, which one bit cannot say: such a chunk is counted out.
    repeated = __syncthreads_or(repeated);
    for (int i = tid; i < chunk_entries; i += kThreads) {
      const ChunkEntry entry = chunk_entry(i, args, routing, chunk_tokens, share_chunks, chunk, first_token);
      int slot = -1;
      if (entry.expert >= 0) {
        const int pair = entry.source * local_experts + entry.expert;
        slot = next[pair] +
               (repeated ? count_before(entry, routing, top_k) : __popc(masks[pair] & ((1u << entry.place) - 1)));
        if (slot >= args.max_rows) slot = -1;
      }
      args.slots[entry.token * top_k + entry.k] = slot;
      if (slot >= 0 && args.row_weights != nullptr)
        args.row_weights[slot] = weights[entry.token * comm.shape.max_top_k + entry.k];
    }
    __syncthreads();
    if (!repeated) {
      for (int i = tid; i < pairs; i += kThreads) next[i] += __popc(masks[i]);
    } else {
      for (int i = tid; i < chunk_entries; i += kThreads) {
        const ChunkEntry entry = chunk_entry(i, args, routing, chunk_tokens, share_chunks, chunk, first_token);
        if (entry.expert >= 0) atomicAdd(&next[entry.source * local_experts + entry.expert], 1);
      }
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && tid < ranks) wait_entered(comm, Step::kRouting, tid, round);  // rule (1)
  end_round(comm, round);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above. All pointers but the host ones are on the device; requires 1 <= blocks <= multiprocessors.
EP_MOE_API const char* ep_moe_layout(const ep_moe::LayoutArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const BufferShape& shape = args->comm.shape;
  const int local_experts = args->num_experts / shape.ranks, chunks = shape.max_tokens / kChunkTokens;
  const int share_chunks = (chunks + args->comm.blocks - 1) / args->comm.blocks;
  const int part_sums = local_experts > kThreads ? local_experts : kThreads;
  const int shared_bytes = 4 * (2 * args->num_experts + 2 * local_experts + part_sums + shape.ranks * share_chunks);
  return launch("layout kernel", layout_kernel, *args, args->comm.blocks, kThreads, shared_bytes, true, stream);
}

EP_MOE_API size_t ep_moe_layout_args_bytes() { return sizeof(ep_moe::LayoutArgs); }
