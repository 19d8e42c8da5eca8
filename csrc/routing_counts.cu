// Counts of a routing: tokens that go to each rank, entries of each expert, and which token goes to which rank.
//
// A thread takes a token at a time; a block counts in shared memory and adds its counts to those of all blocks at the
// end. No order matters among blocks: all are sums of integers, from the zeros that the stream writes ahead of them.
#include <algorithm>

#include "launch.cuh"

namespace ep_moe {

struct RoutingCountsArgs {
  const int64_t* topk_idx;  // [tokens][top_k]; entries that are no expert count nowhere
  int32_t* counts;          // out [ranks + experts]: tokens of each rank, then entries of each expert
  bool* in_rank;            // out [tokens][ranks]
  int32_t tokens;
  int32_t top_k;
  int32_t ranks;
  int32_t experts_per_rank;
};

namespace {

constexpr int kThreads = 128;
constexpr int kMaxBlocks = 132;

__global__ void __launch_bounds__(kThreads) routing_counts_kernel(const __grid_constant__ RoutingCountsArgs args) {
  extern __shared__ int counts[];
  const int experts = args.ranks * args.experts_per_rank, bins = args.ranks + experts;
  for (int i = threadIdx.x; i < bins; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int token = blockIdx.x * kThreads + threadIdx.x; token < args.tokens; token += gridDim.x * kThreads) {
    bool* in_rank = args.in_rank + static_cast<int64_t>(token) * args.ranks;
    for (int rank = 0; rank < args.ranks; ++rank) in_rank[rank] = false;
    for (int k = 0; k < args.top_k; ++k) {
      const int64_t expert = args.topk_idx[static_cast<int64_t>(token) * args.top_k + k];
      if (expert < 0 || expert >= experts) continue;
      atomicAdd(&counts[args.ranks + expert], 1);
      const int rank = static_cast<int>(expert) / args.experts_per_rank;
      if (in_rank[rank]) continue;
      in_rank[rank] = true;
      atomicAdd(&counts[rank], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += kThreads)
    if (counts[i] != 0) atomicAdd(&args.counts[i], counts[i]);
}

}  // namespace
}  // namespace ep_moe

// Zeroes the counts and runs the kernel above; they must fit the shared memory of a block.
EP_MOE_API const char* ep_moe_routing_counts(const ep_moe::RoutingCountsArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const int bins = args->ranks * (args->experts_per_rank + 1);
  // A memset costs the host a small part of what an operation of PyTorch does.
  const cudaError_t error = cudaMemsetAsync(args->counts, 0, bins * sizeof(int32_t), stream);
  if (error != cudaSuccess || args->tokens == 0) return error_text(error, "routing counts");
  const int blocks = std::min((args->tokens + kThreads - 1) / kThreads, kMaxBlocks);
  return launch("routing counts kernel", routing_counts_kernel, *args, blocks, kThreads, bins * 4, LaunchMode::kPlain,
                stream);
}

EP_MOE_API size_t ep_moe_routing_counts_args_bytes() { return sizeof(ep_moe::RoutingCountsArgs); }
