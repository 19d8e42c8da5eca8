// Where tokens lie in operands of the gradient of weights in FP8: in blocks of 128, every expert's from a block of its
// own on. An expert's padded segment is a multiple of 128 slots long, and empty if the expert has no tokens.
#pragma once

#include <cstdint>

#include "gemm_tiles.cuh"

namespace ep_moe {

constexpr int kTokenBlock = 128;

// Sums up where each expert's padded segment ends, from the ends of the segments of rows in global memory. Called by
// all threads of the block; `padded_ends`, in shared memory, are complete when it returns.
__device__ inline void pad_segments(int32_t* padded_ends, const int32_t* ends, int experts) {
#pragma unroll 1
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    const int tokens = ends[e] - (e == 0 ? 0 : ends[e - 1]);
    padded_ends[e] = (tokens + kTokenBlock - 1) / kTokenBlock * kTokenBlock;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
#pragma unroll 1
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane;
      int sum = e < experts ? padded_ends[e] : 0;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += other;
      }
      if (e < experts) padded_ends[e] = before + sum;
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
}

// The expert whose padded segment holds `slot`, which one does; none before `first` may.
__device__ __forceinline__ int expert_of(const int32_t* padded_ends, int experts, int slot, int first) {
  int low = first, high = experts - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (padded_ends[middle] > slot) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace ep_moe
