// Grouped products over tokens, forward and for the gradient of the rows: each expert's rows by its weight.
//
// Weights are the multiply's 256 rows, tokens its columns, whose number fits the expert to a multiple of 8. One thread
// copies blocks of weights and rows into the ring by tensor copies; two warpgroups multiply, half of the weight rows
// each. A token tile may read rows of the next expert or, up to a multiple of 8, beyond its segment: they fall into
// columns of their own, which are never stored. Weights beyond the matrix read as zeros, and their results are not
// stored either.
//
// What becomes of the sums is the product's own affair. A `Product` is a struct of parameters with
//   kWeightMajor     how the weights lie;
//   kWeightMatrices  of which a tile takes rows: 1, or 2 of which a warpgroup has the same rows in its two halves;
//   store            writes a warpgroup's results by way of a stage of the ring.
#pragma once

#include "gemm_result.cuh"
#include "gemm_ring.cuh"
#include "gemm_tiles.cuh"
#include "launch.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace ep_moe {

struct GroupedGemmArgs {
  const void* rows;      // [num_rows][reduction]
  const void* weight;    // [experts][columns][reduction] forward, [experts][reduction][columns] for the gradient
  void* out;             // [num_rows][columns]; written within segments
  const int32_t* ends;   // [experts], where each one's segment ends; the next one's starts there. With `room`: counts
  const int32_t* start;  // where the first segment starts, or nullptr for row 0
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
constexpr int kWeightBytes = kWeightTile * kBlockK * 2;
constexpr int kWeightBlockBytes = 64 * kBlockK * 2;  // a box of transposed weights; also 64 weight rows of others
constexpr int kTokenStageBytes = kWeightBytes + kMaxWidth * kBlockK * 2;
constexpr int kTokenSharedBytes = kSwizzleGroupBytes + kRingStages * kTokenStageBytes;
// A product may keep a value for each row behind the results it stages.
static_assert(kTokenStageBytes % kSwizzleGroupBytes == 0 && kTokenStageBytes >= staged_bytes(kMaxWidth) + 1024);

template <typename Product>
struct TokenGemm {
  CUtensorMap weight;
  CUtensorMap rows[kWidthClasses];  // the same rows in boxes of every width
  GroupedGemmArgs args;
  Product product;
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
template <typename Product>
struct TokenBlock {
  static constexpr int kTileColumns = kWeightTile / Product::kWeightMatrices;  // of the result
  const TokenGemm<Product>* gemm;
  const TileTable* table;
  Barriers* barriers;
  uint32_t ring;  // shared-memory address of the first stage
  int blocks_k;
  int tile;      // the next one of this block
  int slot = 0;  // TileTable::find
  Ring position;

  __device__ __forceinline__ uint32_t stage() const { return ring + position.stage * kTokenStageBytes; }
};

template <typename Product>
__device__ __forceinline__ void copy_operands(TokenBlock<Product>& block) {
  const TokenGemm<Product>& gemm = *block.gemm;
  for (; block.tile < block.table->tiles(); block.tile += gridDim.x) {
    const TokenTile tile = block.table->find(block.tile, block.slot);
    const CUtensorMap* rows = &gemm.rows[tile.width_class];
    const uint32_t bytes = kWeightBytes + width_of_class(tile.width_class) * kBlockK * 2;
    const int first_weight = tile.weight_tile * TokenBlock<Product>::kTileColumns;
    for (int k = 0; k < block.blocks_k; ++k) {
      block.position.wait_empty(*block.barriers);
      uint64_t* full = &block.barriers->full[block.position.stage];
      const uint32_t stage = block.stage();
      mbarrier_arrive_expect_tx(full, bytes);
      if constexpr (Product::kWeightMajor == Major::kReduction) {
        cp_async_bulk_tensor_load(stage, &gemm.weight, k * kBlockK, first_weight,
                                  tile.expert * Product::kWeightMatrices, full);
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

template <int width, typename Product>
__device__ __forceinline__ void multiply_tile(TokenBlock<Product>& block, const TokenTile& tile, int warpgroup) {
  // Blocks of 64 weight rows between a warpgroup's two, and between those of the two warpgroups.
  constexpr int kHalves = Product::kWeightMatrices == 1 ? 1 : 2, kWarpgroups = Product::kWeightMatrices == 1 ? 2 : 1;
  float sums[2][width / 2];
  const bool signals = threadIdx.x % 32 == 0;
  int previous = 0;
#pragma unroll 1
  for (int k = 0; k < block.blocks_k; ++k) {
    block.position.wait_full(*block.barriers);
    const uint32_t stage = block.stage();
    // 64 weight rows are 8 KiB, and so is a box of transposed ones
    const uint64_t a = matrix_descriptor(stage + warpgroup * kWarpgroups * kWeightBlockBytes, kWeightBlockBytes);
    const uint64_t b = matrix_descriptor(stage + kWeightBytes, kWeightBlockBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockK / kMmaK; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wgmma<width, Product::kWeightMajor, Major::kReduction>(
            sums[half], a + half * kHalves * (kWeightBlockBytes >> 4) + step * descriptor_step(Product::kWeightMajor),
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
  block.gemm->product.template store<width>(block.gemm->args, tile, sums, block.ring + stage * kTokenStageBytes,
                                            warpgroup);
  release_result_stage(*block.barriers, stage);
}

// The tiles of a width class, then those of the narrower ones.
template <int width_class, typename Product>
__device__ __forceinline__ void multiply_from(TokenBlock<Product>& block, int warpgroup) {
  for (; block.tile < block.table->class_end[width_class]; block.tile += gridDim.x) {
    const TokenTile tile = block.table->find(block.tile, block.slot);
    multiply_tile<width_of_class(width_class)>(block, tile, warpgroup);
  }
  if constexpr (width_class + 1 < kWidthClasses) multiply_from<width_class + 1>(block, warpgroup);
}

template <typename Product>
__global__ void __launch_bounds__(kGemmThreads, 1) token_gemm_kernel(const __grid_constant__ TokenGemm<Product> gemm) {
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ TileTable table;
  __shared__ Barriers barriers;
  constexpr int kTileColumns = TokenBlock<Product>::kTileColumns;
  const GroupedGemmArgs& args = gemm.args;
  if (threadIdx.x == 0) barriers.init();
  table.build(args.start, args.ends, args.experts, args.room, (args.columns + kTileColumns - 1) / kTileColumns);

  TokenBlock<Product> block;
  block.gemm = &gemm;
  block.table = &table;
  block.barriers = &barriers;
  block.ring = (shared_address(dynamic_shared) + kSwizzleGroupBytes - 1) / kSwizzleGroupBytes * kSwizzleGroupBytes;
  block.blocks_k = args.reduction / kBlockK;
  block.tile = blockIdx.x;
  const int group = static_cast<int>(threadIdx.x / kWarpgroup) - 1;
  if (group < 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) copy_operands(block);
  } else {
    setmaxnreg_inc<kMultiplierRegisters>();
    multiply_from<0>(block, group);
  }
}

template <typename Product>
const char* launch_token_gemm(const char* what, const GroupedGemmArgs& args, const Product& product,
                              cudaStream_t stream) {
  if (args.num_rows == 0 || args.experts == 0 || args.columns == 0) return nullptr;
  if (args.experts < 0 || args.experts > kMaxGemmExperts || args.reduction <= 0 || args.reduction % 64 != 0 ||
      args.columns % 64 != 0 || args.blocks <= 0 || args.room < 0 ||
      (args.room > 0 && args.num_rows != static_cast<int64_t>(args.experts) * args.room)) {
    return error_text(cudaErrorInvalidValue, what);
  }
  constexpr CUtensorMapDataType kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr int kMatrices = Product::kWeightMatrices;
  TokenGemm<Product> gemm;
  gemm.args = args;
  gemm.product = product;
  bool encoded =
      Product::kWeightMajor == Major::kOuter
          ? encode_rows(&gemm.weight, kBf16, args.weight, args.experts, args.reduction, args.columns, kBlockK)
          : encode_rows(&gemm.weight, kBf16, args.weight, args.experts * kMatrices, args.columns, args.reduction,
                        TokenBlock<Product>::kTileColumns, kMatrices);
  for (int i = 0; i < kWidthClasses; ++i) {
    encoded =
        encoded && encode_rows(&gemm.rows[i], kBf16, args.rows, 1, args.num_rows, args.reduction, width_of_class(i));
  }
  if (!encoded) return error_text(cudaErrorInvalidValue, what);
  return launch(what, token_gemm_kernel<Product>, gemm, args.blocks, kGemmThreads, kTokenSharedBytes,
                LaunchMode::kPlain, stream);
}

// A product whose sums are the result, rounded.
template <Major weight_major>
struct PlainProduct {
  static constexpr Major kWeightMajor = weight_major;
  static constexpr int kWeightMatrices = 1;

  template <int width>
  __device__ __forceinline__ void store(const GroupedGemmArgs& args, const TokenTile& tile,
                                        const float (&sums)[2][width / 2], uint32_t staging, int warpgroup) const {
    stage_columns<width>(staging, sums);
    bar_sync(1 + warpgroup, kWarpgroup);
    const int column = tile.weight_tile * kWeightTile + warpgroup * kWeightTile / kMultipliers;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out) + static_cast<int64_t>(tile.row) * args.columns + column;
    store_staged(staging, out, args.columns, tile.tokens, (args.columns - column) / 8);
  }
};

}  // namespace
}  // namespace ep_moe
