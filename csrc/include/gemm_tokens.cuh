// Grouped product over tokens, forward and for the gradient of the rows: each expert's rows by its weight.
//
// Weights are the multiply's 256 rows, tokens its columns, whose number fits the expert to a multiple of 8. One thread
// copies blocks of weights and rows into the ring by tensor copies; two warpgroups multiply, half of the weight rows
// each. A token tile may read rows of the next expert or, up to a multiple of 8, beyond its segment: they fall into
// columns of their own, which are never stored. Weights beyond the matrix read as zeros, and their results are not
// stored either.
#pragma once

#include "gemm_result.cuh"
#include "gemm_ring.cuh"
#include "gemm_tiles.cuh"
#include "launch.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace ep_moe {

struct GroupedGemmArgs {
  const void* rows;     // [num_rows][reduction]
  const void* weight;   // [experts][columns][reduction] forward, [experts][reduction][columns] for the gradient
  void* out;            // [num_rows][columns]; not written from the last segment's end on
  const int32_t* ends;  // [experts], where each one's segment ends; the next one's starts there. With `room`: counts
  int64_t num_rows;
  int32_t experts;
  int32_t reduction;  // a multiple of 64, as is `columns`
  int32_t columns;
  int32_t blocks;  // to launch; one fits on an SM
  int32_t room;    // if not 0: expert e's rows, and those of its result, start at e * room, for a count of at most room
  int32_t reserved;
};

namespace {

constexpr int kRingStages = 4;
constexpr int kBlockK = 64;  // elements of the reduction in a stage
using Ring = RingPosition<kRingStages>;
using Barriers = RingBarriers<kRingStages>;
constexpr int kWeightTile = 256;
constexpr int kWeightRows = kWeightTile / kMultipliers;  // of a warpgroup
constexpr int kWeightBytes = kWeightTile * kBlockK * 2;
constexpr int kWeightBlockBytes = 64 * kBlockK * 2;  // a box of transposed weights; also 64 weight rows of others
constexpr int kTokenStageBytes = kWeightBytes + kMaxWidth * kBlockK * 2;
constexpr int kTokenSharedBytes = kSwizzleGroupBytes + kRingStages * kTokenStageBytes;
static_assert(kTokenStageBytes % kSwizzleGroupBytes == 0 && kTokenStageBytes >= kMaxWidth * kStagedRowBytes);

struct TokenGemm {
  CUtensorMap weight;
  CUtensorMap rows[kWidthClasses];  // the same rows in boxes of every width
  GroupedGemmArgs args;
};

// The producer's side of the end of a tile.
__device__ __forceinline__ void hand_over_result_stages(Barriers& barriers, Ring& position) {
  for (int i = 0; i < kMultipliers; ++i) {
    position.wait_empty(barriers);
    mbarrier_arrive(&barriers.full[position.stage]);
    position.advance();
  }
}

// The multiplying side: waits for the result stages and returns the one of this warpgroup. The others' are emptied at
// once, for each takes part in every stage.
__device__ __forceinline__ int take_result_stage(Barriers& barriers, Ring& position, int warpgroup) {
  int mine = 0;
  for (int i = 0; i < kMultipliers; ++i) {
    position.wait_full(barriers);
    if (i == warpgroup) {
      mine = position.stage;
    } else if (threadIdx.x % 32 == 0) {
      mbarrier_arrive(&barriers.empty[position.stage]);
    }
    position.advance();
  }
  return mine;
}

// Empties a stage that ordinary instructions have read and written.
__device__ __forceinline__ void release_result_stage(Barriers& barriers, int stage) {
  fence_proxy_async_shared();  // the next copy into it comes behind
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.empty[stage]);
}

// What all parts of the kernel share.
struct TokenBlock {
  const TokenGemm* gemm;
  const TileTable* table;
  Barriers* barriers;
  uint32_t ring;  // shared-memory address of the first stage
  int blocks_k;
  int tile;      // the next one of this block
  int slot = 0;  // TileTable::find
  Ring position;

  __device__ __forceinline__ uint32_t stage() const { return ring + position.stage * kTokenStageBytes; }
};

template <Major weight_major>
__device__ __forceinline__ void copy_operands(TokenBlock& block) {
  const TokenGemm& gemm = *block.gemm;
  for (; block.tile < block.table->tiles(); block.tile += gridDim.x) {
    const TokenTile tile = block.table->find(block.tile, block.slot);
    const CUtensorMap* rows = &gemm.rows[tile.width_class];
    const uint32_t bytes = kWeightBytes + width_of_class(tile.width_class) * kBlockK * 2;
    const int first_weight = tile.weight_tile * kWeightTile;
    for (int k = 0; k < block.blocks_k; ++k) {
      block.position.wait_empty(*block.barriers);
      uint64_t* full = &block.barriers->full[block.position.stage];
      const uint32_t stage = block.stage();
      mbarrier_arrive_expect_tx(full, bytes);
      if constexpr (weight_major == Major::kReduction) {
        cp_async_bulk_tensor_load(stage, &gemm.weight, k * kBlockK, first_weight, tile.expert, full);
      } else {
#pragma unroll
        for (int i = 0; i < kWeightTile / 64; ++i) {
          cp_async_bulk_tensor_load(stage + i * kWeightBlockBytes, &gemm.weight, first_weight + i * 64, k * kBlockK,
                                    tile.expert, full);
        }
      }
      cp_async_bulk_tensor_load(stage + kWeightBytes, rows, k * kBlockK, tile.row, 0, full);
      block.position.advance();
    }
    hand_over_result_stages(*block.barriers, block.position);
  }
}

template <int width, Major weight_major>
__device__ __forceinline__ void multiply_tile(TokenBlock& block, const TokenTile& tile, int warpgroup) {
  float sums[2][width / 2];
  const bool signals = threadIdx.x % 32 == 0;
  int previous = 0;
#pragma unroll 1
  for (int k = 0; k < block.blocks_k; ++k) {
    block.position.wait_full(*block.barriers);
    const uint32_t stage = block.stage();
    // 64 weight rows are 8 KiB, and so is a box of transposed ones
    const uint64_t a = matrix_descriptor(stage + warpgroup * 2 * kWeightBlockBytes, kWeightBlockBytes);
    const uint64_t b = matrix_descriptor(stage + kWeightBytes, kWeightBlockBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockK / kMmaK; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wgmma<width, weight_major, Major::kReduction>(
            sums[half], a + half * (kWeightBlockBytes >> 4) + step * descriptor_step(weight_major),
            b + step * descriptor_step(Major::kReduction), k > 0 || step > 0);
      }
    }
    wgmma_commit_group();
    wgmma_wait_group<1>();  // the block before this one has been multiplied
    if (k > 0 && signals) mbarrier_arrive(&block.barriers->empty[previous]);
    previous = block.position.stage;
    block.position.advance();
  }
  wgmma_wait_group<0>();
  touch(sums[0]);
  touch(sums[1]);
  if (signals) mbarrier_arrive(&block.barriers->empty[previous]);

  const int stage = take_result_stage(*block.barriers, block.position, warpgroup);
  const uint32_t staging = block.ring + stage * kTokenStageBytes;
  stage_columns<width>(staging, sums);
  bar_sync(1 + warpgroup, kWarpgroup);
  const GroupedGemmArgs& args = block.gemm->args;
  const int column = tile.weight_tile * kWeightTile + warpgroup * kWeightRows;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out) + static_cast<int64_t>(tile.row) * args.columns + column;
  store_staged(staging, out, args.columns, tile.tokens, (args.columns - column) / 8);
  release_result_stage(*block.barriers, stage);
}

// The tiles of a width class, then those of the narrower ones.
template <int width_class, Major weight_major>
__device__ __forceinline__ void multiply_from(TokenBlock& block, int warpgroup) {
  for (; block.tile < block.table->class_end[width_class]; block.tile += gridDim.x) {
    const TokenTile tile = block.table->find(block.tile, block.slot);
    multiply_tile<width_of_class(width_class), weight_major>(block, tile, warpgroup);
  }
  if constexpr (width_class + 1 < kWidthClasses) multiply_from<width_class + 1, weight_major>(block, warpgroup);
}

template <Major weight_major>
__global__ void __launch_bounds__(kGemmThreads, 1) token_gemm_kernel(const __grid_constant__ TokenGemm gemm) {
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ TileTable table;
  __shared__ Barriers barriers;
  const GroupedGemmArgs& args = gemm.args;
  if (threadIdx.x == 0) barriers.init();
  table.build(args.ends, args.experts, args.room, (args.columns + kWeightTile - 1) / kWeightTile);

  TokenBlock block;
  block.gemm = &gemm;
  block.table = &table;
  block.barriers = &barriers;
  block.ring = (shared_address(dynamic_shared) + kSwizzleGroupBytes - 1) / kSwizzleGroupBytes * kSwizzleGroupBytes;
  block.blocks_k = args.reduction / kBlockK;
  block.tile = blockIdx.x;
  const int group = static_cast<int>(threadIdx.x / kWarpgroup) - 1;
  if (group < 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) copy_operands<weight_major>(block);
  } else {
    setmaxnreg_inc<kMultiplierRegisters>();
    multiply_from<0, weight_major>(block, group);
  }
}

template <Major weight_major>
const char* launch_token_gemm(const char* what, const GroupedGemmArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.experts == 0 || args.columns == 0) return nullptr;
  if (args.experts < 0 || args.experts > kMaxGemmExperts || args.reduction <= 0 || args.reduction % 64 != 0 ||
      args.columns % 64 != 0 || args.blocks <= 0 || args.room < 0 ||
      (args.room > 0 && args.num_rows != static_cast<int64_t>(args.experts) * args.room)) {
    return error_text(cudaErrorInvalidValue, what);
  }
  const bool transposed = weight_major == Major::kOuter;
  const int64_t rows = transposed ? args.reduction : args.columns, columns = transposed ? args.columns : args.reduction;
  TokenGemm gemm;
  gemm.args = args;
  bool encoded = encode_rows(&gemm.weight, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.weight, args.experts, rows, columns,
                             transposed ? kBlockK : kWeightTile);
  for (int i = 0; i < kWidthClasses; ++i) {
    encoded = encoded && encode_rows(&gemm.rows[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, args.rows, 1, args.num_rows,
                                     args.reduction, width_of_class(i));
  }
  if (!encoded) return error_text(cudaErrorInvalidValue, what);
  return launch(what, token_gemm_kernel<weight_major>, gemm, args.blocks, kGemmThreads, kTokenSharedBytes,
                LaunchMode::kPlain, stream);
}

}  // namespace
}  // namespace ep_moe
