// Forward of the experts' first linear layer with SwiGLU and the routing weight inside.
//
// A tile takes the same 128 rows of the gate and of the linear half of an expert's weight, so that both halves of a
// result meet in a warpgroup. The sums are staged in shared memory, rounded as the plain product would write them, and
// read back in rows: a loop of a few instructions for all tile widths, where unrolled arithmetic on the accumulators
// would spill registers and miss the instruction cache. The arithmetic is that of activation.cu, and so are the bits.
// Where backward will need the rounded sums, they are written as well.
#include "element.cuh"
#include "gemm_tokens.cuh"
#include "pointwise.cuh"

namespace ep_moe {

struct SwigluGemmArgs {
  GroupedGemmArgs gemm;      // `columns` of the result, half of what the weight has; `out` is activated
  const float* row_weights;  // [num_rows], or nullptr for weights of 1
  void* pre_activation;      // [num_rows][2][columns], or nullptr
};

namespace {

constexpr int kHalfColumns = 64;  // of a warpgroup, in either half
constexpr int kHalfChunks = kHalfColumns / 8;

struct SwigluProduct {
  static constexpr Major kWeightMajor = Major::kReduction;
  static constexpr int kWeightMatrices = 2;
  using Chunk = Vector<__nv_bfloat16>;

  const float* row_weights;
  Chunk* pre_activation;

  template <int width>
  __device__ __forceinline__ void store(const GroupedGemmArgs& args, const TokenTile& tile,
                                        const float (&sums)[2][width / 2], uint32_t staging, int warpgroup) const {
    const uint32_t weights = staging + staged_bytes(kMaxWidth);
    float weight[2] = {1.0f, 1.0f};  // on their way while the sums are staged
    const int thread = threadIdx.x % kWarpgroup;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = thread + i * kWarpgroup;
      if (row_weights != nullptr && token < tile.tokens) weight[i] = row_weights[tile.row + token];
    }
    stage_columns<width>(staging, sums);
#pragma unroll
    for (int i = 0; i < 2; ++i) st_shared(weights + (thread + i * kWarpgroup) * 4, weight[i]);
    bar_sync(1 + warpgroup, kWarpgroup);
    const int first = tile.weight_tile * kWeightTile / 2 + warpgroup * kHalfColumns;
    if (first < args.columns) activate(args, tile, staging, weights, first);
  }

 private:
  // Of a warpgroup's columns, from `first` on. A thread has a chunk of every 16th row.
  __device__ __forceinline__ void activate(const GroupedGemmArgs& args, const TokenTile& tile, uint32_t staging,
                                           uint32_t weights, int first) const {
    constexpr int kRowsAtOnce = kWarpgroup / kHalfChunks;
    const int chunk = threadIdx.x % kHalfChunks;
    const int64_t row_chunks = args.columns / 8;
    Chunk* out = static_cast<Chunk*>(args.out) + tile.row * row_chunks + first / 8 + chunk;
    Chunk* pre = pre_activation == nullptr ? nullptr : pre_activation + 2 * tile.row * row_chunks + first / 8 + chunk;
#pragma unroll 2
    for (int row = threadIdx.x % kWarpgroup / kHalfChunks; row < tile.tokens; row += kRowsAtOnce) {
      const Chunk gate = {ld_shared(staged_chunk(staging, row, chunk))};
      const Chunk linear = {ld_shared(staged_chunk(staging, row, kHalfChunks + chunk))};
      const float weight = ld_shared_f32(weights + row * 4);
      if (pre != nullptr) {
        pre[2 * row * row_chunks] = gate;
        pre[(2 * row + 1) * row_chunks] = linear;
      }
      float values[Chunk::kCount], factors[Chunk::kCount];
      gate.to_float(values);
      linear.to_float(factors);
#pragma unroll
      for (int k = 0; k < Chunk::kCount; ++k) values[k] = Silu::value(values[k]) * factors[k] * weight;
      Chunk result;
      result.from_float(values);
      out[row * row_chunks] = result;
    }
  }
};

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_grouped_gemm_swiglu(const ep_moe::SwigluGemmArgs* args, cudaStream_t stream) {
  const ep_moe::SwigluProduct product = {args->row_weights,
                                         static_cast<ep_moe::SwigluProduct::Chunk*>(args->pre_activation)};
  return ep_moe::launch_token_gemm("grouped GEMM with SwiGLU", args->gemm, product, stream);
}

EP_MOE_API size_t ep_moe_swiglu_gemm_args_bytes() { return sizeof(ep_moe::SwigluGemmArgs); }
