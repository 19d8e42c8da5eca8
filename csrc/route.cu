// Routing: from the logits of a token over all experts to the experts it chooses and their weights, and back.
//
// A warp works on one token and holds all its logits, expert e in register e / 32 of lane e % 32. Choosing is repeated
// extraction of the largest: each lane finds its own, two warp-wide reductions find the winner, which of several equal
// ones is the expert of the lowest number. Backward recomputes the scores and writes the whole row of the gradient.
// Nothing depends on other warps, so results are the same from run to run.
#include <cstdint>

#include "launch.cuh"

namespace ep_moe {

enum class Scoring : int32_t {
  kSoftmax = 0,     // over the chosen logits
  kPreSoftmax = 1,  // over all logits, before the choice
  kSigmoid = 2,     // divided by the sum of the chosen ones
};

struct RouteArgs {
  const float* logits;        // [tokens][experts]
  const float* bias;          // [experts], added to scores for the choice alone, or nullptr
  int64_t* topk_idx;          // [tokens][top_k]; written forward, read backward
  float* weights;             // [tokens][top_k]; forward only
  const float* grad_weights;  // [tokens][top_k]; backward only
  float* grad_logits;         // [tokens][experts]; backward only
  int32_t tokens;
  int32_t experts;     // at most 1024
  int32_t top_k;       // at most 32
  int32_t groups;      // of consecutive experts, at most 32; 0 for no limit on them
  int32_t group_topk;  // groups a token may choose from
  int32_t scoring;     // Scoring
  float scale;         // on the weights
  int32_t reserved;
};

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kMaxPerLane = 32;
constexpr uint32_t kAll = ~0u;
constexpr float kTiny = 1e-20f;         // keeps a sum of sigmoids from being zero
constexpr uint32_t kNotACandidate = 0;  // below the key of every number
constexpr uint32_t kExcluded = 1;       // by its group

// Unsigned integers in the order of the numbers; NaN above all, as torch.topk has it.
__device__ __forceinline__ uint32_t key_of(float x) {
  if (isnan(x)) return ~0u;
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float number_of(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The logits of a token turned into scores, and what the choice looks at.
template <int per_lane>
struct Candidates {
  float scores[per_lane];
  uint32_t keys[per_lane];

  __device__ void load(const RouteArgs& args, int64_t token, int lane) {
    const float* logits = args.logits + token * args.experts;
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int expert = i * 32 + lane;
      scores[i] = expert < args.experts ? logits[expert] : -INFINITY;
      largest = fmaxf(largest, scores[i]);
    }
    const Scoring scoring = static_cast<Scoring>(args.scoring);
    if (scoring == Scoring::kPreSoftmax) {
      largest = warp_max(largest);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < per_lane; ++i) {
        scores[i] = expf(scores[i] - largest);
        sum += scores[i];
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int i = 0; i < per_lane; ++i) scores[i] /= sum;
    } else if (scoring == Scoring::kSigmoid) {
#pragma unroll
      for (int i = 0; i < per_lane; ++i) scores[i] = sigmoid(scores[i]);
    }
  }

  __device__ void make_keys(const RouteArgs& args, int lane) {
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int expert = i * 32 + lane;
      keys[i] = kNotACandidate;
      if (expert < args.experts) keys[i] = key_of(args.bias == nullptr ? scores[i] : scores[i] + args.bias[expert]);
    }
  }

  // Among experts first to end - 1: the one of the largest key, which no longer is a candidate in `keys_left`; its
  // score too. The same in all lanes.
  __device__ int extract(uint32_t (&keys_left)[per_lane], int first, int end, int lane, uint32_t& key,
                         float& score) const {
    uint32_t mine = kNotACandidate;
    int my_place = 0;
    float my_score = 0.0f;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int expert = i * 32 + lane;
      if (expert >= first && expert < end && keys_left[i] > mine) {
        mine = keys_left[i];
        my_place = i;
        my_score = scores[i];
      }
    }
    key = __reduce_max_sync(kAll, mine);
    const unsigned expert = __reduce_min_sync(kAll, mine == key ? my_place * 32 + lane : ~0u);
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (i * 32 + lane == static_cast<int>(expert)) keys_left[i] = kNotACandidate;
    }
    score = __shfl_sync(kAll, my_score, expert % 32);
    return static_cast<int>(expert);
  }

  // Leaves the experts of the best groups as candidates. A group is as good as the sum of its best experts, as many as
  // a token would choose from each.
  __device__ void limit_groups(const RouteArgs& args, int lane) {
    const int per_group = args.experts / args.groups, best = args.top_k / args.group_topk;
    uint32_t keys_left[per_lane];
#pragma unroll
    for (int i = 0; i < per_lane; ++i) keys_left[i] = keys[i];
    float group_score = 0.0f;  // of group `lane`
    for (int group = 0; group < args.groups; ++group) {
      float sum = 0.0f;
      for (int i = 0; i < best; ++i) {
        uint32_t key;
        float score;
        extract(keys_left, group * per_group, (group + 1) * per_group, lane, key, score);
        sum += number_of(key);
      }
      if (lane == group) group_score = sum;
    }
    uint32_t group_key = lane < args.groups ? key_of(group_score) : kNotACandidate;
    uint32_t allowed = 0;
    for (int i = 0; i < args.group_topk; ++i) {
      const uint32_t key = __reduce_max_sync(kAll, group_key);
      const int group = __ffs(__ballot_sync(kAll, group_key == key)) - 1;
      allowed |= 1u << group;
      if (lane == group) group_key = kNotACandidate;
    }
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const int expert = i * 32 + lane;
      if (expert < args.experts && (allowed >> expert / per_group & 1) == 0) keys[i] = kExcluded;
    }
  }
};

// From the scores of the chosen experts, lane j that of the j-th, to their weights.
__device__ __forceinline__ float weight_of(const RouteArgs& args, float score, bool chosen) {
  float weight = score;
  switch (static_cast<Scoring>(args.scoring)) {
    case Scoring::kSoftmax: {
      const float largest = warp_max(chosen ? score : -INFINITY);
      weight = chosen ? expf(score - largest) : 0.0f;
      weight /= warp_sum(weight);
      break;
    }
    case Scoring::kPreSoftmax:
      break;
    case Scoring::kSigmoid:
      if (args.top_k > 1) weight = score / (warp_sum(chosen ? score : 0.0f) + kTiny);
      break;
  }
  return weight;
}

template <int per_lane>
__global__ void __launch_bounds__(kThreads) route_kernel(const __grid_constant__ RouteArgs args) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= args.tokens) return;
  Candidates<per_lane> candidates;
  candidates.load(args, token, lane);
  candidates.make_keys(args, lane);
  if (args.groups > 0) candidates.limit_groups(args, lane);
  int my_expert = 0;
  float my_score = 0.0f;
  for (int j = 0; j < args.top_k; ++j) {
    uint32_t key;
    float score;
    const int expert = candidates.extract(candidates.keys, 0, args.experts, lane, key, score);
    if (lane == j) my_expert = expert, my_score = score;
  }
  const bool chosen = lane < args.top_k;
  const float weight = weight_of(args, my_score, chosen);
  if (!chosen) return;
  args.topk_idx[token * args.top_k + lane] = my_expert;
  args.weights[token * args.top_k + lane] = weight * args.scale;
}

template <int per_lane>
__global__ void __launch_bounds__(kThreads) route_backward_kernel(const __grid_constant__ RouteArgs args) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= args.tokens) return;
  const Scoring scoring = static_cast<Scoring>(args.scoring);
  const bool chosen = lane < args.top_k;
  const int64_t entry = token * args.top_k + lane;
  const int expert = chosen ? static_cast<int>(args.topk_idx[entry]) : 0;
  const float grad = chosen ? args.grad_weights[entry] * args.scale : 0.0f;
  float* row = args.grad_logits + token * args.experts;

  float mine;  // the gradient of this lane's chosen logit
  if (scoring == Scoring::kPreSoftmax) {
    Candidates<per_lane> candidates;
    candidates.load(args, token, lane);
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      const float other = __shfl_sync(kAll, candidates.scores[i], expert % 32);
      if (expert / 32 == i) score = other;
    }
    const float mean = warp_sum(grad * score);
#pragma unroll
    for (int i = 0; i < per_lane; ++i) {
      if (i * 32 + lane < args.experts) row[i * 32 + lane] = -candidates.scores[i] * mean;
    }
    mine = score * (grad - mean);
  } else {
    for (int e = lane; e < args.experts; e += 32) row[e] = 0.0f;
    const float logit = chosen ? args.logits[token * args.experts + expert] : 0.0f;
    if (scoring == Scoring::kSoftmax) {
      const float weight = weight_of(args, logit, chosen);
      mine = weight * (grad - warp_sum(grad * weight));
    } else {
      const float score = sigmoid(logit);
      float grad_score = grad;
      if (args.top_k > 1) {
        const float sum = warp_sum(chosen ? score : 0.0f) + kTiny;
        grad_score = (grad - warp_sum(grad * score / sum)) / sum;
      }
      mine = grad_score * score * (1.0f - score);
    }
  }
  __syncwarp();  // other lanes have written to the places of the chosen ones
  if (chosen) row[expert] = mine;
}

using Kernel = void (*)(RouteArgs);

// The kernel that holds the fewest registers a lane.
template <int per_lane = 1>
Kernel find_kernel(int experts, bool backward) {
  if (experts <= per_lane * 32) return backward ? route_backward_kernel<per_lane> : route_kernel<per_lane>;
  if constexpr (per_lane < kMaxPerLane) return find_kernel<per_lane * 2>(experts, backward);
  return nullptr;
}

const char* launch_over_tokens(const char* what, const RouteArgs& args, bool backward, cudaStream_t stream) {
  if (args.tokens == 0) return nullptr;
  const Kernel kernel = find_kernel(args.experts, backward);
  if (kernel == nullptr || args.experts <= 0 || args.top_k <= 0 || args.top_k > 32 || args.top_k > args.experts ||
      args.groups < 0 || args.groups > 32 || (args.groups > 0 && args.group_topk <= 0)) {
    return error_text(cudaErrorInvalidValue, what);
  }
  return launch(what, kernel, args, (args.tokens + kWarps - 1) / kWarps, kThreads, 0, LaunchMode::kPlain, stream);
}

}  // namespace
}  // namespace ep_moe

// Writes `topk_idx`, best first, and `weights`.
EP_MOE_API const char* ep_moe_route_forward(const ep_moe::RouteArgs* args, cudaStream_t stream) {
  return ep_moe::launch_over_tokens("routing kernel", *args, false, stream);
}

// Writes `grad_logits`.
EP_MOE_API const char* ep_moe_route_backward(const ep_moe::RouteArgs* args, cudaStream_t stream) {
  return ep_moe::launch_over_tokens("routing backward kernel", *args, true, stream);
}

EP_MOE_API size_t ep_moe_route_args_bytes() { return sizeof(ep_moe::RouteArgs); }
