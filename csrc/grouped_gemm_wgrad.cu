// Gradient of the experts' weights: for each expert its gradient rows, transposed, by its rows.
//
// The reduction runs over the expert's tokens, along which neither operand is contiguous: both are copied as they lie
// and transposed by the multiply. The last block of a segment also holds rows of the next expert, or such that nobody
// wrote: before they are multiplied, the warpgroups overwrite them with zeros in both operands, since zero times NaN
// would not be zero. Instructions that would see such rows alone are left out. An expert without tokens gets zeros.
//
// One thread copies and two warpgroups multiply, half of a tile's gradient columns each, over the ring of
// gemm_ring.cuh. All tiles have one size; an expert's go in bands of a few gradient columns, so that the tiles at work
// together share both of their operands in the L2 cache.
//
// Sums in fp32 are added to memory by tensor copies as well. Each element is added to once, so the bits do not depend
// on the order.
#include "gemm_result.cuh"
#include "gemm_ring.cuh"
#include "gemm_tiles.cuh"
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
constexpr int kTileOut = 256, kTileIn = 128;
constexpr int kWarpgroupOut = kTileOut / kMultipliers;
constexpr int kBand = 8;                     // tiles of gradient columns that go together
constexpr int kBoxBytes = 64 * kBlockK * 2;  // 64 columns of a block
constexpr int kGradBytes = kTileOut / 64 * kBoxBytes;
constexpr int kStageBytes = kGradBytes + kTileIn / 64 * kBoxBytes;
constexpr int kStagingBytes = 32768;  // of a warpgroup
constexpr int kSharedBytes = kSwizzleGroupBytes + kRingStages * kStageBytes + kMultipliers * kStagingBytes;
static_assert(kStagingBytes == 2 * kGradientBoxBytes && kStagingBytes == 4 * kGradientFp32BoxBytes);

struct WeightGemm {
  CUtensorMap grad;
  CUtensorMap rows;
  CUtensorMap out;
  GroupedWgradArgs args;
};

struct WeightTile {
  int expert;
  int out;  // first column of grad
  int in;   // first column of rows
  int row;
  int tokens;
};

// A block's tiles in turn: every gridDim.x-th.
struct TileSequence {
  const int32_t* ends;
  int experts, out_tiles, in_tiles;
  int expert = 0, index;  // of the expert's tiles

  __device__ __forceinline__ TileSequence(const GroupedWgradArgs& args, const int32_t* segment_ends)
      : ends(segment_ends),
        experts(args.experts),
        out_tiles((args.out_features + kTileOut - 1) / kTileOut),
        in_tiles((args.in_features + kTileIn - 1) / kTileIn),
        index(static_cast<int>(blockIdx.x)) {
    wrap();
  }

  __device__ __forceinline__ bool done() const { return expert >= experts; }

  __device__ __forceinline__ void advance() {
    index += static_cast<int>(gridDim.x);
    wrap();
  }

  __device__ __forceinline__ WeightTile tile() const {
    // A division takes a hundred cycles, during which nothing is multiplied: hence the loop and the constant.
    int first = 0, in_band = index;
    for (; in_band >= kBand * in_tiles; in_band -= kBand * in_tiles) first += kBand;
    const int height = min(kBand, out_tiles - first);
    const int column = height == kBand ? in_band / kBand : in_band / height;
    WeightTile found;
    found.expert = expert;
    found.out = (first + in_band - column * height) * kTileOut;
    found.in = column * kTileIn;
    found.row = expert == 0 ? 0 : ends[expert - 1];
    found.tokens = ends[expert] - found.row;
    return found;
  }

 private:
  __device__ __forceinline__ void wrap() {
    for (; expert < experts && index >= out_tiles * in_tiles; ++expert) index -= out_tiles * in_tiles;
  }
};

__device__ __forceinline__ void copy_operands(const WeightGemm& gemm, const int32_t* ends, Barriers& barriers,
                                              uint32_t ring) {
  Ring position;
  for (TileSequence tiles(gemm.args, ends); !tiles.done(); tiles.advance()) {
    const WeightTile tile = tiles.tile();
    for (int token = 0; token < tile.tokens; token += kBlockK) {
      position.wait_empty(barriers);
      uint64_t* full = &barriers.full[position.stage];
      const uint32_t stage = ring + position.stage * kStageBytes;
      mbarrier_arrive_expect_tx(full, kStageBytes);
      cp_async_bulk_tensor_load(stage, &gemm.grad, 0, tile.row + token, tile.out / 64, full);
      cp_async_bulk_tensor_load(stage + kGradBytes, &gemm.rows, 0, tile.row + token, tile.in / 64, full);
      position.advance();
    }
  }
}

__device__ __forceinline__ void st_shared_zeros(uint32_t address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Overwrites tokens `first` to `last` in the operands of a warpgroup: two boxes of grad, its own, and the two of rows,
// which the other warpgroup overwrites with the same zeros. The swizzle permutes within a token's 128 bytes only.
__device__ __forceinline__ void clear_tokens(uint32_t grad, uint32_t rows, int first, int last, int warpgroup) {
  constexpr int kChunks = kSwizzleRowBytes / 16;
  const int thread = threadIdx.x % kWarpgroup;
  for (int i = thread; i < (last - first) * kChunks; i += kWarpgroup) {
    const uint32_t offset = first * kSwizzleRowBytes + i * 16;
    st_shared_zeros(grad + offset);
    st_shared_zeros(grad + kBoxBytes + offset);
    st_shared_zeros(rows + offset);
    st_shared_zeros(rows + kBoxBytes + offset);
  }
  fence_proxy_async_shared();
  bar_sync(1 + warpgroup, kWarpgroup);
}

__device__ __forceinline__ void multiply_step(float (&sums)[2][64], uint64_t grad, uint64_t rows, int step,
                                              bool accumulate) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    wgmma<kTileIn, Major::kOuter, Major::kOuter>(sums[half],
                                                 grad + half * (kBoxBytes >> 4) + step * descriptor_step(Major::kOuter),
                                                 rows + step * descriptor_step(Major::kOuter), accumulate);
  }
}

// Writes a warpgroup's 128 x 128 sums, or adds them.
template <bool accumulate>
__device__ __forceinline__ void store_result(const WeightGemm& gemm, const WeightTile& tile, uint32_t staging,
                                             const float (&sums)[2][64], int warpgroup) {
  const bool copies = threadIdx.x % kWarpgroup == 0;
  const int out = tile.out + warpgroup * kWarpgroupOut;
#pragma unroll
  for (int part = 0; part < (accumulate ? 2 : 1); ++part) {
    if (copies) cp_async_bulk_wait_group_read<0>();  // the part before is out of the staging memory
    bar_sync(1 + warpgroup, kWarpgroup);
    if constexpr (accumulate) {
      stage_rows_fp32(staging, sums[part]);
    } else {
      stage_rows(staging, sums);
    }
    fence_proxy_async_shared();
    bar_sync(1 + warpgroup, kWarpgroup);
    if (!copies) continue;
    if constexpr (accumulate) {
#pragma unroll
      for (int box = 0; box < 4; ++box) {
        cp_reduce_async_bulk_tensor_add(&gemm.out, tile.in + box * 32, out + part * 64, tile.expert,
                                        staging + box * kGradientFp32BoxBytes);
      }
    } else {
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        cp_async_bulk_tensor_store(&gemm.out, tile.in + box * 64, out, tile.expert, staging + box * kGradientBoxBytes);
      }
    }
    cp_async_bulk_commit_group();
  }
}

template <bool accumulate>
__device__ __forceinline__ void multiply(const WeightGemm& gemm, const int32_t* ends, Barriers& barriers, uint32_t ring,
                                         int warpgroup) {
  const GroupedWgradArgs& args = gemm.args;
  const uint32_t staging = ring + kRingStages * kStageBytes + warpgroup * kStagingBytes;
  Ring position;
  for (TileSequence tiles(args, ends); !tiles.done(); tiles.advance()) {
    const WeightTile tile = tiles.tile();
    if (accumulate && tile.tokens == 0) continue;
    float sums[2][64];
    if (tile.tokens == 0) {
#pragma unroll
      for (int j = 0; j < 128; ++j) sums[j / 64][j % 64] = 0.0f;
    }
    int previous = 0;
#pragma unroll 1
    for (int token = 0; token < tile.tokens; token += kBlockK) {
      position.wait_full(barriers);
      const uint32_t stage = ring + position.stage * kStageBytes;
      const uint32_t my_grad = stage + warpgroup * 2 * kBoxBytes, rows = stage + kGradBytes;
      const int valid = tile.tokens - token;
      const int padded = (valid + kMmaK - 1) / kMmaK * kMmaK;
      if (valid < kBlockK && valid < padded) clear_tokens(my_grad, rows, valid, padded, warpgroup);
      const uint64_t a = matrix_descriptor(my_grad, kBoxBytes), b = matrix_descriptor(rows, kBoxBytes);
      if (padded >= kBlockK) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockK / kMmaK; ++step) {
          multiply_step(sums, a, b, step, token > 0 || step > 0);
        }
      } else {
#pragma unroll 1
        for (int step = 0; step * kMmaK < padded; ++step) {
          wgmma_fence();
          multiply_step(sums, a, b, step, token > 0 || step > 0);
        }
      }
      wgmma_commit_group();
      wgmma_wait_group<1>();  // the block before this one has been multiplied
      if (token > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.empty[previous]);
      previous = position.stage;
      position.advance();
    }
    wgmma_wait_group<0>();
    touch(sums[0]);
    touch(sums[1]);
    if (tile.tokens > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.empty[previous]);

    store_result<accumulate>(gemm, tile, staging, sums, warpgroup);
  }
  if (threadIdx.x % kWarpgroup == 0)
    cp_async_bulk_wait_group_read<0>();  // shared memory must outlive the copies out of it
}

template <bool accumulate>
__global__ void __launch_bounds__(kGemmThreads, 1) weight_gemm_kernel(const __grid_constant__ WeightGemm gemm) {
  extern __shared__ uint8_t dynamic_shared[];
  __shared__ int32_t ends[kMaxGemmExperts];
  __shared__ Barriers barriers;
  if (threadIdx.x == 0) barriers.init();
  for (int e = threadIdx.x; e < gemm.args.experts; e += kGemmThreads) ends[e] = gemm.args.ends[e];
  __syncthreads();
  const uint32_t ring =
      (shared_address(dynamic_shared) + kSwizzleGroupBytes - 1) / kSwizzleGroupBytes * kSwizzleGroupBytes;
  const int group = static_cast<int>(threadIdx.x / kWarpgroup) - 1;
  if (group < 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) copy_operands(gemm, ends, barriers, ring);
  } else {
    setmaxnreg_inc<kMultiplierRegisters>();
    multiply<accumulate>(gemm, ends, barriers, ring, group);
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
                   args->accumulate ? 64 : 128)) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  const auto kernel = args->accumulate ? weight_gemm_kernel<true> : weight_gemm_kernel<false>;
  return launch(kWhat, kernel, gemm, args->blocks, kGemmThreads, kSharedBytes, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_grouped_wgrad_args_bytes() { return sizeof(ep_moe::GroupedWgradArgs); }
