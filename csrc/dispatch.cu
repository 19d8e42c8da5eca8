// Dispatch: rows that ranks pushed here to their places: all slots of an expert-major tensor, or the one place each has
// in a tensor that holds every row once.
//
// What moves: each wanted row once, by a bulk copy from this rank's buffer to shared memory, then by one bulk copy into
// each of its slots. This rank's own rows may be taken from where they are instead, and are quantised in shared memory
// if rows travel so. A warp owns a ring of stages and takes every W-th row of its block's share; blocks share tokens
// out in turn, so that all of them take rows in the order in which they are pushed.
//
// It may start while the push, and the layout ahead of that, still run: it waits for the layout to have ended and, row
// by row, for rows to land. Nothing it writes is read by either.
//
//   writer                        reader                      ordered by
//   rows[source] (push of peer)   this kernel                 flag of the row: fence, st.volatile of push / ld.acquire,
//                                                             then fence.proxy.async, as the copy engine reads
//   rows[d % 2] (exchange         this kernel                 `arrivals` of the chunk, likewise
//   between nodes, peer)
//   stage (copy engine, load)     the warp                    mbarrier of the stage
//   stage (the warp, quantised)   bulk stores of the row      fence.proxy.async, __syncwarp
//   stage (reused by a load)      bulk stores of the row      wait_group.read, then __syncwarp
//   slots, counts (layout)        this kernel                 `placed`: st.release of the layout / ld.acquire here
//   all of those two kernels      the kernel behind           griddepcontrol_wait of one block here
//   rows (earlier kernels)        (reuse by this one)         the kernel ahead of the push has ended: the push, or the
//                                                             layout ahead of it, is launched without overlap
//   (reuse of rows[source])       push d + 1 of the peer      `ready`: the push of this rank, behind this kernel
//   (reuse of rows[d % 2])        exchange d + 2              rule (1) of communicator.cuh, by the last launch of d + 1
//
// A dispatch may be several launches, each of which brings the tokens that arrive with a range of experts. Each is a
// round of its own, and all read the same rows: these are given up with the last one, which counts the dispatch. What
// the ranges of a peer are is no matter here, but all ranks make as many launches, or rounds would not match. No other
// dispatch may come between them.
//
// Over several nodes the exchange between them (node_exchange.cuh) takes the place of the push: what it stores are the
// tokens of this dispatch, which ranks pull from each other. Their chunks arrive from all nodes at once, each with a
// flag of its own.
#include <type_traits>

#include "communicator.cuh"
#include "expert_range.cuh"
#include "launch.cuh"
#include "node_chunks.cuh"
#include "quantize_row.cuh"

namespace ep_moe {

struct DispatchArgs {
  Communicator comm;
  const int32_t* slots;   // [ranks][slot_tokens][width], from the layout: slots (width top_k) or rows (width 1), or -1
  const int64_t* counts;  // [local_experts]: real rows
  const int32_t* ends;    // [local_experts]: ends of the segments, padding included
  uint8_t* rows;          // out [num_rows][row_bytes]; padding rows become zero
  const uint8_t* own_rows;  // [tokens][own_row_bytes] of this rank; nullptr if these are pushed too
  float* scales;            // out [num_rows][row_scales]; nullptr unless the rows are e4m3
  int32_t wire_bytes;       // of a row as it travels, and from row to row in the symmetric buffers; a multiple of 128
  int32_t row_bytes;        // without scales; a multiple of 16
  int32_t row_scales;       // scales behind the row
  int32_t own_row_bytes;    // row_bytes, or those of a row that is quantised here
  int32_t quantize;         // own rows, which are of `element`
  int32_t element;          // Element
  int32_t slot_tokens;
  int32_t width;
  ExpertRange range;    // whose tokens arrive and whose segments have padding
  int32_t num_rows;     // rows there is room for
  int32_t warps;        // of a block
  int32_t stages;       // of a warp, at least 2
  int32_t stage_bytes;  // of a row in shared memory, before and after it is quantised; a multiple of 128
  int32_t behind_push;  // the kernel ahead is the push, which need not have ended; 0 for later launches of a dispatch
  int32_t early;        // nor need the layout ahead of that
  NodeChunks nodes;     // whose tokens they are, if they arrive from nodes
};

namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxStages = 3;

// A row that this rank wants, as one warp sees it.
struct Item {
  int source;
  int token;
  int slot;  // of this lane, or -1
};

// Zero rows between the end of an expert's real rows and the end of its segment.
__device__ void fill_padding(const DispatchArgs& args, int warp, int lane) {
  const int first = args.range.first + blockIdx.x * args.warps + warp;
  for (int expert = first; expert < args.range.end; expert += gridDim.x * args.warps) {
    const int start = expert == 0 ? 0 : args.ends[expert - 1], end = min(args.ends[expert], args.num_rows);
    for (int row = start + static_cast<int>(args.counts[expert]); row < end; ++row) {
      uint4* data = reinterpret_cast<uint4*>(args.rows + static_cast<int64_t>(row) * args.row_bytes);
      for (int i = lane; i < args.row_bytes / 16; i += 32) data[i] = make_uint4(0, 0, 0, 0);
      for (int i = lane; i < args.row_scales; i += 32) args.scales[static_cast<int64_t>(row) * args.row_scales + i] = 0;
    }
  }
}

// All threads of a block: returns once the layout has ended, which ends though its own waits may be in vain.
__device__ __forceinline__ void wait_placed(const Communicator& comm) {
  if (threadIdx.x == 0)
    while (ld_acquire_gpu(&comm.workspace->placed) == 0) {
    }
  __syncthreads();
}

// The rows that ranks of this node pushed.
struct FromRanks {
  static constexpr bool kReadOnce = true;
  const DispatchArgs& args;
  uint32_t dispatch;

  __device__ int places() const { return args.slot_tokens; }
  __device__ int token(int, int place) const { return place; }

  __device__ bool is_own(int source) const { return args.own_rows != nullptr && source == args.comm.rank; }

  // Pairs with the fence in flag_rows of push.cu. A row that was pushed for the next dispatch was for this one.
  __device__ bool arrived(int source, int token) const {
    const Communicator& comm = args.comm;
    if (is_own(source)) return true;
    return has_reached(landed_flags(comm, comm.rank, source) + token, dispatch);
  }

  __device__ bool limits_wait(int) const { return true; }

  __device__ uint32_t bytes(int source) const {
    return is_own(source) ? args.own_row_bytes : travelling_bytes(args.row_bytes, args.row_scales);
  }

  __device__ const uint8_t* row(int source, int token) const {
    const Communicator& comm = args.comm;
    if (is_own(source)) return args.own_rows + static_cast<int64_t>(token) * args.own_row_bytes;
    return part<uint8_t>(comm, comm.rank, pushed_rows(comm, source)) + static_cast<int64_t>(token) * args.wire_bytes;
  }
};

// The rows that other nodes sent to ranks of this one.
struct FromNodes {
  static constexpr bool kReadOnce = false;  // but by every rank of the node that wants them
  const DispatchArgs& args;
  uint32_t dispatch;

  __device__ int places() const { return args.nodes.places(); }
  __device__ int token(int source, int place) const { return args.nodes.token(source, place); }

  // Pairs with the release in Received::finish of node_exchange.cuh. A chunk that arrived for the next dispatch has
  // for this one.
  __device__ bool arrived(int source, int token) const {
    const Communicator& comm = args.comm;
    const uint32_t* flag = part<uint32_t>(comm, comm.rank, comm.layout.arrivals) +
                           source * (comm.shape.max_tokens / kChunkTokens) + token / kChunkTokens;
    return has_reached(flag, dispatch);
  }

  // This rank's own exchange ends its waits itself and then says `failed`: its report names the rank on the other node
  // that it waited for.
  __device__ bool limits_wait(int source) const { return source != args.comm.rank; }

  __device__ uint32_t bytes(int) const { return travelling_bytes(args.row_bytes, args.row_scales); }

  __device__ const uint8_t* row(int source, int token) const {
    const Communicator& comm = args.comm;
    return part<uint8_t>(comm, source, arrived_rows(comm)) + static_cast<int64_t>(token) * args.wire_bytes;
  }
};

// The rows of a warp, in turn: ranks alternate, so that all links are in use; rows that nobody here wants, or that
// arrive with other experts, are skipped. It looks at the flags of its next 32 rows at once, a lane at each.
template <typename Origin>
struct Rows {
  const DispatchArgs& args;
  Origin origin;
  RowRange arriving;  // where the first slot of a row must be
  int lane;
  int count;
  uint32_t round;
  int window;  // the first of the 32 rows
  int next;    // of them
  int source;  // of this lane's row
  int token;   // likewise; -1 if there is none
  uint32_t here;
  int upcoming;  // the slot of this lane for row `next`, or -1

  static __device__ Rows begin(const DispatchArgs& args, int warp, int lane, uint32_t round) {
    const Origin origin = {args, this_dispatch(args.comm)};
    const int places = (origin.places() - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;
    Rows rows = {args, origin, rows_of(args.range, args.ends), lane, places * args.comm.shape.ranks, round, warp};
    rows.look();
    return rows;
  }

  __device__ bool take(Item& item) {
#pragma unroll 1
    while (window < count) {
#pragma unroll 1
      while (next < 32) {
        item.source = __shfl_sync(~0u, source, next);
        item.token = __shfl_sync(~0u, token, next);
        item.slot = upcoming;
        const int row = next++;
        upcoming = slot_of_row(next);
        const uint32_t first_slot = __reduce_min_sync(~0u, static_cast<uint32_t>(item.slot));  // -1 is the largest
        if (!arriving.holds(static_cast<int>(first_slot))) continue;
        if ((here >> row & 1) != 0 || wait_for(row, item.source)) return true;
      }
      window += 32 * args.warps;
      look();
    }
    return false;
  }

  // The slot of this lane for a row of the window, or -1.
  __device__ int slot_of_row(int row) const {
    const int64_t of_token = __shfl_sync(~0u, token, row % 32);
    const int64_t entry = static_cast<int64_t>(__shfl_sync(~0u, source, row % 32)) * args.slot_tokens + of_token;
    return row < 32 && of_token >= 0 && lane < args.width ? args.slots[entry * args.width + lane] : -1;
  }

  // Whether the row has arrived, which it may do until the time is up.
  __device__ bool wait_for(int row, int from) {
    uint64_t start = 0;
    while (true) {
      look_again();
      if ((here >> row & 1) != 0) return true;
      bool over = false;
      if (lane == 0)
        over = origin.limits_wait(from) ? wait_is_over(args.comm, Step::kRows, from, round, &start)
                                        : has_failed(args.comm);
      if (__shfl_sync(~0u, over, 0)) return false;
    }
  }

  // The 32 rows of the window.
  __device__ void look() {
    const Communicator& comm = args.comm;
    const int ranks = comm.shape.ranks, row = window + lane * args.warps;
    source = (comm.rank + 1 + row % ranks) % ranks;
    token = row < count ? origin.token(source, blockIdx.x + row / ranks * gridDim.x) : -1;
    next = 0;
    upcoming = slot_of_row(0);
    look_again();
  }

  __device__ void look_again() {
    here = __ballot_sync(~0u, token >= 0 && origin.arrived(source, token));
    __syncwarp();  // what the lanes acquired, lane 0 has
    if (lane == 0) fence_proxy_async();
  }
};

// `T` is the type of own rows that are quantised here.
template <typename Origin, typename T = Unchanged, int kAtOnce = 1>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) dispatch_kernel(const __grid_constant__ DispatchArgs args) {
  const Communicator& comm = args.comm;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(8) uint64_t arrived[kMaxWarps][kMaxStages];
  __shared__ int slots[kMaxWarps][kMaxStages][kMaxTopK];
  __shared__ int sources[kMaxWarps][kMaxStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (args.early) wait_placed(comm);
  const uint32_t round = begin_round(comm);
  announce_round(comm, round);
  if (lane < args.stages) mbarrier_init(&arrived[warp][lane], 1);
  fence_proxy_async();  // the copy engine completes on the barriers initialised above
  __syncwarp();

  auto rows = Rows<Origin>::begin(args, warp, lane, round);
  uint8_t* ring = shared + static_cast<int64_t>(warp) * args.stages * args.stage_bytes;

  // Of rows that nobody reads again and of results, so that rows stay in the cache until they are read.
  const uint64_t policy = createpolicy_evict_first();

  // Starts the load of the warp's next row into stage `place`.
  auto load = [&](int place) {
    Item item;
    if (!rows.take(item)) return false;
    slots[warp][place][lane] = item.slot;
    if (lane == 0) {
      const uint8_t* row = rows.origin.row(item.source, item.token);
      const uint32_t bytes = rows.origin.bytes(item.source);
      uint64_t* barrier = &arrived[warp][place];
      sources[warp][place] = item.source;
      mbarrier_arrive_expect_tx(barrier, bytes);
      if constexpr (Origin::kReadOnce)
        cp_async_bulk_load(ring + place * args.stage_bytes, row, bytes, barrier, policy);
      else
        cp_async_bulk_load(ring + place * args.stage_bytes, row, bytes, barrier);
    }
    __syncwarp();
    return true;
  };

  int loaded = 0, stored = 0;
  while (loaded < args.stages - 1 && load(loaded)) ++loaded;
  fill_padding(args, warp, lane);
  for (; stored < loaded; ++stored) {
    const int place = stored % args.stages;
    uint8_t* row = ring + place * args.stage_bytes;
    const int slot = slots[warp][place][lane];
    mbarrier_wait_parity(&arrived[warp][place], stored / args.stages % 2);
    if constexpr (!std::is_same_v<T, Unchanged>) {
      if (sources[warp][place] == comm.rank) {
        quantize_row<T, kAtOnce>(row, reinterpret_cast<float*>(row + args.own_row_bytes), args.row_bytes, lane);
        fence_proxy_async_shared();  // for the copies below
        __syncwarp();
      }
    }
    if (slot >= 0)
      cp_async_bulk_store(args.rows + static_cast<int64_t>(slot) * args.row_bytes, row, args.row_bytes, policy);
    cp_async_bulk_commit_group();
    if (args.row_scales > 0) {
      const float* scales = reinterpret_cast<const float*>(row + args.row_bytes);
      for (uint32_t wanted = __ballot_sync(~0u, slot >= 0); wanted != 0; wanted &= wanted - 1) {
        const int64_t target = __shfl_sync(~0u, slot, __ffs(wanted) - 1);
        for (int i = lane; i < args.row_scales; i += 32) args.scales[target * args.row_scales + i] = scales[i];
      }
    }
    // The row before this one has left its stage, which is the one the next load takes.
    cp_async_bulk_wait_group_read<1>();
    __syncwarp();
    if (load(loaded % args.stages)) ++loaded;
  }
  cp_async_bulk_wait_group();
  if (blockIdx.x == 0 && threadIdx.x < comm.shape.ranks)
    wait_entered(comm, Step::kRows, threadIdx.x, round);   // rule (1)
  if (blockIdx.x == gridDim.x - 1) griddepcontrol_wait();  // before `dispatches` counts on, which the push reads
  if (end_round(comm, round) && args.range.is_last()) comm.workspace->dispatches += 1;
}

template <int kAtOnce>
void (*quantizing_kernel(int32_t element))(DispatchArgs) {
  return kernel_of_element(element, dispatch_kernel<FromRanks, float, kAtOnce>,
                           dispatch_kernel<FromRanks, __nv_bfloat16, kAtOnce>,
                           dispatch_kernel<FromRanks, __half, kAtOnce>);
}

void (*kernel_of(const DispatchArgs& args))(DispatchArgs) {
  if (args.nodes.nodes > 0) return dispatch_kernel<FromNodes>;
  if (!args.quantize) return dispatch_kernel<FromRanks>;
  return quantize_pieces(args.row_bytes) == 7 ? quantizing_kernel<7>(args.element) : quantizing_kernel<4>(args.element);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above; ring (warps * stages * stage_bytes) must fit the shared memory of a block. Rows from several
// nodes are moved by one launch, for all experts.
EP_MOE_API const char* ep_moe_dispatch(const ep_moe::DispatchArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  return launch("dispatch kernel", kernel_of(*args), *args, args->comm.blocks, args->warps * 32,
                args->warps * args->stages * args->stage_bytes,
                args->behind_push ? LaunchMode::kProgrammatic : LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_dispatch_args_bytes() { return sizeof(ep_moe::DispatchArgs); }
