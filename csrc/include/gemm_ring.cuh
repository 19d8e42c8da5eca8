// The ring of shared-memory stages between the warp that copies operands and the warpgroups that multiply them.
//
// The producer waits until a stage is empty, and its copies make it full; the multiplying warps wait until it is full
// and make it empty, one arrival a warp. The ring fills for the next tile while the results of one go out: through
// stages that the producer hands over for it (gemm_tokens.cuh), or through shared memory of their own
// (grouped_gemm_wgrad.cu).
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace ep_moe {

constexpr int kWarpgroup = 128;
constexpr int kMultipliers = 2;  // warpgroups
constexpr int kGemmThreads = (1 + kMultipliers) * kWarpgroup;

constexpr int kProducerRegisters = 40;
constexpr int kMultiplierRegisters = 232;

template <int count>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int stages>
struct RingBarriers {
  uint64_t full[stages];
  uint64_t empty[stages];

  // Called by one thread; the block synchronises before it uses them.
  __device__ __forceinline__ void init() {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kMultipliers * kWarpgroup / 32);
    }
    fence_proxy_async();
  }
};

// One thread's way round the ring.
template <int stages>
struct RingPosition {
  int stage = 0;
  uint32_t round = 0;  // parity

  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      round ^= 1;
    }
  }

  __device__ __forceinline__ void wait_full(RingBarriers<stages>& barriers) const {
    mbarrier_wait_parity(&barriers.full[stage], round);
  }

  // Stages are empty at first.
  __device__ __forceinline__ void wait_empty(RingBarriers<stages>& barriers) const {
    mbarrier_wait_parity(&barriers.empty[stage], round ^ 1);
  }
};

}  // namespace ep_moe
