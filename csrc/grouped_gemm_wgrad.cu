// Gradient of the experts' weights: for each expert its gradient rows, transposed, by its rows.
//
// The reduction runs over the expert's tokens, along which neither operand is contiguous: both are copied as they lie
// and transposed by the multiply. The last block of a segment also holds rows of the next expert, or such that nobody
// wrote: before they are multiplied, the warpgroups overwrite them with zeros in both operands, since zero times NaN
// would not be zero. Instructions that would see such rows alone are left out. An expert without tokens gets zeros.
//
// One thread copies and two warpgroups multiply, half of a tile's gradient columns each, over the ring of
// gemm_ring.cuh. Results leave as gemm_weight_result.cuh says.
#include <type_traits>

#include "gemm_ring.cuh"
#include "gemm_tiles.cuh"
#include "gemm_weight_result.cuh"
#include "gemm_weight_tiles.cuh"
#include "launch.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace ep_moe {

struct GroupedWgradArgs {
  const void* grad;     // [num_rows][out_features]
  const void* rows;     // [num_rows][in_features]
  void* out;            // [experts][out_features][in_features]
  const int32_t* ends;  // [experts], where each one's segment ends; the next one's starts there
  int64_t num_rows;
  int32_t experts;
  int32_t out_features;  // multiples of 64
  int32_t in_features;
  int32_t blocks;      // to launch; one fits on an SM
  int32_t accumulate;  // `out` is fp32 and added to; otherwise it is bf16 and all of it is written
};

namespace {

constexpr int kRingStages = 6;
constexpr int kBlockK = 32;  // tokens in a stage
using Ring = RingPosition<kRingStages>;
using Barriers = RingBarriers<kRingStages>;
constexpr int kBoxBytes = 64 * kBlockK * 2;  // 64 columns of a block
constexpr int kGradBytes = kTileOut / 64 * kBoxBytes;
constexpr int kStageBytes = kGradBytes + kTileIn / 64 * kBoxBytes;
constexpr int kSharedBytes = kSwizzleGroupBytes + kRingStages * kStageBytes + kMultipliers * kStagingBytes;

// A tile of fewer tokens is multiplied in less time than reducing copies take for it; measured between 256 and 2048.
constexpr int kReducedTokens = 1536;

struct WeightGemm {
  CUtensorMap grad;
  CUtensorMap rows;
  CUtensorMap out;
  GroupedWgradArgs args;
};

__device__ __forceinline__ WeightTileSequence tiles_of(const GroupedWgradArgs& args, const int32_t* ends) {
  return WeightTileSequence(ends, args.experts, args.out_features, args.in_features);
}

__device__ __forceinline__ void copy_operands(const WeightGemm& gemm, const int32_t* ends, Barriers& barriers,
                                              uint32_t ring) {
  const uint64_t policy = createpolicy_evict_last();  // results pass through the cache, operands are read again
  Ring position;
  for (WeightTileSequence tiles = tiles_of(gemm.args, ends); !tiles.done(); tiles.advance()) {
    const WeightTile tile = tiles.tile();
    for (int token = 0; token < tile.tokens; token += kBlockK) {
      position.wait_empty(barriers);
      uint64_t* full = &barriers.full[position.stage];
      const uint32_t stage = ring + position.stage * kStageBytes;
      mbarrier_arrive_expect_tx(full, kStageBytes);
      cp_async_bulk_tensor_load(stage, &gemm.grad, 0, tile.row + token, tile.out / 64, full, policy);
      cp_async_bulk_tensor_load(stage + kGradBytes, &gemm.rows, 0, tile.row + token, tile.in / 64, full, policy);
      position.advance();
    }
  }
}

__device__ __forceinline__ void st_shared_zeros(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Overwrites tokens `first` to `last` in the operands of a warpgroup: its own box of grad, and those of rows, which the
// other warpgroup overwrites with the same zeros. The swizzle permutes within a token's 128 bytes only.
__device__ __forceinline__ void clear_tokens(uint32_t grad, uint32_t rows, int first, int last, int warpgroup) {
  constexpr int kChunks = kSwizzleRowBytes / 16;
  const int thread = threadIdx.x % kWarpgroup;
  for (int i = thread; i < (last - first) * kChunks; i += kWarpgroup) {
    const uint32_t offset = first * kSwizzleRowBytes + i * 16;
    st_shared_zeros(grad + offset);
#pragma unroll
    for (int box = 0; box < kTileIn / 64; ++box) st_shared_zeros(rows + box * kBoxBytes + offset);
  }
  fence_proxy_async_shared();
  bar_sync(1 + warpgroup, kWarpgroup);
}

template <Result result>
__device__ __forceinline__ void multiply(const WeightGemm& gemm, const int32_t* ends, Barriers& barriers,
                                         TotalBarriers& totals, uint32_t ring, uint32_t staging, int warpgroup) {
  Ring position;
  for (WeightTileSequence tiles = tiles_of(gemm.args, ends); !tiles.done(); tiles.advance()) {
    const WeightTile tile = tiles.tile();
    if (result != Result::kWrite && tile.tokens == 0) continue;
    float sums[kTileIn / 2];
    if (tile.tokens == 0) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
    }
    int previous = 0;
    // A block of tokens. The number of steps is known when this is compiled: with branches between multiplies, the
    // compiler lets one wait for another.
    const auto multiply_block = [&](int token, auto steps) {
      constexpr int kSteps = decltype(steps)::value;
      position.wait_full(barriers);
      const uint32_t stage = ring + position.stage * kStageBytes;
      const uint32_t my_grad = stage + warpgroup * kBoxBytes, rows = stage + kGradBytes;
      const int valid = tile.tokens - token;
      if (valid < kSteps * kMmaK) clear_tokens(my_grad, rows, valid, kSteps * kMmaK, warpgroup);
      const uint64_t a = matrix_descriptor(my_grad, kBoxBytes), b = matrix_descriptor(rows, kBoxBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma<kTileIn, Major::kOuter, Major::kOuter>(sums, a + step * descriptor_step(Major::kOuter),
                                                     b + step * descriptor_step(Major::kOuter), token > 0 || step > 0);
      }
      wgmma_commit_group();
      wgmma_wait_group<1>();  // the block before this one has been multiplied
      if (token > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.empty[previous]);
      previous = position.stage;
      position.advance();
    };
    constexpr std::integral_constant<int, kBlockK / kMmaK> kWhole;
    constexpr std::integral_constant<int, 1> kFirstStep;
    static_assert(kWhole == 2, "a block of fewer tokens than kMmaK is one step, all others are whole");
    int token = 0;
#pragma unroll 1
    for (; token + kMmaK < tile.tokens; token += kBlockK) multiply_block(token, kWhole);
    if (token < tile.tokens) multiply_block(token, kFirstStep);
    wgmma_wait_group<0>();
    touch(sums);
    if (tile.tokens > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.empty[previous]);

    if constexpr (result == Result::kTotal) {
      add_result(staging, totals, sums);
    } else {
      store_result<result>(&gemm.out, tile, staging, sums, warpgroup);
    }
  }
  // Shared memory must outlive the copies out of it.
  if (threadIdx.x % kWarpgroup == 0) cp_async_bulk_wait_group_read<0>();
}

template <Result result>
__global__ void __launch_bounds__(kGemmThreads, 1) weight_gemm_kernel(const __grid_constant__ WeightGemm gemm) {
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ int32_t ends[kMaxGemmExperts];
  __shared__ Barriers barriers;
  __shared__ TotalBarriers totals[kMultipliers];
  if (threadIdx.x == 0) {
    barriers.init();
    for (TotalBarriers& each : totals) {
      if (result == Result::kTotal) each.init();
    }
  }
  for (int e = threadIdx.x; e < gemm.args.experts; e += kGemmThreads) ends[e] = gemm.args.ends[e];
  __syncthreads();
  const uint32_t ring =
      (shared_address(dynamic_shared) + kSwizzleGroupBytes - 1) / kSwizzleGroupBytes * kSwizzleGroupBytes;
  const uint32_t staging = ring + kRingStages * kStageBytes;
  const int group = static_cast<int>(threadIdx.x / kWarpgroup) - 1;
  if (group < 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) copy_operands(gemm, ends, barriers, ring);
    const int moved = static_cast<int>(threadIdx.x / 32) - 1;  // each of the next warps works for a warpgroup
    if (result == Result::kTotal && threadIdx.x % 32 == 0 && moved >= 0 && moved < kMultipliers) {
      move_totals(&gemm.out, tiles_of(gemm.args, ends), totals[moved], staging + moved * kStagingBytes, moved);
    }
  } else {
    setmaxnreg_inc<kMultiplierRegisters>();
    multiply<result>(gemm, ends, barriers, totals[group], ring, staging + group * kStagingBytes, group);
  }
}

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_grouped_gemm_wgrad(const ep_moe::GroupedWgradArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "grouped GEMM for the weights' gradient";
  if (args->experts == 0 || args->out_features == 0 || args->in_features == 0) return nullptr;
  if (args->experts < 0 || args->experts > kMaxGemmExperts || args->out_features % 64 != 0 ||
      args->in_features % 64 != 0 || args->num_rows <= 0 || args->blocks <= 0) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  WeightGemm gemm;
  gemm.args = *args;
  constexpr CUtensorMapDataType kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapDataType out_type = args->accumulate ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : kBf16;
  if (!encode_column_blocks(&gemm.grad, args->grad, args->num_rows, args->out_features, kBlockK, kTileOut / 64) ||
      !encode_column_blocks(&gemm.rows, args->rows, args->num_rows, args->in_features, kBlockK, kTileIn / 64) ||
      !encode_rows(&gemm.out, out_type, args->out, args->experts, args->out_features, args->in_features,
                   kWarpgroupOut)) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  const bool few_tokens = args->num_rows < static_cast<int64_t>(kReducedTokens) * args->experts;
  const auto kernel = !args->accumulate ? weight_gemm_kernel<Result::kWrite>
                      : few_tokens      ? weight_gemm_kernel<Result::kTotal>
                                        : weight_gemm_kernel<Result::kReduce>;
  return launch(kWhat, kernel, gemm, args->blocks, kGemmThreads, kSharedBytes, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_grouped_wgrad_args_bytes() { return sizeof(ep_moe::GroupedWgradArgs); }
