// What a rank's routing asks of two hops: which tokens go to which node, and the tally that all ranks are told of it.
//
// Nothing moves. The first blocks take a node each and list its tokens in ascending order: a pass over the routing
// counts what goes to the nodes before, hence where the list begins, and a second one gives every token its place by
// ballots, without an atomic counter. The other blocks count, a token a thread, in shared memory first; as sums of
// integers their counts depend on no order. No block waits for another, so nothing needs ordering but the end of the
// kernel.
#include <algorithm>
#include <climits>
#include <cstdint>

#include "buffer.cuh"
#include "launch.cuh"

namespace ep_moe {

constexpr int kSignatureWords = 5;

// A tally, int32: bins [ranks][experts_per_rank + 1], the entries of each expert of a rank, then the tokens that go to
// the rank; [nodes], the tokens that go to each node; 1; the lowest entry below -1, or 0; the highest entry beyond the
// last expert, or 0; the signature; zeros.
struct RoutingTallyArgs {
  const int64_t* topk_idx;  // [tokens][top_k], expert or -1; entries out of range go nowhere
  int64_t* sent;            // out [nodes * tokens]: the tokens of each node, ascending, one node behind the other
  int32_t* places;          // out [nodes][tokens]: a token's place among those of the node, or -1
  int32_t* tally;           // out, zero before
  int32_t tokens;
  int32_t top_k;
  int32_t ranks;
  int32_t nodes;
  int32_t experts_per_rank;
  int32_t signature[kSignatureWords];  // what must be the same on all ranks
};

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCounters = 64;  // blocks

// Bit n: the token goes to node n.
__device__ __forceinline__ uint32_t nodes_of(const RoutingTallyArgs& args, int token) {
  const int experts = args.ranks * args.experts_per_rank, experts_per_node = experts / args.nodes;
  const int64_t* chosen = args.topk_idx + static_cast<int64_t>(token) * args.top_k;
  uint32_t nodes = 0;
  for (int k = 0; k < args.top_k; ++k) {
    const int64_t expert = chosen[k];
    if (expert >= 0 && expert < experts) nodes |= 1u << (static_cast<int>(expert) / experts_per_node);
  }
  return nodes;
}

// All threads of the block: the sum of what each warp passes; lanes of a warp pass the same. `before` gets that of the
// warps before.
__device__ __forceinline__ int sum_of_warps(int value, int& before) {
  __shared__ int values[kWarps];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) values[warp] = value;
  __syncthreads();
  int sum = 0;
  before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = sum;
    sum += values[w];
  }
  __syncthreads();  // the next call writes them
  return sum;
}

__device__ void list_tokens(const RoutingTallyArgs& args, int node) {
  const int lane = threadIdx.x % 32;
  int count = 0, before;
  for (int token = threadIdx.x; token < args.tokens; token += kThreads)
    count += __popc(nodes_of(args, token) & ((1u << node) - 1));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) count += __shfl_xor_sync(~0u, count, distance);
  int64_t* sent = args.sent + sum_of_warps(count, before);
  int32_t* places = args.places + static_cast<int64_t>(node) * args.tokens;

  int listed = 0;
  for (int first = 0; first < args.tokens; first += kThreads) {
    const int token = first + static_cast<int>(threadIdx.x);
    const bool goes = token < args.tokens && (nodes_of(args, token) >> node & 1) != 0;
    const uint32_t going = __ballot_sync(~0u, goes);
    const int together = sum_of_warps(__popc(going), before);
    const int place = listed + before + __popc(going & ((1u << lane) - 1));
    if (token < args.tokens) places[token] = goes ? place : -1;
    if (goes) sent[place] = token;
    listed += together;
  }
  if (threadIdx.x == 0) args.tally[args.ranks * (args.experts_per_rank + 1) + node] = listed;
}

__device__ void count_entries(const RoutingTallyArgs& args, int block, int blocks) {
  extern __shared__ int counts[];
  const int per_rank = args.experts_per_rank, experts = args.ranks * per_rank, bins = args.ranks * (per_rank + 1);
  int32_t* header = args.tally + bins + args.nodes;
  for (int i = threadIdx.x; i < bins; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int token = block * kThreads + static_cast<int>(threadIdx.x); token < args.tokens; token += blocks * kThreads) {
    const int64_t* chosen = args.topk_idx + static_cast<int64_t>(token) * args.top_k;
    for (int k = 0; k < args.top_k; ++k) {
      const int64_t entry = chosen[k];
      if (entry < -1) atomicMin(&header[1], static_cast<int>(max(entry, static_cast<int64_t>(INT_MIN))));
      if (entry >= experts) atomicMax(&header[2], static_cast<int>(min(entry, static_cast<int64_t>(INT_MAX))));
      if (entry < 0 || entry >= experts) continue;
      const int expert = static_cast<int>(entry), rank = expert / per_rank, first = rank * per_rank;
      atomicAdd(&counts[expert + rank], 1);
      bool again = false;  // an expert of this rank came before
      for (int j = 0; j < k; ++j) again |= chosen[j] >= first && chosen[j] < first + per_rank;
      if (!again) atomicAdd(&counts[(rank + 1) * (per_rank + 1) - 1], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += kThreads)
    if (counts[i] != 0) atomicAdd(&args.tally[i], counts[i]);
  if (block != 0) return;
  if (threadIdx.x == 0) header[0] = 1;
  if (threadIdx.x < kSignatureWords) header[3 + threadIdx.x] = args.signature[threadIdx.x];
}

__global__ void __launch_bounds__(kThreads) routing_tally_kernel(const __grid_constant__ RoutingTallyArgs args) {
  const int block = static_cast<int>(blockIdx.x) - args.nodes;
  if (block < 0)
    list_tokens(args, blockIdx.x);
  else
    count_entries(args, block, static_cast<int>(gridDim.x) - args.nodes);
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above; the bins must fit the shared memory of a block.
EP_MOE_API const char* ep_moe_routing_tally(const ep_moe::RoutingTallyArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "routing tally kernel";
  if (args->nodes < 1 || args->nodes > kMaxNodes) return error_text(cudaErrorInvalidValue, kWhat);
  const int counters = std::clamp((args->tokens + kThreads - 1) / kThreads, 1, kMaxCounters);
  const int bins = args->ranks * (args->experts_per_rank + 1);
  return launch(kWhat, routing_tally_kernel, *args, args->nodes + counters, kThreads, bins * 4, LaunchMode::kPlain,
                stream);
}

EP_MOE_API size_t ep_moe_routing_tally_args_bytes() { return sizeof(ep_moe::RoutingTallyArgs); }
