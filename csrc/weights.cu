// Weights: one fp32 value a routed entry, from the token's rank to the expert's (routing weights) or back (gradients);
// or top-k values a received row, back to the token's rank, which adds those of all ranks in ascending order.
//
//   writer                    reader                        ordered by
//   weights[e % 2] (peers)    the value's destination       grid barrier, then weight flag: st.release / ld.acquire
//   (reuse of the copy)       the same, round e - 2         rule (1) of communicator.cuh
//
// Loops are not unrolled, for the reason that layout.cu gives.
#include "communicator.cuh"
#include "launch.cuh"

namespace ep_moe {

struct WeightsArgs {
  Communicator comm;
  const int32_t* slots;     // [ranks][slot_tokens][top_k], from the layout; its rows [ranks][slot_tokens] for kSums
  const int64_t* topk_idx;  // [tokens][top_k], global expert or -1
  const uint8_t* owners;    // [tokens]: bit r says that rank r has a row of this token
  float* by_token;          // [tokens][top_k]; read for kToSlots, written otherwise (0 where not routed)
  float* by_row;            // [slots]; written for kToSlots (padding is left alone), read otherwise; [rows][top_k] for
                            // kSums
  int32_t tokens;
  int32_t top_k;
  int32_t experts_per_rank;
  int32_t direction;
  int32_t slot_tokens;
  int32_t reserved;
};

namespace {

enum Direction : int32_t { kToSlots = 0, kFromSlots = 1, kSums = 2 };

constexpr int kThreads = 512;

// Where `writer` puts the value of an entry, flat in [tokens][top_k], at `reader`.
__device__ __forceinline__ float* place(const WeightsArgs& args, int reader, int writer, uint32_t round,
                                        uint32_t entry) {
  const Communicator& comm = args.comm;
  const uint32_t in_rank = entry / args.top_k, k = entry - in_rank * args.top_k;
  const int64_t token = (round % 2 * comm.shape.ranks + writer) * comm.shape.max_tokens + in_rank;
  return part<float>(comm, reader, comm.layout.weights) + token * comm.shape.max_top_k + k;
}

__global__ void __launch_bounds__(kThreads, 1) weights_kernel(const __grid_constant__ WeightsArgs args) {
  const Communicator& comm = args.comm;
  const int ranks = comm.shape.ranks;
  const uint32_t round = begin_round(comm);
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  const uint32_t mine = static_cast<uint32_t>(args.tokens) * args.top_k;  // 2^32 would be 64 GB of routing
  const uint32_t all = static_cast<uint32_t>(args.slot_tokens) * args.top_k;
  announce_round(comm, round);

  if (args.direction == kToSlots) {
#pragma unroll 1
    for (uint32_t i = thread; i < mine; i += threads) {
      const float value = args.by_token[i];
#pragma unroll 1
      for (int peer = 0; peer < ranks; ++peer) *place(args, peer, comm.rank, round, i) = value;
    }
  } else {
#pragma unroll 1
    for (uint32_t i = thread; i < ranks * all; i += threads) {
      const uint32_t source = i / all, token = i / args.top_k;
      const int slot = args.slots[args.direction == kSums ? token : i];
      if (slot < 0) continue;
      const int64_t value = args.direction == kSums ? static_cast<int64_t>(slot) * args.top_k + i % args.top_k : slot;
      *place(args, source, comm.rank, round, i - source * all) = args.by_row[value];
    }
  }
  grid_barrier(comm);  // everything is written before the flags are released
  if (blockIdx.x == 0 && threadIdx.x < ranks)
    st_release_sys(part<uint32_t>(comm, threadIdx.x, comm.layout.weight_flags) + comm.rank, round);
  if (threadIdx.x < ranks) {
    const uint32_t* flag = part<uint32_t>(comm, comm.rank, comm.layout.weight_flags) + threadIdx.x;
    // Pairs with the release above; a rank that has set its flag has entered the round, which rule (1) asks for.
    wait_bounded(comm, Step::kWeights, threadIdx.x, round, [=] { return has_reached(flag, round); });
  }
  __syncthreads();

  if (args.direction == kToSlots) {
#pragma unroll 1
    for (uint32_t i = thread; i < ranks * all; i += threads) {
      const int slot = args.slots[i];
      const uint32_t source = i / all;
      if (slot >= 0) args.by_row[slot] = *place(args, comm.rank, source, round, i - source * all);
    }
  } else if (args.direction == kFromSlots) {
#pragma unroll 1
    for (uint32_t i = thread; i < mine; i += threads) {
      const int64_t expert = args.topk_idx[i];
      const int owner = static_cast<int>(expert) / args.experts_per_rank;
      args.by_token[i] = expert >= 0 ? *place(args, comm.rank, owner, round, i) : 0.0f;
    }
  } else {
#pragma unroll 1
    for (uint32_t i = thread; i < mine; i += threads) {
      float sum = 0.0f;
#pragma unroll 1
      for (uint32_t owners = args.owners[i / args.top_k]; owners != 0; owners &= owners - 1)
        sum += *place(args, comm.rank, __ffs(owners) - 1, round, i);
      args.by_token[i] = sum;
    }
  }
  end_round(comm, round);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above; requires 1 <= blocks <= multiprocessors.
EP_MOE_API const char* ep_moe_weights(const ep_moe::WeightsArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  return launch("weights kernel", weights_kernel, *args, args->comm.blocks, kThreads, 0, LaunchMode::kCooperative,
                stream);
}

EP_MOE_API size_t ep_moe_weights_args_bytes() { return sizeof(ep_moe::WeightsArgs); }
