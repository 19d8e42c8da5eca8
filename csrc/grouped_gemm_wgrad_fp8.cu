// Gradient of the experts' weights in FP8: for each expert its gradient rows, transposed, by its rows, both e4m3.
//
// The reduction runs over tokens, along which the multiply wants its operands: quantize_columns.cu has transposed them,
// into blocks of 128 tokens of one expert, zeros behind an expert's last token. So no product needs a mask, and a stage
// of the ring is a block. Instructions that would see those zeros alone are left out. The products of a block are
// summed by the multiply, then scaled and added to fp32 registers ("promoted"), as the DeepSeek-V3 report describes
// (arXiv 2412.19437, section 3.3).
//
// Of the gradient a channel has a scale for each block. Of the rows it has one for all tokens of the expert, by which
// sums are scaled when they are complete: two scales that change from block to block and from channel to channel would
// take a multiplication more for every product, between multiplies that wait for it. An expert without tokens gets
// zeros and has no scales.
//
// A tile is 128 channels of the gradient by 256 of the rows, in four units of 64 x 128: a warpgroup has two, side by
// side, so that its sums lie as those of the product in bf16 and leave in the same ways (gemm_weight_result.cuh). The
// warpgroups multiply by turns (gemm_turns.cuh): both take two a stage, also where half of a tile lies outside of the
// matrix and multiplies zeros. One thread copies.
//
// Registers of a multiplying thread: 128 sums and 64 products. Shared memory: three stages of 48 KB, 64 KB through
// which results leave, 4.5 KB of scales.
#include <type_traits>

#include "gemm_ring.cuh"
#include "gemm_tiles.cuh"
#include "gemm_turns.cuh"
#include "gemm_weight_result.cuh"
#include "gemm_weight_tiles.cuh"
#include "launch.cuh"
#include "tma.cuh"
#include "token_blocks.cuh"
#include "wgmma_fp8.cuh"

namespace ep_moe {

struct GroupedWgradFp8Args {
  const void* grad;          // e4m3 [token_blocks][out_features][128]
  const float* grad_scales;  // [token_blocks][out_features]
  const void* rows;          // e4m3 [token_blocks][in_features][128]
  const float* row_scales;   // [experts][in_features]
  void* out;                 // [experts][out_features][in_features]
  const int32_t* ends;       // [experts], where each one's segment of rows ends; the next one's starts there
  int32_t token_blocks;      // no less than the experts' segments have
  int32_t experts;
  int32_t out_features;  // multiples of 128
  int32_t in_features;
  int32_t blocks;      // to launch; one fits on an SM
  int32_t accumulate;  // `out` is fp32 and added to; otherwise it is bf16 and all of it is written
};

namespace {

constexpr int kRingStages = 3;
using Ring = RingPosition<kRingStages>;
using Barriers = RingBarriers<kRingStages>;
constexpr int kUnit = 64;  // channels of the gradient, by 128 of the rows
constexpr int kUnits = 2;  // of a warpgroup
constexpr int kSteps = kTokenBlock / kFp8MmaK;
constexpr int kPassAfter = kSteps / 2 - 1;  // the step with which the turn passes on
constexpr int kPairs = kFp8Columns / 8;     // of neighbouring channels of the rows that a thread has products of
constexpr int kUnitBytes = kUnit * kTokenBlock;
constexpr int kGradBytes = kTileOut * kTokenBlock;
constexpr int kStageBytes = kGradBytes + kTileIn * kTokenBlock;
constexpr int kSharedBytes = kSwizzleGroupBytes + kRingStages * kStageBytes + kMultipliers * kStagingBytes;
static_assert(kTileOut == kMultipliers * kUnit && kTileIn == kUnits * kFp8Columns);

// As of the product in bf16; not measured.
constexpr int kReducedTokens = 1536;

struct WeightGemm {
  CUtensorMap grad;
  CUtensorMap rows;
  CUtensorMap out;
  GroupedWgradFp8Args args;
};

// The scales of a stage's channels. Those of channels outside of the matrix are whatever was there before, and reach
// sums that are not stored.
struct alignas(16) StageScales {
  float grad[kTileOut];
  float rows[kTileIn];  // in the stage of a tile's last block alone
};

// Tiles over padded segments: rows and tokens are slots, multiples of 128.
__device__ __forceinline__ WeightTileSequence tiles_of(const GroupedWgradFp8Args& args, const int32_t* padded_ends) {
  return WeightTileSequence(padded_ends, args.experts, args.out_features, args.in_features);
}

__device__ __forceinline__ int tokens_of(const GroupedWgradFp8Args& args, int expert) {
  return args.ends[expert] - (expert == 0 ? 0 : args.ends[expert - 1]);
}

__device__ __forceinline__ void copy_operands(const WeightGemm& gemm, const int32_t* padded_ends, Barriers& barriers,
                                              StageScales* scales, uint32_t ring) {
  const GroupedWgradFp8Args& args = gemm.args;
  Ring position;
  for (WeightTileSequence tiles = tiles_of(args, padded_ends); !tiles.done(); tiles.advance()) {
    const WeightTile tile = tiles.tile();
    const uint32_t row_scale_bytes = min(kTileIn, args.in_features - tile.in) * sizeof(float);
    for (int token = 0; token < tile.tokens; token += kTokenBlock) {
      const int block = (tile.row + token) / kTokenBlock;
      const bool last = token + kTokenBlock == tile.tokens;
      position.wait_empty(barriers);
      uint64_t* full = &barriers.full[position.stage];
      const uint32_t stage = ring + position.stage * kStageBytes;
      StageScales& stage_scales = scales[position.stage];
      mbarrier_arrive_expect_tx(full, kStageBytes + sizeof(StageScales::grad) + (last ? row_scale_bytes : 0));
      cp_async_bulk_tensor_load(stage, &gemm.grad, 0, tile.out, block, full);
      cp_async_bulk_tensor_load(stage + kGradBytes, &gemm.rows, 0, tile.in, block, full);
      cp_async_bulk_load(stage_scales.grad,
                         args.grad_scales + static_cast<int64_t>(block) * args.out_features + tile.out,
                         sizeof(StageScales::grad), full);
      if (last) {
        cp_async_bulk_load(stage_scales.rows,
                           args.row_scales + static_cast<int64_t>(tile.expert) * args.in_features + tile.in,
                           row_scale_bytes, full);
      }
      position.advance();
    }
  }
}

// Adds a unit's products to their sums. `above` and `below` are the scales of the thread's two channels of the
// gradient.
__device__ __forceinline__ void promote(float* sums, const float (&products)[kFp8Columns / 2], float above,
                                        float below) {
#pragma unroll
  for (int i = 0; i < kFp8Columns / 2; i += 4) {
    sums[i] += products[i] * above;
    sums[i + 1] += products[i + 1] * above;
    sums[i + 2] += products[i + 2] * below;
    sums[i + 3] += products[i + 3] * below;
  }
}

// Scales complete sums by the scales of the rows' channels.
__device__ __forceinline__ void scale_sums(float (&sums)[kTileIn / 2], const StageScales& scales) {
  const float2* pairs = reinterpret_cast<const float2*>(scales.rows) + threadIdx.x % 4;  // every fourth is its own
#pragma unroll
  for (int pair = 0; pair < kUnits * kPairs; ++pair) {
    const float2 scale = pairs[pair * 4];
    sums[pair * 4] *= scale.x;
    sums[pair * 4 + 1] *= scale.y;
    sums[pair * 4 + 2] *= scale.x;
    sums[pair * 4 + 3] *= scale.y;
  }
}

// Adds a block's products to a warpgroup's sums: of 128 tokens, or, where zeros follow, of the first `steps` times 32.
template <bool whole>
__device__ __forceinline__ void multiply_block(float (&sums)[kTileIn / 2], uint32_t stage, const StageScales& scales,
                                               int steps, int warpgroup) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int grad_channel = warpgroup * kUnit + warp * 16 + lane / 4;  // and the one eight further on
  const uint64_t a = matrix_descriptor(stage + warpgroup * kUnitBytes, 0);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const uint64_t b = matrix_descriptor(stage + kGradBytes + unit * kFp8Columns * kTokenBlock, 0);
    float products[kFp8Columns / 2];
    take_turn(warpgroup);
    if constexpr (whole) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma_e4m3(products, a + step * (kFp8MmaK >> 4), b + step * (kFp8MmaK >> 4), step > 0);
        if (step == kPassAfter || step == kSteps - 1) wgmma_commit_group();
      }
      wgmma_wait_group<1>();
    } else {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        wgmma_fence();
        wgmma_e4m3(products, a + step * (kFp8MmaK >> 4), b + step * (kFp8MmaK >> 4), step > 0);
        wgmma_commit_group();
      }
    }
    pass_turn(warpgroup);
    const float above = scales.grad[grad_channel], below = scales.grad[grad_channel + 8];
    wgmma_wait_group<0>();
    touch(products);
    promote(&sums[unit * (kFp8Columns / 2)], products, above, below);
  }
}

template <Result result>
__device__ __forceinline__ void multiply(const WeightGemm& gemm, const int32_t* padded_ends, Barriers& barriers,
                                         TotalBarriers& totals, const StageScales* scales, uint32_t ring,
                                         uint32_t staging, int warpgroup) {
  const bool signals = threadIdx.x % 32 == 0;
  if (warpgroup == 1) pass_turn(warpgroup);  // the first turn is the other's
  Ring position;
  for (WeightTileSequence tiles = tiles_of(gemm.args, padded_ends); !tiles.done(); tiles.advance()) {
    const WeightTile tile = tiles.tile();
    if (result != Result::kWrite && tile.tokens == 0) continue;
    float sums[kTileIn / 2];
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    // Of the last block, steps with tokens alone.
    const int last_steps = (tokens_of(gemm.args, tile.expert) - 1) % kTokenBlock / kFp8MmaK + 1;
    const int whole_tokens = last_steps == kSteps ? tile.tokens : max(tile.tokens - kTokenBlock, 0);
    const auto multiply_stage = [&](auto whole, bool last) {
      position.wait_full(barriers);
      multiply_block<whole.value>(sums, ring + position.stage * kStageBytes, scales[position.stage], last_steps,
                                  warpgroup);
      if (last) scale_sums(sums, scales[position.stage]);
      __syncwarp();  // all lanes have read the scales
      if (signals) mbarrier_arrive(&barriers.empty[position.stage]);
      position.advance();
    };
#pragma unroll 1
    for (int token = 0; token < whole_tokens; token += kTokenBlock) {
      multiply_stage(std::true_type(), token + kTokenBlock == tile.tokens);
    }
    if (whole_tokens < tile.tokens) multiply_stage(std::false_type(), true);
    if constexpr (result == Result::kTotal) {
      add_result(staging, totals, sums);
    } else {
      store_result<result>(&gemm.out, tile, staging, sums, warpgroup);
    }
  }
  if (warpgroup == 0) take_turn(warpgroup);  // the one left by the other, so that no barrier ends half full
  // Shared memory must outlive the copies out of it.
  if (threadIdx.x % kWarpgroup == 0) cp_async_bulk_wait_group_read<0>();
}

template <Result result>
__global__ void __launch_bounds__(kGemmThreads, 1) weight_gemm_fp8_kernel(const __grid_constant__ WeightGemm gemm) {
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ int32_t padded_ends[kMaxGemmExperts];
  __shared__ Barriers barriers;
  __shared__ TotalBarriers totals[kMultipliers];
  __shared__ StageScales scales[kRingStages];
  if (threadIdx.x == 0) {
    barriers.init();
    for (TotalBarriers& each : totals) {
      if (result == Result::kTotal) each.init();
    }
  }
  pad_segments(padded_ends, gemm.args.ends, gemm.args.experts);  // and synchronises
  const uint32_t ring =
      (shared_address(dynamic_shared) + kSwizzleGroupBytes - 1) / kSwizzleGroupBytes * kSwizzleGroupBytes;
  const uint32_t staging = ring + kRingStages * kStageBytes;
  const int group = static_cast<int>(threadIdx.x / kWarpgroup) - 1;
  if (group < 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) copy_operands(gemm, padded_ends, barriers, scales, ring);
    const int moved = static_cast<int>(threadIdx.x / 32) - 1;  // each of the next warps works for a warpgroup
    if (result == Result::kTotal && threadIdx.x % 32 == 0 && moved >= 0 && moved < kMultipliers) {
      move_totals(&gemm.out, tiles_of(gemm.args, padded_ends), totals[moved], staging + moved * kStagingBytes, moved);
    }
  } else {
    setmaxnreg_inc<kMultiplierRegisters>();
    multiply<result>(gemm, padded_ends, barriers, totals[group], scales, ring, staging + group * kStagingBytes, group);
  }
}

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_grouped_gemm_wgrad_fp8(const ep_moe::GroupedWgradFp8Args* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "FP8 grouped GEMM for the weights' gradient";
  if (args->experts == 0 || args->out_features == 0 || args->in_features == 0) return nullptr;
  if (args->experts < 0 || args->experts > kMaxGemmExperts || args->out_features % kFp8Columns != 0 ||
      args->in_features % kFp8Columns != 0 || args->token_blocks <= 0 || args->blocks <= 0 ||
      static_cast<int64_t>(args->token_blocks) * kTokenBlock > INT32_MAX) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  WeightGemm gemm;
  gemm.args = *args;
  constexpr CUtensorMapDataType kBytes = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUtensorMapDataType out_type =
      args->accumulate ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!encode_rows(&gemm.grad, kBytes, args->grad, args->token_blocks, args->out_features, kTokenBlock, kTileOut) ||
      !encode_rows(&gemm.rows, kBytes, args->rows, args->token_blocks, args->in_features, kTokenBlock, kTileIn) ||
      !encode_rows(&gemm.out, out_type, args->out, args->experts, args->out_features, args->in_features,
                   kWarpgroupOut)) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  const bool few_tokens =
      static_cast<int64_t>(args->token_blocks) * kTokenBlock < static_cast<int64_t>(kReducedTokens) * args->experts;
  const auto kernel = !args->accumulate ? weight_gemm_fp8_kernel<Result::kWrite>
                      : few_tokens      ? weight_gemm_fp8_kernel<Result::kTotal>
                                        : weight_gemm_fp8_kernel<Result::kReduce>;
  return launch(kWhat, kernel, gemm, args->blocks, kGemmThreads, kSharedBytes, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_grouped_wgrad_fp8_args_bytes() { return sizeof(ep_moe::GroupedWgradFp8Args); }
