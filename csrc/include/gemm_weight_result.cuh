// The way of a gradient of weights out of the accumulators: written as bf16, or added to fp32.
//
// A warpgroup has 64 x 256 sums of a tile of gemm_weight_tiles.cuh, which leave through shared memory of its own while
// the ring fills for the next tile. Sums are added to fp32 in one of two ways. Where tiles have few tokens and memory
// is the limit, they meet the old values in shared memory: a thread for each warpgroup fetches those box by box while
// the tile is multiplied, and sends the totals back. Elsewhere they go out by reducing copies, which wait for nothing
// but leave the addition to the L2 cache, at half of the rate at which memory could be read and written. Each element
// is added to once, in one rounding either way, so the bits depend neither on the way nor on the order.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gemm_result.cuh"
#include "gemm_ring.cuh"
#include "gemm_weight_tiles.cuh"
#include "ptx.cuh"
#include "tma.cuh"

namespace ep_moe {

enum class Result { kWrite, kReduce, kTotal };

constexpr int kResultBarrier = 3;  // one a warpgroup
constexpr int kWarpgroupOut = kTileOut / kMultipliers;
constexpr int kStagingBytes = 32768;                            // of a warpgroup
constexpr int kTotalSlots = kStagingBytes / kGradientBoxBytes;  // boxes of fp32 in shared memory at a time
constexpr int kTotalBoxes = kTileIn / 32;                       // of a warpgroup's part of a tile
static_assert(kWarpgroupOut == 64 && kTileIn == kTotalSlots * 64 && kTotalBoxes == 2 * kTotalSlots);

// Of a warpgroup's boxes of old values and totals. A tile has two for each slot, so the parities are known.
struct TotalBarriers {
  uint64_t old[kTotalSlots];    // the old values are there
  uint64_t total[kTotalSlots];  // the sums have been added

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kTotalSlots; ++i) {
      mbarrier_init(&old[i], 1);
      mbarrier_init(&total[i], kWarpgroup / 32);
    }
    fence_proxy_async();
  }
};

// Copies a warpgroup's sums out, in one part of bf16 or two of fp32.
template <Result result>
__device__ __forceinline__ void store_result(const CUtensorMap* map, const WeightTile& tile, uint32_t staging,
                                             const float (&sums)[kTileIn / 2], int warpgroup) {
  constexpr bool kReduces = result == Result::kReduce;
  const bool copies = threadIdx.x % kWarpgroup == 0;
  const int out = tile.out + warpgroup * kWarpgroupOut;
#pragma unroll
  for (int part = 0; part < (kReduces ? 2 : 1); ++part) {
    if (copies) cp_async_bulk_wait_group_read<0>();  // the part before is out of the staging memory
    bar_sync(kResultBarrier + warpgroup, kWarpgroup);
    if constexpr (!kReduces) {
      stage_rows(staging, sums);
    } else if (part == 0) {
      stage_rows_fp32<0>(staging, sums);
    } else {
      stage_rows_fp32<1>(staging, sums);
    }
    fence_proxy_async_shared();
    bar_sync(kResultBarrier + warpgroup, kWarpgroup);
    if (!copies) continue;
#pragma unroll
    for (int box = 0; box < kTotalSlots; ++box) {
      const uint32_t staged = staging + box * kGradientBoxBytes;
      if constexpr (kReduces) {
        cp_reduce_async_bulk_tensor_add(map, tile.in + (part * kTotalSlots + box) * 32, out, tile.expert, staged);
      } else {
        cp_async_bulk_tensor_store(map, tile.in + box * 64, out, tile.expert, staged);
      }
    }
    cp_async_bulk_commit_group();
  }
}

// Adds a warpgroup's sums to the old values, box by box as they arrive.
__device__ __forceinline__ void add_result(uint32_t staging, TotalBarriers& barriers,
                                           const float (&sums)[kTileIn / 2]) {
#pragma unroll
  for (int box = 0; box < kTotalBoxes; ++box) {
    const int slot = box % kTotalSlots;
    mbarrier_wait_parity(&barriers.old[slot], box / kTotalSlots);
    add_to_staged_rows(staging + slot * kGradientBoxBytes, sums, box);
    fence_proxy_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.total[slot]);
  }
}

// The boxes of a warpgroup in the order in which they pass through shared memory; experts without tokens have none.
struct TotalSequence {
  WeightTileSequence tiles;
  WeightTile tile;
  int box = 0;

  __device__ __forceinline__ explicit TotalSequence(const WeightTileSequence& all) : tiles(all) { settle(); }

  __device__ __forceinline__ bool done() const { return tiles.done(); }
  __device__ __forceinline__ int slot() const { return box % kTotalSlots; }
  __device__ __forceinline__ int in() const { return tile.in + box * 32; }
  __device__ __forceinline__ int out(int warpgroup) const { return tile.out + warpgroup * kWarpgroupOut; }

  __device__ __forceinline__ void advance() {
    if (++box < kTotalBoxes) return;
    box = 0;
    tiles.advance();
    settle();
  }

 private:
  __device__ __forceinline__ void settle() {
    for (; !tiles.done(); tiles.advance()) {
      tile = tiles.tile();
      if (tile.tokens > 0) return;
    }
  }
};

// One thread's work: brings the old values of a warpgroup's boxes, and takes the totals away.
__device__ __forceinline__ void move_totals(const CUtensorMap* map, const WeightTileSequence& tiles,
                                            TotalBarriers& barriers, uint32_t staging, int warpgroup) {
  TotalSequence next(tiles);  // to fetch
  const auto fetch = [&] {
    uint64_t* old = &barriers.old[next.slot()];
    mbarrier_arrive_expect_tx(old, kGradientBoxBytes);
    cp_async_bulk_tensor_load(staging + next.slot() * kGradientBoxBytes, map, next.in(), next.out(warpgroup),
                              next.tile.expert, old);
    next.advance();
  };
  for (int slot = 0; slot < kTotalSlots && !next.done(); ++slot) fetch();
  for (TotalSequence total(tiles); !total.done(); total.advance()) {
    mbarrier_wait_parity(&barriers.total[total.slot()], total.box / kTotalSlots);
    cp_async_bulk_tensor_store(map, total.in(), total.out(warpgroup), total.tile.expert,
                               staging + total.slot() * kGradientBoxBytes);
    cp_async_bulk_commit_group();
    cp_async_bulk_wait_group_read<0>();  // the slot is free
    if (!next.done()) fetch();
  }
}

}  // namespace ep_moe
