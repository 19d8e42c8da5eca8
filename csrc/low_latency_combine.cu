// Low-latency combine: the experts' rows of each token are weighted and summed where they are, and the sum goes to the
// token's rank, which adds what its peers sent. low_latency.cuh says why this is safe.
//
// What moves: in S, the routing weights of this rank's tokens to the ranks of their experts, then a sum a (rank,
// token), by 16-byte stores to that rank. In R, the sums from the landing buffer to the output. Sums run in fp32: over
// a rank's rows in top-k order, rounded to bf16, then over the ranks in ascending order.
#include "element.cuh"
#include "launch.cuh"
#include "low_latency.cuh"

namespace ep_moe {

struct LowLatencyCombineArgs {
  LowLatency ll;
  const uint8_t* rows;        // bf16 [local_experts * ranks * max_tokens][hidden]
  const int32_t* slots;       // [ranks * max_tokens][top_k], of the handle: slot of each arrived entry, or -1
  const int64_t* topk_idx;    // [tokens][top_k], as dispatched
  const float* topk_weights;  // [tokens][top_k]
  uint8_t* out;               // bf16 [tokens][hidden]
  uint32_t* round;            // of this combine: written by S, read by R
  uint64_t* wait_ns;          // [ranks]: time until each rank had begun is added; or nullptr
  int32_t tokens;
  int32_t top_k;
};

namespace {

constexpr int kMaxThreads = 512;
constexpr int kBatch = 8;  // rows of a token in flight

using Row = Vector<__nv_bfloat16>;

__device__ __forceinline__ float* weight_place(const LowLatency& ll, int reader, uint32_t round, int writer,
                                               int token) {
  return landing_place<float>(ll, reader, ll.layout.weights, round, writer, token, ll.shape.max_top_k * 4);
}

__device__ __forceinline__ uint4* sum_place(const LowLatency& ll, int reader, uint32_t round, int writer, int token) {
  return landing_place<uint4>(ll, reader, ll.layout.sums, round, writer, token, ll.shape.hidden * 2);
}

// A token's weights to the rank `reader`, those of its experts.
__device__ void send_weights(const LowLatencyCombineArgs& args, int reader, int token, uint32_t round) {
  const LowLatency& ll = args.ll;
  const int experts_per_rank = ll.shape.num_experts / ll.shape.ranks;
  if (token >= args.tokens || threadIdx.x >= args.top_k) return;
  const int64_t entry = static_cast<int64_t>(token) * args.top_k + threadIdx.x;
  const int64_t expert = args.topk_idx[entry];
  if (expert < 0 || expert / experts_per_rank != reader) return;
  const uint32_t weight = __float_as_uint(args.topk_weights[entry]);
  st_volatile(reinterpret_cast<uint32_t*>(weight_place(ll, reader, round, ll.rank, token)) + threadIdx.x,
              weight == kEmptyWeight ? 0x7fffffff : weight);
}

// What one (rank, token) gets from this rank: filled by warp 0, read by all.
struct Terms {
  int count;
  int slots[kMaxTopK];
  float weights[kMaxTopK];
};

// The sum of a token's rows here, to its rank. `slot` is that of the lane's entry, or -1.
__device__ void send_sum(const LowLatencyCombineArgs& args, Terms& terms, int owner, int token, int slot,
                         uint32_t round) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32, vectors = ll.shape.hidden / Row::kCount;
  const uint32_t wanted = __ballot_sync(~0u, slot >= 0);
  const int count = __popc(wanted), order = __popc(wanted & ((1u << lane) - 1));
  __syncthreads();  // the last token's terms have been read
  if (threadIdx.x < 32 && slot >= 0) terms.slots[order] = slot;
  __syncthreads();
  const uint4* rows = reinterpret_cast<const uint4*>(args.rows);
  auto load = [&](Row(&batch)[kBatch], int first, int i) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (first + j < count && i < vectors)
        batch[j].bits = rows[static_cast<int64_t>(terms.slots[first + j]) * vectors + i];
  };
  Row batch[kBatch];
  load(batch, 0, threadIdx.x);  // before the weights are waited for
  if (threadIdx.x < 32 && slot >= 0) {
    uint32_t* place = reinterpret_cast<uint32_t*>(weight_place(ll, ll.rank, round, owner, token)) + lane;
    uint32_t weight = 0;
    const bool here = wait_for(ll, Step::kWeights, owner, round, [&] {
      weight = ld_volatile(place);
      return weight != kEmptyWeight;
    });
    if (here) st_volatile(place, kEmptyWeight);
    terms.weights[order] = __uint_as_float(weight);
  }
  __syncthreads();
  uint4* target = sum_place(ll, owner, round, ll.rank, token);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    float sum[Row::kCount] = {};
    for (int first = 0; first < count; first += kBatch) {
      if (first > 0 || i != threadIdx.x) load(batch, first, i);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= count) break;
        float values[Row::kCount];
        batch[j].to_float(values);
        // Not fused, so that any implementation can compute the same bits.
#pragma unroll
        for (int c = 0; c < Row::kCount; ++c)
          sum[c] = __fadd_rn(sum[c], __fmul_rn(terms.weights[first + j], values[c]));
      }
    }
    Row rounded;
    rounded.from_float(sum);
    st_volatile(target + i, fill_empty(rounded.bits));
  }
}

__device__ void send(const LowLatencyCombineArgs& args, uint32_t round, uint32_t present) {
  const LowLatency& ll = args.ll;
  const int ranks = ll.shape.ranks, places = ranks * ll.shape.max_tokens, lane = threadIdx.x % 32;
  __shared__ Terms terms;
  if (blockIdx.x == 0 && threadIdx.x < ranks && (present >> threadIdx.x & 1)) {
    uint32_t* entered = reinterpret_cast<uint32_t*>(ll.buffers[threadIdx.x] + ll.layout.entered);
    st_volatile(entered + round % kLandingBuffers * ranks + ll.rank, round);
  }
  // Peers' tokens first: their weights have the longer way.
  for (int i = blockIdx.x; i < places; i += gridDim.x) {
    const int reader = (ll.rank + 1 + i / ll.shape.max_tokens) % ranks;
    if (present >> reader & 1) send_weights(args, reader, i % ll.shape.max_tokens, round);
  }
  for (int i = blockIdx.x; i < places; i += gridDim.x) {
    const int owner = (ll.rank + 1 + i / ll.shape.max_tokens) % ranks, token = i % ll.shape.max_tokens;
    if ((present >> owner & 1) == 0) continue;
    const int64_t place = static_cast<int64_t>(owner) * ll.shape.max_tokens + token;
    const int slot = lane < args.top_k ? args.slots[place * args.top_k + lane] : -1;
    if (__any_sync(~0u, slot >= 0)) send_sum(args, terms, owner, token, slot, round);
  }
}

// Adds what the token's owners sent.
__device__ void receive_token(const LowLatencyCombineArgs& args, int token, uint32_t round, uint32_t present) {
  const LowLatency& ll = args.ll;
  const int lane = threadIdx.x % 32, experts_per_rank = ll.shape.num_experts / ll.shape.ranks;
  const int vectors = ll.shape.hidden / Row::kCount;
  const int64_t expert = lane < args.top_k ? args.topk_idx[static_cast<int64_t>(token) * args.top_k + lane] : -1;
  const bool valid = expert >= 0 && expert < ll.shape.num_experts;
  const uint32_t owners = __reduce_or_sync(~0u, valid ? 1u << (expert / experts_per_rank) : 0u) & present;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    Row landed[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank)  // a first look at all of them, so that they are read side by side
      if (owners >> rank & 1) landed[rank].bits = ld_volatile(sum_place(ll, ll.rank, round, rank, token) + i);
    float sum[Row::kCount] = {};
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank) {
      if ((owners >> rank & 1) == 0) continue;
      uint4* place = sum_place(ll, ll.rank, round, rank, token) + i;
      if (is_empty(landed[rank].bits)) {
        if (!take(ll, Step::kCombine, rank, round, place, landed[rank].bits)) continue;
      } else {
        empty(place);
      }
      float values[Row::kCount];
      landed[rank].to_float(values);
#pragma unroll
      for (int c = 0; c < Row::kCount; ++c) sum[c] += values[c];
    }
    Row rounded;
    rounded.from_float(sum);
    reinterpret_cast<uint4*>(args.out)[static_cast<int64_t>(token) * vectors + i] = rounded.bits;
  }
}

__device__ void receive(const LowLatencyCombineArgs& args, uint32_t round, uint32_t present) {
  const LowLatency& ll = args.ll;
  const int ranks = ll.shape.ranks;
  const uint64_t start = global_timer_ns();
  for (int token = blockIdx.x; token < args.tokens; token += gridDim.x) receive_token(args, token, round, present);
  if (blockIdx.x != gridDim.x - 1 || threadIdx.x >= ranks || (present >> threadIdx.x & 1) == 0) return;
  const int rank = threadIdx.x;
  const uint32_t* entered = reinterpret_cast<const uint32_t*>(ll.buffers[ll.rank] + ll.layout.entered) +
                            round % kLandingBuffers * ranks + rank;
  wait_for(ll, Step::kCall, rank, round, [&] { return ld_volatile(entered) == round; });
  if (args.wait_ns != nullptr)
    atomicAdd(reinterpret_cast<unsigned long long*>(&args.wait_ns[rank]), global_timer_ns() - start);
}

}  // namespace

__global__ void __launch_bounds__(kMaxThreads, 2) combine(const __grid_constant__ LowLatencyCombineArgs args) {
  const LowLatency& ll = args.ll;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const uint32_t present = present_ranks(ll);
  uint32_t* sent = &ll.workspace->combines[blockIdx.x];
  uint32_t round;
  if (ll.phases & kSend) {
    round = ld_volatile(sent) + 1;
    send(args, round, present);
    __syncthreads();  // all threads have read the counter
    if (threadIdx.x == 0) {
      *sent = round;
      if (blockIdx.x == 0) *args.round = round;
    }
  } else {
    round = ld_volatile(args.round);
  }
  if (ll.phases & kReceive) receive(args, round, present);
}

}  // namespace ep_moe

// Runs the kernel above; requires blocks <= kMaxBlocks, two of them resident on a multiprocessor, the same in every
// call.
EP_MOE_API const char* ep_moe_low_latency_combine(const ep_moe::LowLatencyCombineArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  return launch("low-latency combine kernel", combine, *args, args->ll.blocks, args->ll.threads, 0,
                LaunchMode::kProgrammatic, stream);
}

EP_MOE_API size_t ep_moe_low_latency_combine_args_bytes() { return sizeof(ep_moe::LowLatencyCombineArgs); }

EP_MOE_API void ep_moe_low_latency_layout(const ep_moe::LowLatencyShape* shape, ep_moe::LowLatencyLayout* layout) {
  *layout = ep_moe::low_latency_layout(*shape);
}
