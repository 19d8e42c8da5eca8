// Two warpgroups that multiply in FP8 by turns, a unit each: while one promotes its products, the other multiplies.
//
// Left to themselves they start together on every stage, share the tensor cores, end together and promote together,
// while nothing multiplies. The turn passes on when the first of a unit's multiplies are done: the rest, 128 cycles or
// more, covers the way to the next ones, and is not slowed by all of them. Both have to take the same number of turns.
#pragma once

#include "gemm_ring.cuh"
#include "ptx.cuh"

namespace ep_moe {

constexpr int kTurnBarrier = 1;  // one a warpgroup
static_assert(kMultipliers == 2);

// Waits until the other warpgroup is well into its unit. A barrier a warpgroup, for which it waits and at which the
// other arrives; the next arrival follows the other's next turn, and so this warpgroup's: no phase is overrun.
__device__ __forceinline__ void take_turn(int warpgroup) {
  bar_sync(kTurnBarrier + warpgroup, kMultipliers * kWarpgroup);
}

__device__ __forceinline__ void pass_turn(int warpgroup) {
  bar_arrive(kTurnBarrier + (warpgroup ^ 1), kMultipliers * kWarpgroup);
}

}  // namespace ep_moe
