// Grouped product over tokens in FP8: each expert's rows by its weight, both e4m3 with block scales, the result bf16.
//
// Rows have a scale for each 128 elements, weights one for each 128 x 128, as in the DeepSeek-V3 report (arXiv
// 2412.19437, section 3.3): the products of 128 elements of the reduction are summed by the multiply, then scaled and
// added to fp32 registers ("promoted"). A tile is up to 256 tokens by 128 weight rows, so that it has one weight scale
// a step; tokens are the multiply's rows, so that a thread has two token scales a multiply, and are cut into units of
// 64, which go to the two warpgroups in turn. One thread copies.
//
// While one warpgroup promotes, the other multiplies (gemm_turns.cuh). Both count the same turns: a warpgroup that has
// fewer units of a tile than the other passes its turn on.
//
// Every instruction that writes a register takes time from the multiply, whose sums go through the register file too:
// a unit's four multiplies write 256 registers of a thread in 256 cycles, promotion 64. So the loop has little besides:
// what all lanes of a warp have in common is kept in uniform registers.
//
// A tile may read rows of the next expert or beyond the last segment: they fall into result rows of their own, which
// are never stored.
#include <cuda_bf16.h>

#include "gemm_result.cuh"
#include "gemm_ring.cuh"
#include "gemm_turns.cuh"
#include "gemm_units.cuh"
#include "launch.cuh"
#include "tma.cuh"
#include "wgmma_fp8.cuh"

namespace ep_moe {

struct GroupedFp8Args {
  const void* rows;            // e4m3 [num_rows][reduction]
  const float* row_scales;     // [reduction / 128][scale_stride], by row
  const void* weight;          // e4m3 [experts][columns][reduction]
  const float* weight_scales;  // [experts][columns / 128][reduction / 128]
  void* out;                   // bf16 [num_rows][columns]; not written from the last segment's end on
  const int32_t* ends;         // [experts], where each one's segment ends; the next one's starts there. With `room`:
                               // counts
  int64_t num_rows;
  int64_t scale_stride;  // at least num_rows, a multiple of 4
  int32_t experts;
  int32_t reduction;  // a multiple of 128, as is `columns`
  int32_t columns;
  int32_t blocks;  // to launch; one fits on an SM
  int32_t room;    // if not 0: expert e's rows, and those of its result, start at e * room, for a count of at most room
  int32_t reserved;
};

namespace {

constexpr int kRingStages = 4;
using Ring = RingPosition<kRingStages>;
using Barriers = RingBarriers<kRingStages>;
constexpr int kBlockK = 128;                 // elements of the reduction in a stage, which share scales
constexpr int kSteps = kBlockK / kFp8MmaK;   // multiplies of a unit and stage
constexpr int kUnitBytes = kUnit * kBlockK;  // in a stage
constexpr int kRowBytes = kMaxTileUnits * kUnitBytes;
constexpr int kWeightBytes = kFp8Columns * kBlockK;
constexpr int kStageBytes = kRowBytes + kWeightBytes;
constexpr int kWarpRows = 16;       // of a unit, whose sums a warp has
constexpr int kHalfRowBytes = 128;  // of a result
constexpr int kWarpStagingBytes = kWarpRows * kHalfRowBytes;
constexpr int kStagingBytes = kWarpgroup / 32 * kWarpStagingBytes;  // of a warpgroup
constexpr int kSharedBytes = kSwizzleGroupBytes + kRingStages * kStageBytes + kMultipliers * kStagingBytes;
static_assert(kStageBytes % kSwizzleGroupBytes == 0);
constexpr int kScalesOfVector = 4;  // row scales are copied from a multiple of 16 bytes on
constexpr int kStageScales = kMaxTileUnits * kUnit + kScalesOfVector;

struct Fp8Gemm {
  CUtensorMap rows;
  CUtensorMap weight;
  GroupedFp8Args args;
};

// What all parts of the kernel share.
struct Fp8Block {
  const Fp8Gemm* gemm;
  const UnitTable* table;
  Barriers* barriers;
  float (*row_scales)[kStageScales];  // of each stage, from that of the tile's row 0 rounded down to a vector on
  uint32_t ring;                      // shared-memory address of the first stage; the results' staging is behind them
  int blocks_k;
  int expert = 0;  // UnitTable::find
  Ring position;

  __device__ __forceinline__ uint32_t stage() const { return ring + position.stage * kStageBytes; }
};

__device__ __forceinline__ void copy_operands(Fp8Block& block) {
  const Fp8Gemm& gemm = *block.gemm;
  for (int index = blockIdx.x; index < block.table->tiles(); index += gridDim.x) {
    const UnitTile tile = block.table->find(index, block.expert);
    const int units = tile.units();
    const int first_scale = tile.row / kScalesOfVector * kScalesOfVector;
    const int end_scale = (tile.row + tile.tokens + kScalesOfVector - 1) / kScalesOfVector * kScalesOfVector;
    const uint32_t scale_bytes = (end_scale - first_scale) * sizeof(float);
    const uint32_t bytes = units * kUnitBytes + kWeightBytes + scale_bytes;
    for (int k = 0; k < block.blocks_k; ++k) {
      block.position.wait_empty(*block.barriers);
      uint64_t* full = &block.barriers->full[block.position.stage];
      const uint32_t stage = block.stage();
      mbarrier_arrive_expect_tx(full, bytes);
      cp_async_bulk_tensor_load(stage + kRowBytes, &gemm.weight, k * kBlockK, tile.weight_tile * kFp8Columns,
                                tile.expert, full);
      for (int unit = 0; unit < units; ++unit) {
        cp_async_bulk_tensor_load(stage + unit * kUnitBytes, &gemm.rows, k * kBlockK, tile.row + unit * kUnit, 0, full);
      }
      cp_async_bulk_load(block.row_scales[block.position.stage],
                         gemm.args.row_scales + k * gemm.args.scale_stride + first_scale, scale_bytes, full);
      block.position.advance();
    }
  }
}

// Writes a unit's sums as bf16, half of a row at a time, by way of `staging`, of which each warp has its own part: what
// a thread stores is 16 bytes of a whole line. `rows` of the unit are real. Chunk c of a staged row lies at c ^ (row %
// 8), so that a matrix of 8 rows meets every bank once; its address is that of another chunk but for an exclusive or.
__device__ __forceinline__ void store_unit(const float (&sums)[kFp8Columns / 2], uint32_t staging, __nv_bfloat16* out,
                                           int64_t stride, int rows) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 % 4 * kWarpRows;
  const uint32_t mine = staging + first_row * kHalfRowBytes;
  // The lane's row of a matrix: upper and lower 8 rows, then those of the 8 columns further on.
  const int matrix = lane / 8, matrix_row = matrix % 2 * 8 + lane % 8;
  const uint32_t written = mine + matrix_row * kHalfRowBytes + (matrix / 2 ^ matrix_row % 8) * 16;
  const int row = lane / 8, chunk = lane % 8;  // of what the lane stores first; then every fourth row
  const uint32_t read = mine + row * kHalfRowBytes + (chunk ^ row) * 16;
  const int left = rows - first_row - row;
  __nv_bfloat16* const first = out + (first_row + row) * stride + chunk * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int columns = 0; columns < 8; columns += 2) {
      const float* d = &sums[(half * 8 + columns) * 4];
      stmatrix<false>(written ^ (columns * 16), pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]),
                      pack_bf16(d[6], d[7]));
    }
    __syncwarp();
    __nv_bfloat16* target = first + half * (kHalfRowBytes / 2);
#pragma unroll
    for (int below = 0; below < kWarpRows; below += 4, target += 4 * stride) {
      const uint4 value = ld_shared((read ^ (below % 8 * 16)) + below * kHalfRowBytes);
      if (below < left) *reinterpret_cast<uint4*>(target) = value;
    }
  }
}

template <int units>
__device__ __forceinline__ void multiply_tile(Fp8Block& block, const UnitTile& tile, int warpgroup) {
  const GroupedFp8Args& args = block.gemm->args;
  const bool signals = threadIdx.x % 32 == 0;
  const int lane_row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;  // of a unit, and the one 8 further down
  const int first_scale = tile.row % kScalesOfVector + warpgroup * kUnit + lane_row;
  const float* weight_scales =
      args.weight_scales +
      (static_cast<int64_t>(tile.expert) * (args.columns / kFp8Columns) + tile.weight_tile) * block.blocks_k;
  float sums[units > 0 ? units : 1][kFp8Columns / 2];
#pragma unroll
  for (int unit = 0; unit < units; ++unit) {
#pragma unroll
    for (int i = 0; i < kFp8Columns / 2; ++i) sums[unit][i] = 0.0f;
  }
  const bool other_has_more = units * kMultipliers < tile.units();
  float next_scale = __ldg(weight_scales);  // a step ahead
#pragma unroll 1
  for (int left = block.blocks_k; left > 0; --left) {
    const float weight_scale = next_scale;
    weight_scales += left > 1;
    next_scale = __ldg(weight_scales);
    block.position.wait_full(*block.barriers);
    const uint32_t place = uniform(block.position.stage);
    const uint32_t stage = block.ring + place * kStageBytes;
    const float* row_scales = block.row_scales[place] + first_scale;
    const uint64_t b = matrix_descriptor(stage + kRowBytes, 0);
    const uint64_t first_a = matrix_descriptor(stage + warpgroup * kUnitBytes, 0);
#pragma unroll
    for (int unit = 0; unit < units; ++unit) {
      const uint64_t a = first_a + unit * (kMultipliers * kUnitBytes >> 4);
      float products[kFp8Columns / 2];
      take_turn(warpgroup);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma_e4m3(products, a + step * (kFp8MmaK >> 4), b + step * (kFp8MmaK >> 4), step > 0);
        if (step == 0 || step == kSteps - 1) wgmma_commit_group();
      }
      const float above = row_scales[unit * kMultipliers * kUnit] * weight_scale;
      const float below = row_scales[unit * kMultipliers * kUnit + 8] * weight_scale;
      wgmma_wait_group<1>();
      pass_turn(warpgroup);
      wgmma_wait_group<0>();
      touch(products);
      if (unit == units - 1) {
        __syncwarp();
        if (signals) mbarrier_arrive(&block.barriers->empty[place]);
      }
#pragma unroll
      for (int i = 0; i < kFp8Columns / 2; i += 4) {
        sums[unit][i] += products[i] * above;
        sums[unit][i + 1] += products[i + 1] * above;
        sums[unit][i + 2] += products[i + 2] * below;
        sums[unit][i + 3] += products[i + 3] * below;
      }
    }
    if (other_has_more) {
      take_turn(warpgroup);
      pass_turn(warpgroup);
    }
    if (units == 0 && signals) mbarrier_arrive(&block.barriers->empty[place]);
    block.position.advance();
  }
#pragma unroll
  for (int unit = 0; unit < units; ++unit) {
    const int first = (warpgroup + unit * kMultipliers) * kUnit;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out) + static_cast<int64_t>(tile.row + first) * args.columns +
                         tile.weight_tile * kFp8Columns;
    store_unit(sums[unit], block.ring + kRingStages * kStageBytes + warpgroup * kStagingBytes, out, args.columns,
               tile.tokens - first);
  }
}

__device__ __forceinline__ void multiply(Fp8Block& block, int warpgroup) {
  if (warpgroup == 1) pass_turn(warpgroup);  // the first turn is the other's
  for (int index = blockIdx.x; index < block.table->tiles(); index += gridDim.x) {
    const UnitTile tile = block.table->find(index, block.expert);
    const int units = (tile.units() - warpgroup + kMultipliers - 1) / kMultipliers;
    if (units == 2) {
      multiply_tile<2>(block, tile, warpgroup);
    } else if (units == 1) {
      multiply_tile<1>(block, tile, warpgroup);
    } else {
      multiply_tile<0>(block, tile, warpgroup);
    }
  }
  if (warpgroup == 0) take_turn(warpgroup);  // the one left by the other, so that no barrier ends half full
}

__global__ void __launch_bounds__(kGemmThreads, 1) fp8_gemm_kernel(const __grid_constant__ Fp8Gemm gemm) {
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ UnitTable table;
  __shared__ Barriers barriers;
  __shared__ alignas(16) float row_scales[kRingStages][kStageScales];
  const GroupedFp8Args& args = gemm.args;
  if (threadIdx.x == 0) barriers.init();
  table.build(args.ends, args.experts, args.room, args.columns / kFp8Columns);

  Fp8Block block;
  block.gemm = &gemm;
  block.table = &table;
  block.barriers = &barriers;
  block.row_scales = row_scales;
  block.ring = (shared_address(dynamic_shared) + kSwizzleGroupBytes - 1) / kSwizzleGroupBytes * kSwizzleGroupBytes;
  block.blocks_k = args.reduction / kBlockK;
  const int group = uniform(static_cast<int>(threadIdx.x / kWarpgroup)) - 1;
  if (group < 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) copy_operands(block);
  } else {
    setmaxnreg_inc<kMultiplierRegisters>();
    multiply(block, group);
  }
}

}  // namespace
}  // namespace ep_moe

EP_MOE_API const char* ep_moe_grouped_gemm_fp8(const ep_moe::GroupedFp8Args* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "FP8 grouped GEMM";
  if (args->num_rows == 0 || args->experts == 0 || args->columns == 0) return nullptr;
  if (args->experts < 0 || args->experts > kMaxGemmExperts || args->reduction <= 0 || args->reduction % kBlockK != 0 ||
      args->columns % kFp8Columns != 0 || args->scale_stride < args->num_rows ||
      args->scale_stride % kScalesOfVector != 0 || args->blocks <= 0) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  Fp8Gemm gemm;
  gemm.args = *args;
  constexpr CUtensorMapDataType kBytes = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (!encode_rows(&gemm.rows, kBytes, args->rows, 1, args->num_rows, args->reduction, kUnit) ||
      !encode_rows(&gemm.weight, kBytes, args->weight, args->experts, args->columns, args->reduction, kFp8Columns)) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  return launch(kWhat, fp8_gemm_kernel, gemm, args->blocks, kGemmThreads, kSharedBytes, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_grouped_fp8_args_bytes() { return sizeof(ep_moe::GroupedFp8Args); }
