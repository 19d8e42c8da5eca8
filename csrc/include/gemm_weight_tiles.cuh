// Which tiles the gradients of weights have, and which block computes which of them.
//
// All tiles have one size: in bf16 a multiply takes 64 gradient columns by all 256 columns of the rows, and reads 10 KB
// of shared memory where two by 128 columns would read 12. An expert's tiles go in bands of a few gradient columns, so
// that those at work together share both of their operands in the L2 cache.
#pragma once

#include <cstdint>

namespace ep_moe {

constexpr int kTileOut = 128, kTileIn = 256;
constexpr int kBand = 16;  // tiles of gradient columns that go together

struct WeightTile {
  int expert;
  int out;  // first column of grad
  int in;   // first column of rows
  int row;
  int tokens;
};

// A block's tiles in turn: every gridDim.x-th.
struct WeightTileSequence {
  const int32_t* ends;
  int experts, out_tiles, in_tiles;
  int expert = 0, index;  // of the expert's tiles

  __device__ __forceinline__ WeightTileSequence(const int32_t* segment_ends, int num_experts, int out_features,
                                                int in_features)
      : ends(segment_ends),
        experts(num_experts),
        out_tiles((out_features + kTileOut - 1) / kTileOut),
        in_tiles((in_features + kTileIn - 1) / kTileIn),
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

}  // namespace ep_moe
