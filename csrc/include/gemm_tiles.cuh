// Which tiles a grouped product over ragged token segments has, and which block computes which of them.
//
// An expert's tokens are cut into as few tiles as the widest one permits, all of one width: the smallest multiple of 8
// that holds their share. Every width is its own code, so a block goes through its tiles class by class: experts are
// sorted by width, widest first, so that the last wave has the smaller tiles; those without tokens have no tiles. All
// blocks sort alike, from the segment ends in global memory. Within an expert the token tiles of one weight tile are
// neighbours, and run at the same time.
#pragma once

#include <cstdint>

namespace ep_moe {

constexpr int kMaxGemmExperts = 1024;
constexpr int kWidthStep = 8;
constexpr int kMaxWidth = 160;  // tokens: 2 x 80 accumulators a thread are the most that spill nothing
constexpr int kWidthClasses = kMaxWidth / kWidthStep;

constexpr __host__ __device__ int width_of_class(int width_class) { return kMaxWidth - width_class * kWidthStep; }

// How an expert's tokens are cut.
struct TokenTiling {
  int tiles;
  int width;

  static __device__ __forceinline__ TokenTiling of(int tokens) {
    TokenTiling tiling = {(tokens + kMaxWidth - 1) / kMaxWidth, 0};
    if (tiling.tiles == 0) return tiling;
    const int share = (tokens + tiling.tiles - 1) / tiling.tiles;
    tiling.width = (share + kWidthStep - 1) / kWidthStep * kWidthStep;
    return tiling;
  }

  // kWidthClasses for an expert without tokens
  __device__ __forceinline__ int width_class() const { return (kMaxWidth - width) / kWidthStep; }
};

// A tile of the output: `tokens` rows from `row` on, of a weight tile.
struct TokenTile {
  int expert;
  int weight_tile;
  int row;
  int tokens;
  int width_class;
};

// Lies in shared memory; every block builds the same.
struct TileTable {
  int32_t ends[kMaxGemmExperts];
  int32_t first_tile[kMaxGemmExperts + 1];  // of the experts in `order`, and the number of tiles behind them
  int32_t class_tiles[kWidthClasses];
  int32_t class_experts[kWidthClasses];
  int32_t class_end[kWidthClasses];  // the first tile beyond a class
  int32_t experts;                   // that have tokens
  int32_t room;                      // rows from one expert's first to the next one's; 0 if they have no gaps
  int32_t first_row;                 // of the first expert
  uint16_t order[kMaxGemmExperts];

  __device__ __forceinline__ int start(int expert) const {
    if (room > 0) return expert * room;
    return expert == 0 ? first_row : ends[expert - 1];
  }

  __device__ __forceinline__ int tiles() const { return class_end[kWidthClasses - 1]; }

  // Called by all threads of the block; the table is complete when it returns. `first` is where the first segment
  // starts, or nullptr for row 0. With `expert_room`, `segment_ends` are counts of rows, each expert's from the first
  // of its room on.
  __device__ void build(const int32_t* first, const int32_t* segment_ends, int num_experts, int expert_room,
                        int weight_tiles) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x == 0) {
      room = expert_room;
      first_row = first == nullptr ? 0 : *first;
    }
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
      ends[e] = expert_room > 0 ? e * expert_room + min(segment_ends[e], expert_room) : segment_ends[e];
    }
    __syncthreads();
    for (int c = warp; c < kWidthClasses; c += warps) {
      int tiles_of_lane = 0, experts_of_lane = 0;
      for (int e = lane; e < num_experts; e += 32) {
        const TokenTiling tiling = TokenTiling::of(ends[e] - start(e));
        if (tiling.width_class() != c) continue;
        tiles_of_lane += tiling.tiles * weight_tiles;
        experts_of_lane += 1;
      }
      const int all_tiles = __reduce_add_sync(~0u, tiles_of_lane);
      const int all_experts = __reduce_add_sync(~0u, experts_of_lane);
      if (lane == 0) class_tiles[c] = all_tiles, class_experts[c] = all_experts;
    }
    __syncthreads();
    for (int c = warp; c < kWidthClasses; c += warps) {
      int tile = 0, slot = 0;
      for (int before = 0; before < c; ++before) tile += class_tiles[before], slot += class_experts[before];
      const int end = tile + class_tiles[c];
      if (lane == 0) class_end[c] = end;
      if (c == kWidthClasses - 1 && lane == 0) {
        experts = slot + class_experts[c];
        first_tile[experts] = end;
      }
      for (int base = 0; tile < end; base += 32) {
        const int e = base + lane;
        const TokenTiling tiling = TokenTiling::of(e < num_experts ? ends[e] - start(e) : 0);
        const bool member = tiling.width_class() == c;
        const unsigned members = __ballot_sync(~0u, member);
        if (members == 0) continue;
        const int tiles_of_expert = member ? tiling.tiles * weight_tiles : 0;
        int sum = tiles_of_expert;  // of this lane's expert and of those before
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int other = __shfl_up_sync(~0u, sum, offset);
          if (lane >= offset) sum += other;
        }
        if (member) {
          const int mine = slot + __popc(members & ((1u << lane) - 1));
          order[mine] = static_cast<uint16_t>(e);
          first_tile[mine] = tile + sum - tiles_of_expert;
        }
        tile += __shfl_sync(~0u, sum, 31);
        slot += __popc(members);
      }
    }
    __syncthreads();
  }

  // `slot` is that of the caller's previous tile, 0 before the first: tiles are asked for in ascending order.
  __device__ __forceinline__ TokenTile find(int tile, int& slot) const {
    int low = slot, high = experts - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_tile[middle] <= tile) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    slot = low;
    TokenTile found;
    found.expert = order[low];
    const int first = start(found.expert), tokens = ends[found.expert] - first;
    const TokenTiling tiling = TokenTiling::of(tokens);
    const int index = tile - first_tile[low];
    const int offset = index % tiling.tiles * tiling.width;
    found.weight_tile = index / tiling.tiles;
    found.row = first + offset;
    found.tokens = min(tiling.width, tokens - offset);
    found.width_class = tiling.width_class();
    return found;
  }
};

}  // namespace ep_moe
