// Combine: the rows of each token (expert-major, or one a token) are summed here, once; the sum of a peer's token is
// pushed to that peer, which adds what its peers pushed.
//
// What moves: rows by bulk copies into rings in shared memory; fp32 sums in registers; one row a (token, rank) by
// ordinary 16-byte stores into the landing buffer of the token's rank.
//
// A block has two crews side by side, each of one warp that feeds a ring and of warps that sum what is in it: one
// pushes the sums of peers' tokens, the other finishes this rank's tokens. So links and memory are busy at the same
// time: stores to a peer, which wait for the link, hold up no sum that needs memory alone.
//
//   writer                        reader                     ordered by
//   landing (peer's pushers)      finishers                  landing flag of 8 tokens: bar.sync of the pushers, then
//                                                            st.release / ld.acquire
//   (reuse of landing)            finishers, rounds before   rule (2) of communicator.cuh: no push before wait_entered
//   out (finishers)               exchange between nodes     `summed` of 8 tokens: bar.sync of the finishers, then
//                                                            st.release / ld.acquire
//   stage (copy engine, load)     the ring's summing warps   `full` mbarrier
//   stage (reused by a load)      the ring's summing warps   `empty` mbarrier
//
// Pushers wait for nobody but for peers to enter the round, and all blocks are resident, so no two ranks wait for each
// other.
//
// A combine may be several launches, each with a range of experts whose rows have just been computed; rows of earlier
// ranges are there. Each is a round of its own: a launch pushes the tokens that leave with its range, and finishes
// those of this rank's tokens of which no rank has an expert behind its range. Ranges are the same on all ranks, so by
// then every owner has pushed: in this round, which its flag says, or in an earlier one, whose stores the release of a
// later flag covers. A place in the landing buffer is written once in all launches together, and keeps its row from the
// round that pushes it to the one that finishes its token. So no other combine may come between them.
#include "communicator.cuh"
#include "element.cuh"
#include "expert_range.cuh"
#include "launch.cuh"
#include "node_chunks.cuh"

namespace ep_moe {

struct CombineArgs {
  Communicator comm;
  const int32_t* slots;   // [ranks][slot_tokens][width], from the layout: slots (width top_k) or rows (width 1), or -1
  const uint8_t* owners;  // [tokens]: bit r says that rank r returns a row for this token
  const uint8_t* rows;    // [num_rows][row_bytes]
  uint8_t* out;           // [tokens][row_bytes]
  const int64_t* topk_idx;  // [tokens][width], global expert or -1; read unless `range` is all
  const int32_t* ends;      // [range.experts], ends of the segments; likewise
  int32_t row_bytes;        // a multiple of 16
  int32_t element;          // Element of the rows
  int32_t tokens;
  int32_t slot_tokens;
  int32_t width;
  ExpertRange range;  // with which tokens leave
  NodeChunks nodes;   // that tokens came from, if the exchange between nodes takes their sums back
  uint32_t* summed;   // out [tokens / kCombineGroup], `epoch` once the group's sums are in `out`; nullptr without nodes
  uint32_t epoch;     // another number at each call
};

namespace {

constexpr int kSummingWarps = 7;  // of a crew
constexpr int kSummingThreads = kSummingWarps * 32;
constexpr int kThreads = 2 * (kSummingThreads + 32);
constexpr int kVectorsPerThread = 4;
constexpr int kPieceBytes = kSummingThreads * kVectorsPerThread * 16;  // rows are summed in pieces of this size
constexpr int kStages = 14;                                            // of both rings
constexpr int kPushBarrier = 1;                                        // named barrier of the pushing warps
constexpr int kFinishBarrier = 2;                                      // and of the finishing ones

// A crew's stages: row pieces on their way to its summing warps.
struct Ring {
  uint8_t* data;
  uint64_t* full;
  uint64_t* empty;
  int stages;
  int place = 0;
  uint32_t parity = 0;

  __device__ uint8_t* piece() const { return data + place * kPieceBytes; }

  __device__ void advance() {
    if (++place == stages) {
      place = 0;
      parity ^= 1;
    }
  }
};

// The groups of tokens that a block takes care of.
struct GroupRange {
  int first;
  int end;
};

__device__ GroupRange my_groups(const CombineArgs& args) {
  const int groups = args.slot_tokens / kCombineGroup;
  const int each = (groups + gridDim.x - 1) / gridDim.x;
  const int first = min(static_cast<int>(blockIdx.x) * each, groups);
  return {first, min(first + each, groups)};
}

// Sums that travel on to other nodes are made in turn by all blocks, in the order in which they leave: a chunk of
// several groups is complete as early as can be.
template <typename Visit>
__device__ void for_each_group_in_turn(const CombineArgs& args, int first_peer, int end_peer, Visit visit) {
  const int ranks = args.comm.shape.ranks, places = args.nodes.places();
#pragma unroll 1
  for (int place = blockIdx.x * kCombineGroup; place < places; place += gridDim.x * kCombineGroup)
#pragma unroll 1
    for (int i = first_peer; i < end_peer; ++i) {
      const int source = (args.comm.rank + i) % ranks, token = args.nodes.token(source, place);
      if (token >= 0) visit(source, token / kCombineGroup);
    }
}

// Calls visit(source, group) for the block's groups of peers' tokens, in the order in which they are pushed.
template <bool kOnward, typename Visit>
__device__ void for_each_pushed_group(const CombineArgs& args, Visit visit) {
  const Communicator& comm = args.comm;
  if constexpr (kOnward) return for_each_group_in_turn(args, 1, comm.shape.ranks, visit);
  const GroupRange range = my_groups(args);
  for (int group = range.first; group < range.end; ++group)
    for (int i = 1; i < comm.shape.ranks; ++i) visit((comm.rank + i) % comm.shape.ranks, group);
}

// The same for this rank's tokens.
template <bool kOnward, typename Visit>
__device__ void for_each_own_group(const CombineArgs& args, Visit visit) {
  if constexpr (kOnward) return for_each_group_in_turn(args, 0, 1, visit);
  const GroupRange range = my_groups(args);
  for (int group = range.first; group < range.end; ++group) visit(args.comm.rank, group);
}

__device__ __forceinline__ int slot_of_lane(const CombineArgs& args, int source, int token, int lane) {
  const int64_t entry = static_cast<int64_t>(source) * args.slot_tokens + token;
  return lane < args.width ? args.slots[entry * args.width + lane] : -1;
}

// Which tokens of a group this launch sums: a bit each. A lane finds out about one of them.
__device__ uint32_t tokens_to_sum(const CombineArgs& args, int source, int group, int lane) {
  if (args.range.is_all()) return (1u << kCombineGroup) - 1;
  const int token = group * kCombineGroup + lane;
  bool now = false;
  if (lane < kCombineGroup && source != args.comm.rank) {
    const int32_t* slots = args.slots + (static_cast<int64_t>(source) * args.slot_tokens + token) * args.width;
    int last = -1;
    for (int k = 0; k < args.width; ++k) last = max(last, slots[k]);
    now = rows_of(args.range, args.ends).holds(last);
  } else if (lane < kCombineGroup && token < args.tokens) {
    int last = 0;  // tokens routed nowhere are finished first
    for (int k = 0; k < args.width; ++k) {
      const int expert = static_cast<int>(args.topk_idx[static_cast<int64_t>(token) * args.width + k]);
      if (expert >= 0) last = max(last, expert % args.range.experts);
    }
    now = args.range.holds(last);
  }
  return __ballot_sync(~0u, now);
}

// One warp: all rows of a group into the ring.
__device__ void feed_group(const CombineArgs& args, Ring& ring, int source, int group, int lane) {
  for (uint32_t tokens = tokens_to_sum(args, source, group, lane); tokens != 0; tokens &= tokens - 1) {
    const int slot = slot_of_lane(args, source, group * kCombineGroup + __ffs(tokens) - 1, lane);
    const uint32_t wanted = __ballot_sync(~0u, slot >= 0);
    for (int start = 0; start < args.row_bytes; start += kPieceBytes) {
      const uint32_t bytes = min(args.row_bytes - start, kPieceBytes);
      for (uint32_t left = wanted; left != 0; left &= left - 1) {
        const int64_t row = __shfl_sync(~0u, slot, __ffs(left) - 1);
        if (lane == 0) {
          mbarrier_wait_parity(&ring.empty[ring.place], ring.parity ^ 1);
          mbarrier_arrive_expect_tx(&ring.full[ring.place], bytes);
          cp_async_bulk_load(ring.piece(), args.rows + row * args.row_bytes + start, bytes, &ring.full[ring.place]);
        }
        ring.advance();
      }
    }
  }
}

// A thread's part of a row piece, of `count` vectors in all.
template <typename T>
struct Part {
  Vector<T> vectors[kVectorsPerThread];

  __device__ void load(const uint8_t* piece, int count, int thread) {
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int index = v * kSummingThreads + thread;
      vectors[v].bits = index < count ? reinterpret_cast<const Vector<T>*>(piece)[index].bits : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ void store(uint8_t* piece, int count, int thread) const {
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int index = v * kSummingThreads + thread;
      if (index < count) reinterpret_cast<Vector<T>*>(piece)[index] = vectors[v];
    }
  }
};

template <typename T>
struct Sums {
  static constexpr int kCount = Vector<T>::kCount;
  float values[kVectorsPerThread][kCount] = {};

  __device__ void add(const Part<T>& part) {
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      float floats[kCount];
      part.vectors[v].to_float(floats);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[v][i] += floats[i];
    }
  }

  __device__ Part<T> rounded() const {
    Part<T> part;
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) part.vectors[v].from_float(values[v]);
    return part;
  }
};

// Where peer `writer` pushes its sums for `owner`'s tokens.
__device__ __forceinline__ uint8_t* landing(const CombineArgs& args, int owner, int writer, int token) {
  const Communicator& comm = args.comm;
  const int64_t place = writer < owner ? writer : writer - 1;
  return part<uint8_t>(comm, owner, comm.layout.landing) +
         (place * comm.shape.max_tokens + token) * static_cast<int64_t>(args.row_bytes);
}

__device__ __forceinline__ uint32_t* landing_flag(const Communicator& comm, int owner, int writer, int group) {
  return part<uint32_t>(comm, owner, comm.layout.landing_flags) +
         static_cast<int64_t>(writer) * (comm.shape.max_tokens / kCombineGroup) + group;
}

// Until all peers have pushed their sums of a group of this rank's tokens.
__device__ void wait_landed(const Communicator& comm, int group, uint32_t round) {
  for (int peer = 0; peer < comm.shape.ranks; ++peer) {
    if (peer == comm.rank) continue;
    const uint32_t* flag = landing_flag(comm, comm.rank, peer, group);
    // Pairs with the release in push_sums.
    wait_bounded(comm, Step::kCombine, peer, round, [=] { return has_reached(flag, round); });
  }
}

// The sum of the next pieces in the ring, one for every bit of `wanted`; rounded once, as sums are that travel.
template <typename T>
__device__ __forceinline__ Part<T> sum_pieces(Ring& ring, uint32_t wanted, int count, int thread) {
  Sums<T> sums;
  for (uint32_t left = wanted; left != 0; left &= left - 1) {
    mbarrier_wait_parity(&ring.full[ring.place], ring.parity);
    Part<T> part;
    part.load(ring.piece(), count, thread);
    mbarrier_arrive(&ring.empty[ring.place]);  // by every thread: no slower than by one a warp behind a barrier
    sums.add(part);
    ring.advance();
  }
  return sums.rounded();
}

// Pushers: this rank's sum of every peer's token to that peer.
template <typename T, bool kOnward>
__device__ void push_sums(const CombineArgs& args, Ring ring, int thread, uint32_t round) {
  const Communicator& comm = args.comm;
  const int lane = thread % 32;
  uint32_t entered = 0;
  for_each_pushed_group<kOnward>(args, [&](int source, int group) {
    if (lane == 0 && (entered >> source & 1) == 0) wait_entered(comm, Step::kCombine, source, round);
    entered |= 1u << source;
    __syncwarp();
    for (uint32_t tokens = tokens_to_sum(args, source, group, lane); tokens != 0; tokens &= tokens - 1) {
      const int token = group * kCombineGroup + __ffs(tokens) - 1;
      const uint32_t wanted = __ballot_sync(~0u, slot_of_lane(args, source, token, lane) >= 0);
      if (wanted == 0) continue;
      for (int start = 0; start < args.row_bytes; start += kPieceBytes) {
        const int count = min(args.row_bytes - start, kPieceBytes) / 16;
        const Part<T> sum = sum_pieces<T>(ring, wanted, count, thread);
        sum.store(landing(args, source, comm.rank, token) + start, count, thread);
      }
    }
    bar_sync(kPushBarrier, kSummingThreads);  // all sums of the group are stored before its flag is released
    if (thread == 0) st_release_sys(landing_flag(comm, source, comm.rank, group), round);  // pairs with wait_landed
  });
}

// Finishers: what all ranks have of this rank's tokens, added over the ranks in ascending order.
template <typename T, bool kOnward>
__device__ void finish_sums(const CombineArgs& args, Ring ring, int thread, uint32_t round) {
  const Communicator& comm = args.comm;
  const int lane = thread % 32;
  for_each_own_group<kOnward>(args, [&](int source, int group) {
    if (lane == 0) wait_landed(comm, group, round);
    __syncwarp();
    for (uint32_t tokens = tokens_to_sum(args, source, group, lane); tokens != 0; tokens &= tokens - 1) {
      const int token = group * kCombineGroup + __ffs(tokens) - 1;
      const uint32_t wanted = __ballot_sync(~0u, slot_of_lane(args, source, token, lane) >= 0);
      if (token >= args.tokens) continue;
      const uint32_t owners = args.owners[token];
      for (int start = 0; start < args.row_bytes; start += kPieceBytes) {
        const int count = min(args.row_bytes - start, kPieceBytes) / 16;
        const Part<T> own = sum_pieces<T>(ring, wanted, count, thread);
        Sums<T> total;
        for (uint32_t left = owners; left != 0; left &= left - 1) {
          const int owner = __ffs(left) - 1;
          Part<T> part = own;
          if (owner != comm.rank) part.load(landing(args, comm.rank, owner, token) + start, count, thread);
          total.add(part);
        }
        total.rounded().store(args.out + static_cast<int64_t>(token) * args.row_bytes + start, count, thread);
      }
    }
    if constexpr (kOnward) {
      bar_sync(kFinishBarrier, kSummingThreads);  // all sums of the group are stored before its flag is released
      if (thread == 0) st_release_gpu(args.summed + group, args.epoch);  // pairs with wait_summed of node_exchange.cuh
    }
  });
}

// `kOnward`: the exchange between nodes starts once all blocks are here, and takes sums on as they become final.
template <typename T, bool kOnward>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineArgs args) {
  const Communicator& comm = args.comm;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages];
  if constexpr (kOnward) griddepcontrol_launch_dependents();
  const uint32_t round = begin_round(comm);
  announce_round(comm, round);
  if (threadIdx.x < kStages) {
    mbarrier_init(&full[threadIdx.x], 1);
    mbarrier_init(&empty[threadIdx.x], kSummingThreads);
  }
  fence_proxy_async();  // the copy engine completes on the barriers initialised above
  __syncthreads();
  const int push_stages = comm.shape.ranks > 1 ? kStages / 2 : 0;
  Ring pushed = {shared, full, empty, push_stages};
  Ring own = {shared + push_stages * kPieceBytes, full + push_stages, empty + push_stages, kStages - push_stages};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 0) {
    for_each_pushed_group<kOnward>(args, [&](int source, int group) { feed_group(args, pushed, source, group, lane); });
  } else if (warp == 1) {
    for_each_own_group<kOnward>(args, [&](int source, int group) { feed_group(args, own, source, group, lane); });
  } else if (warp < 2 + kSummingWarps) {
    push_sums<T, kOnward>(args, pushed, threadIdx.x - 64, round);
  } else {
    finish_sums<T, kOnward>(args, own, threadIdx.x - 64 - kSummingThreads, round);
  }
  if (blockIdx.x == 0 && threadIdx.x < comm.shape.ranks)
    wait_entered(comm, Step::kCombine, threadIdx.x, round);  // rule (1)
  end_round(comm, round);
}

template <bool kOnward>
void (*kernel_of(int32_t element))(CombineArgs) {
  return kernel_of_element(element, combine_kernel<float, kOnward>, combine_kernel<__nv_bfloat16, kOnward>,
                           combine_kernel<__half, kOnward>);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above; requires 1 <= blocks <= multiprocessors. Sums of tokens from several nodes are made by one
// launch, for all experts.
EP_MOE_API const char* ep_moe_combine(const ep_moe::CombineArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const auto kernel = args->summed != nullptr ? kernel_of<true>(args->element) : kernel_of<false>(args->element);
  return launch("combine kernel", kernel, *args, args->comm.blocks, kThreads, kStages * kPieceBytes,
                LaunchMode::kCooperative, stream);
}

EP_MOE_API size_t ep_moe_combine_args_bytes() { return sizeof(ep_moe::CombineArgs); }
