// Counts of a routing: tokens that go to each rank, entries of each expert, and which token goes to which rank.
//
// One cluster of blocks; a thread takes a token at a time. A block counts in its shared memory; then each adds up some
// bins of all blocks and writes them, so nothing has to be zero before. No order matters: all are sums of integers.
//
//   writer                    reader                       ordered by
//   counts (shared, a block)  the other blocks             first cluster.sync
//   (end of a block)          blocks that read its counts  second cluster.sync
#include <cooperative_groups.h>

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

constexpr int kThreads = 512;
constexpr int kBlocks = 8;  // as many as a cluster may have everywhere
constexpr int kRanksAtOnce = 64;
constexpr int kEntriesAtOnce = 8;  // loads under way

__global__ void __cluster_dims__(kBlocks) __launch_bounds__(kThreads)
    routing_counts_kernel(const __grid_constant__ RoutingCountsArgs args) {
  extern __shared__ int counts[];
  const auto cluster = cooperative_groups::this_cluster();
  const int experts = args.ranks * args.experts_per_rank, bins = args.ranks + experts;
  for (int i = threadIdx.x; i < bins; i += kThreads) counts[i] = 0;
  __syncthreads();
  const int first = blockIdx.x * kThreads + threadIdx.x;
  for (int token = first; token < args.tokens; token += kBlocks * kThreads) {
    const int64_t* topk_idx = args.topk_idx + static_cast<int64_t>(token) * args.top_k;
    bool* in_rank = args.in_rank + static_cast<int64_t>(token) * args.ranks;
    for (int base = 0; base < args.ranks; base += kRanksAtOnce) {
      uint64_t present = 0;
      for (int k = 0; k < args.top_k; k += kEntriesAtOnce) {
        int64_t entries[kEntriesAtOnce];
#pragma unroll
        for (int j = 0; j < kEntriesAtOnce; ++j) entries[j] = k + j < args.top_k ? topk_idx[k + j] : -1;
#pragma unroll
        for (int j = 0; j < kEntriesAtOnce; ++j) {
          if (entries[j] < 0 || entries[j] >= experts) continue;
          const int expert = static_cast<int>(entries[j]), rank = expert / args.experts_per_rank - base;
          if (rank < 0 || rank >= kRanksAtOnce) continue;
          atomicAdd(&counts[args.ranks + expert], 1);
          present |= uint64_t{1} << rank;
        }
      }
      for (int rank = 0; rank < min(args.ranks - base, kRanksAtOnce); ++rank) {
        const bool goes = present >> rank & 1;
        in_rank[base + rank] = goes;
        if (goes) atomicAdd(&counts[base + rank], 1);
      }
    }
  }
  cluster.sync();
  for (int i = first; i < bins; i += kBlocks * kThreads) {
    int sum = 0;
    for (int block = 0; block < kBlocks; ++block) sum += cluster.map_shared_rank(counts, block)[i];
    args.counts[i] = sum;
  }
  cluster.sync();
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above; the counts must fit the shared memory of a block.
EP_MOE_API const char* ep_moe_routing_counts(const ep_moe::RoutingCountsArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  const int bins = args->ranks * (args->experts_per_rank + 1);
  return launch("routing counts kernel", routing_counts_kernel, *args, kBlocks, kThreads, bins * 4, LaunchMode::kPlain,
                stream);
}

EP_MOE_API size_t ep_moe_routing_counts_args_bytes() { return sizeof(ep_moe::RoutingCountsArgs); }
