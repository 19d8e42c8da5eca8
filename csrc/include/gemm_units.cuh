// Which tiles a grouped product with tokens on the tall side has.
//
// Its instructions take 64 tokens, a unit. An expert's units are cut into as few tiles as the tallest one permits, as
// even as can be. The token tiles of one weight tile are neighbours, and run at the same time. All blocks build the
// same table from the segment ends in global memory.
#pragma once

#include <cstdint>

#include "gemm_tiles.cuh"

namespace ep_moe {

constexpr int kUnit = 64;         // tokens
constexpr int kMaxTileUnits = 4;  // of a tile

// A tile of the output: `tokens` rows from `row` on, of a weight tile.
struct UnitTile {
  int expert;
  int weight_tile;
  int row;
  int tokens;

  __device__ __forceinline__ int units() const { return (tokens + kUnit - 1) / kUnit; }
};

// Lies in shared memory.
struct UnitTable {
  int32_t ends[kMaxGemmExperts];
  int32_t tiles_until[kMaxGemmExperts];  // of the experts up to and with this one
  int32_t experts;
  int32_t weight_tiles;
  int32_t room;  // rows from one expert's first to the next one's; 0 if they have no gaps

  __device__ __forceinline__ int start(int expert) const {
    if (room > 0) return expert * room;
    return expert == 0 ? 0 : ends[expert - 1];
  }

  __device__ __forceinline__ int tiles() const { return tiles_until[experts - 1]; }

  static __device__ __forceinline__ int units_of(int tokens) { return (tokens + kUnit - 1) / kUnit; }

  static __device__ __forceinline__ int token_tiles(int units) { return (units + kMaxTileUnits - 1) / kMaxTileUnits; }

  // Called by all threads of the block; the table is complete when it returns. With `expert_room`, `segment_ends` are
  // counts of rows, each expert's from the first of its room on.
  __device__ void build(const int32_t* segment_ends, int num_experts, int expert_room, int num_weight_tiles) {
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
      ends[e] = expert_room > 0 ? e * expert_room + min(segment_ends[e], expert_room) : segment_ends[e];
    }
    if (threadIdx.x == 0) experts = num_experts, weight_tiles = num_weight_tiles, room = expert_room;
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x;
      int before = 0;
      for (int base = 0; base < num_experts; base += 32) {
        const int e = base + lane;
        int sum = e < num_experts ? token_tiles(units_of(ends[e] - start(e))) * num_weight_tiles : 0;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int other = __shfl_up_sync(~0u, sum, offset);
          if (lane >= offset) sum += other;
        }
        if (e < num_experts) tiles_until[e] = before + sum;
        before += __shfl_sync(~0u, sum, 31);
      }
    }
    __syncthreads();
  }

  // `expert` is that of the caller's previous tile, 0 before the first: tiles are asked for in ascending order.
  __device__ __forceinline__ UnitTile find(int tile, int& expert) const {
    int low = expert, high = experts - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (tiles_until[middle] > tile) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    expert = low;
    const int index = tile - (low == 0 ? 0 : tiles_until[low - 1]);
    const int first = start(low), tokens = ends[low] - first;
    const int units = units_of(tokens), count = token_tiles(units);
    const int token_tile = index % count;
    const int height = units / count, taller = units % count;  // as many tiles have a unit more, the first ones
    UnitTile found;
    found.expert = low;
    found.weight_tile = index / count;
    const int offset = (token_tile * height + min(token_tile, taller)) * kUnit;
    found.row = first + offset;
    found.tokens = min((height + (token_tile < taller)) * kUnit, tokens - offset);
    return found;
  }
};

}  // namespace ep_moe
