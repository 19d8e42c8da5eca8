// Push: a rank's tokens to the ranks of their experts, into the buffers from which dispatch takes them there; as they
// are, with their scales behind the values if they have any, or quantised to e4m3 with one fp32 scale per 128 channels
// behind the values.
//
// What moves: each token that a rank wants once from memory to shared memory, by a bulk copy, and from there by one
// more to each of these ranks. A warp owns a ring of stages and takes every W-th token; it quantises a row where it
// lies. A flag a row tells a rank that it has landed.
//
// Flags are one warp's, not that of the warp whose row it is: the fence ahead of a flag waits for all that the SM has
// under way, some 3 us, in which the others go on. It is needed: a copy that is complete is visible to who made it, but
// a flag stored right behind it was seen to overtake it on its way to a peer.
//
// It runs beside the layout, which needs the same routing and moves little, and beside the dispatch that its own rows
// and those of peers are for. Few SMs suffice, and more rows under way than the links take only stand in the way of
// what dispatch loads and stores.
//
//   writer                         reader                      ordered by
//   stage (copy engine, load)      the warp                    mbarrier of the stage
//   stage (the warp)               copies to ranks             fence.proxy.async, __syncwarp
//   stage (reused by a load)       copies to ranks             wait_group, then __syncwarp
//   rows[this rank] of a rank      the flagging warp           wait_group, then `done` of the warp: atom.acq_rel
//   the same                       its dispatch d              fence.acq_rel of the flagging warp, then the row's flag:
//                                                              st.volatile / ld.acquire, then fence.proxy.async
//   (reuse of these)               its dispatch d - 1          `ready` of that rank: st.release here / ld.acquire; its
//                                                              kernel d runs behind its dispatch d - 1
//   results of the layout          the kernels behind          griddepcontrol_wait of one block here, one of dispatch
//
// A rank waits for its peers to be ready, which they say first thing in this kernel, before any wait of theirs.
#include <type_traits>

#include "communicator.cuh"
#include "element.cuh"
#include "launch.cuh"
#include "quantize_row.cuh"

namespace ep_moe {

struct PushArgs {
  Communicator comm;
  const void* x;            // [tokens][hidden], or [tokens][row_bytes] where rows travel as they are
  const float* scales;      // [tokens][row_scales], of rows that are quantised already; or nullptr
  const int64_t* topk_idx;  // [tokens][top_k], global expert or -1
  int32_t x_row_bytes;      // of x; a multiple of 16
  int32_t wire_bytes;       // from row to row in the symmetric buffers; a multiple of 128
  int32_t row_bytes;        // of a row as it travels, without scales; a multiple of 16
  int32_t row_scales;       // behind it
  int32_t tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t element;  // Element of x, if it is to be quantised
  int32_t quantize;
  int32_t own;          // rows for this rank land in its own buffer too
  int32_t warps;        // of a block
  int32_t stages;       // of a warp
  int32_t stage_bytes;  // for a row of x and its scales; a multiple of 128
  int32_t early;        // the kernel ahead is the layout, which need not have ended
};

namespace {

constexpr int kMaxWarps = 7;  // that move rows; one more flags them
constexpr int kMaxStages = 2;

// The ranks that a token is pushed to, a bit each: those that have an expert of it. Lane k looks at its k-th.
__device__ __forceinline__ uint32_t ranks_of_token(const PushArgs& args, int64_t token, int lane) {
  uint32_t rank = 0;
  if (lane < args.top_k) {
    const int64_t expert = args.topk_idx[token * args.top_k + lane];
    if (expert >= 0 && expert < args.num_experts)
      rank = 1u << static_cast<uint32_t>(expert) / static_cast<uint32_t>(args.num_experts / args.comm.shape.ranks);
  }
  const uint32_t ranks = __reduce_or_sync(~0u, rank);
  return args.own ? ranks : ranks & ~(1u << args.comm.rank);
}

// The rows of a warp, in turn.
struct Share {
  int first;
  int step;

  __device__ Share(const PushArgs& args, int warp)
      : first(blockIdx.x + gridDim.x * warp), step(gridDim.x * args.warps) {}

  __device__ int64_t token(int row) const { return first + static_cast<int64_t>(row) * step; }

  __device__ int rows(const PushArgs& args) const { return max(args.tokens - first + step - 1, 0) / step; }
};

// The flagging warp; lane w looks after warp w, and says of all its rows that they are there: a rank that has none of
// the experts of one does not look at its flag.
__device__ void flag_rows(const PushArgs& args, uint32_t* done, uint32_t dispatch, int lane) {
  const Communicator& comm = args.comm;
  const Share share(args, lane);
  const int rows = lane < args.warps ? share.rows(args) : 0;
  int flagged = 0;
#pragma unroll 1
  while (__any_sync(~0u, flagged < rows)) {
    // Pairs with the addition of the warp.
    const int complete = flagged < rows ? atom_add_acq_rel_shared(done + lane, 0) : rows;
    if (!__any_sync(~0u, flagged < complete)) continue;
    if (has_failed(comm)) return;  // a rank was not ready: nothing was pushed to it
    fence_acq_rel_sys();           // pairs with the acquire in FromRanks of dispatch.cu: what the flags say is there
#pragma unroll 1
    for (; flagged < complete; ++flagged)
#pragma unroll 1
      for (int rank = 0; rank < comm.shape.ranks; ++rank)
        st_volatile(landed_flags(comm, rank, comm.rank) + share.token(flagged), dispatch);
    __syncwarp();
  }
}

// A warp that moves rows.
template <typename T, int kAtOnce>
__device__ __forceinline__ void push_rows(const PushArgs& args, uint8_t* ring, uint64_t* loaded, uint32_t* wanted,
                                          uint32_t* done, int warp, int lane) {
  const Communicator& comm = args.comm;
  const Share share(args, warp);
  if (lane < args.stages) mbarrier_init(&loaded[lane], 1);
  fence_proxy_async();  // the copy engine completes on the barriers initialised above
  __syncwarp();
  // Where this rank's own rows are not pushed, its dispatch reads them soon.
  const uint64_t policy = args.own ? createpolicy_evict_normal() : createpolicy_evict_last();
  auto load = [&](int row) {
    const int64_t token = share.token(row);
    if (token >= args.tokens) return;
    const int place = row % args.stages;
    uint8_t* stage = ring + place * args.stage_bytes;
    const uint32_t ranks = ranks_of_token(args, token, lane);
    if (lane == 0) wanted[place] = ranks;
    if (ranks == 0) return;
    if (lane == 0) {
      mbarrier_arrive_expect_tx(&loaded[place], args.x_row_bytes);
      cp_async_bulk_load(stage, static_cast<const uint8_t*>(args.x) + token * args.x_row_bytes, args.x_row_bytes,
                         &loaded[place], policy);
    }
    if (args.scales != nullptr)
      for (int i = lane; i < args.row_scales; i += 32)
        reinterpret_cast<float*>(stage + args.row_bytes)[i] = args.scales[token * args.row_scales + i];
  };
  for (int row = 0; row < args.stages - 1; ++row) load(row);

  // Lane r sends to rank r, which has read what it was sent before once it is ready.
  bool ready = lane < comm.shape.ranks;
  if (ready) {
    const uint32_t* flag = part<uint32_t>(comm, comm.rank, comm.layout.ready) + lane;
    const uint32_t dispatch = this_dispatch(comm);
    // Beside the layout a rank that is late has not sent its routing either.
    ready = wait_bounded(comm, args.early ? Step::kRouting : Step::kRows, lane, begin_round(comm),
                         [=] { return has_reached(flag, dispatch); });
  }
  __syncwarp();
  uint8_t* rows = ready ? part<uint8_t>(comm, lane, pushed_rows(comm, comm.rank)) : nullptr;
  const uint32_t bytes = travelling_bytes(args.row_bytes, args.row_scales);
  const int count = share.rows(args);
  uint32_t parities = 0;  // of the stages, a bit each
#pragma unroll 1
  for (int row = 0; row < count; ++row) {
    load(row + args.stages - 1);
    __syncwarp();  // what lane 0 noted
    const int place = row % args.stages;
    const uint32_t ranks = wanted[place];
    if (ranks != 0) {
      uint8_t* stage = ring + place * args.stage_bytes;
      mbarrier_wait_parity(&loaded[place], parities >> place & 1);
      parities ^= 1u << place;
      if constexpr (!std::is_same_v<T, Unchanged>)
        quantize_row<T, kAtOnce>(stage, reinterpret_cast<float*>(stage + args.x_row_bytes), args.row_bytes, lane);
      if (args.row_scales > 0) fence_proxy_async_shared();  // for the copies below
      __syncwarp();
      if (ready && (ranks >> lane & 1) != 0) {
        cp_async_bulk_store(rows + share.token(row) * args.wire_bytes, stage, bytes);
        cp_async_bulk_commit_group();
        cp_async_bulk_wait_group();
      }
    }
    __syncwarp();                                     // the copies of all lanes are complete, and have left the stage
    if (lane == 0) atom_add_acq_rel_shared(done, 1);  // pairs with the look in flag_rows
  }
}

template <typename T, int kAtOnce = 1>
__global__ void __launch_bounds__((kMaxWarps + 1) * 32, 1) push_kernel(const __grid_constant__ PushArgs args) {
  griddepcontrol_launch_dependents();  // dispatch
  const Communicator& comm = args.comm;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ __align__(8) uint64_t loaded[kMaxWarps][kMaxStages];
  __shared__ uint32_t wanted[kMaxWarps][kMaxStages];  // by which ranks, a bit each
  __shared__ uint32_t done[kMaxWarps];                // rows of each warp whose copies are complete
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t dispatch = this_dispatch(comm);
  if (blockIdx.x == 0 && threadIdx.x < comm.shape.ranks)  // pairs with the wait below, of peers
    st_release_sys(part<uint32_t>(comm, threadIdx.x, comm.layout.ready) + comm.rank, dispatch);
  if (threadIdx.x < kMaxWarps) done[threadIdx.x] = 0;
  __syncthreads();
  if (warp < args.warps)
    push_rows<T, kAtOnce>(args, shared + warp * args.stages * args.stage_bytes, loaded[warp], wanted[warp], &done[warp],
                          warp, lane);
  else
    flag_rows(args, done, dispatch, lane);
  // Keeps the kernel from ending before the one ahead has. One block does it, so that those that are done make room.
  if (blockIdx.x == gridDim.x - 1) griddepcontrol_wait();
}

template <int kAtOnce>
void (*quantizing_kernel(int32_t element))(PushArgs) {
  return kernel_of_element(element, push_kernel<float, kAtOnce>, push_kernel<__nv_bfloat16, kAtOnce>,
                           push_kernel<__half, kAtOnce>);
}

void (*kernel_of(const PushArgs& args))(PushArgs) {
  if (!args.quantize) return push_kernel<Unchanged>;
  return quantize_pieces(args.row_bytes) == 7 ? quantizing_kernel<7>(args.element) : quantizing_kernel<4>(args.element);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above; ring (warps * stages * stage_bytes) must fit the shared memory of a block. To quantise, a row
// is a multiple of 128 channels. A rank without tokens launches too: dispatch counts on this kernel to stand between it
// and earlier ones, and peers wait for it to be ready.
EP_MOE_API const char* ep_moe_push(const ep_moe::PushArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  return launch("push kernel", kernel_of(*args), *args, args->comm.blocks, (args->warps + 1) * 32,
                args->warps * args->stages * args->stage_bytes,
                args->early ? LaunchMode::kProgrammatic : LaunchMode::kLeavesShared, stream);
}

EP_MOE_API size_t ep_moe_push_args_bytes() { return sizeof(ep_moe::PushArgs); }
