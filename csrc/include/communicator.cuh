// What all kernels of a communicator share: rounds, waits that end, and the report of what went wrong.
//
// Rounds. Every kernel that talks to peers is one round; the number lives in device memory, so that a captured CUDA
// graph counts on. A rank *enters* round e by telling all peers so (release), by announce_round or by another flag that
// carries the round, which says that it has finished all rounds before e; and it leaves no round before all peers have
// entered it. Hence, in round e:
//   (1) every peer has entered round e - 1, so it has finished rounds up to e - 2: what rounds e - 2 and earlier read
//       may be overwritten. Parts of the buffer that come in two copies use copy e % 2.
//       Rows that arrive from other nodes are the exception: dispatch d takes copy d % 2, so that they can be stored
//       while the layout, whose round comes between, still runs. What dispatch d - 2 read may be overwritten once d - 1
//       has ended here, for all peers have entered that round.
//   (2) once a peer is seen (acquire) to have entered round e, it has finished round e - 1: what only it reads, in one
//       copy, may be overwritten.
#pragma once

#include "buffer.cuh"
#include "fault.cuh"
#include "ptx.cuh"

namespace ep_moe {

// In local device memory, zero at first.
struct Workspace {
  uint32_t round;           // rounds finished
  uint32_t exited_blocks;   // of the running kernel
  uint32_t arrived_blocks;  // at the grid barrier; the highest bit turns over when it opens
  uint32_t reserved;        // keeps the words that the host knows in their places
  uint32_t failed;          // set once a wait ended in vain: later waits end at once
  uint32_t reported;        // set once there is a fault report
  uint32_t dispatches;      // finished, or given up by the host behind the kernel that sends their rows
  uint32_t placed;          // 1 once the last layout has ended, 0 from its start on
};

// First fields of the arguments of every kernel.
struct Communicator {
  uint8_t* buffers[kMaxRanks];  // symmetric buffer of every rank, mapped here
  BufferLayout layout;
  BufferShape shape;
  Workspace* workspace;
  FaultReport* report;
  uint64_t timeout_ns;
  int32_t rank;
  int32_t blocks;  // of the grid: the SM budget
};

template <typename T>
__device__ __forceinline__ T* part(const Communicator& comm, int rank, int64_t offset) {
  return reinterpret_cast<T*>(comm.buffers[rank] + offset);
}

// See report_fault of fault.cuh.
__device__ __forceinline__ void report_fault(const Communicator& comm, Fault fault, Step step, int rank, uint32_t round,
                                             int64_t value = 0, int64_t allowed = 0) {
  report_fault(comm.report, &comm.workspace->reported, fault, step, rank, round, value, allowed);
}

// Whether a flag, acquired here, says `number` of a round or dispatch, or a later one. Numbers wrap around: compare by
// difference.
__device__ __forceinline__ bool has_reached(const uint32_t* flag, uint32_t number) {
  return static_cast<int32_t>(ld_acquire_sys(flag) - number) >= 0;
}

__device__ __forceinline__ bool has_failed(const Communicator& comm) {
  return *reinterpret_cast<volatile uint32_t*>(&comm.workspace->failed) != 0;
}

// Whether a wait has failed, which this thread asks again and again: because the time is up, which it reports, or as
// one did before. `start` is 0 at first.
__device__ inline bool wait_is_over(const Communicator& comm, Step step, int rank, uint32_t round, uint64_t* start) {
  if (has_failed(comm)) return true;
  if (*start == 0) *start = global_timer_ns();
  if (global_timer_ns() - *start <= comm.timeout_ns) return false;
  report_fault(comm, Fault::kTimeout, step, rank, round);
  comm.workspace->failed = 1;
  return true;
}

// Spins until `ready()` or until the time is up; false then. One thread.
template <typename Ready>
__device__ inline bool wait_bounded(const Communicator& comm, Step step, int rank, uint32_t round, Ready ready) {
  uint64_t start = 0;
  while (!ready())
    if (wait_is_over(comm, step, rank, round, &start)) return false;
  return true;
}

// The number of the round that is starting; the same for all blocks, because the last kernel has ended.
__device__ __forceinline__ uint32_t begin_round(const Communicator& comm) {
  return *reinterpret_cast<volatile uint32_t*>(&comm.workspace->round) + 1;
}

// Block 0 tells all peers; releases everything this rank did in earlier kernels. Pairs with wait_entered.
__device__ __forceinline__ void announce_round(const Communicator& comm, uint32_t round) {
  if (blockIdx.x == 0 && threadIdx.x < comm.shape.ranks)
    st_release_sys(part<uint32_t>(comm, threadIdx.x, comm.layout.entered) + comm.rank, round);
}

// One thread; acquires what `peer` did before it entered `round`. Pairs with announce_round.
__device__ __forceinline__ bool wait_entered(const Communicator& comm, Step step, int peer, uint32_t round) {
  const uint32_t* flag = part<uint32_t>(comm, comm.rank, comm.layout.entered) + peer;
  return wait_bounded(comm, step, peer, round, [=] { return has_reached(flag, round); });
}

// All threads of all blocks, last thing in the kernel: the last block closes the round. True for one thread of it.
__device__ inline bool end_round(const Communicator& comm, uint32_t round) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  if (atom_add_acq_rel_gpu(&comm.workspace->exited_blocks, 1) != gridDim.x - 1) return false;
  comm.workspace->exited_blocks = 0;
  comm.workspace->round = round;
  return true;
}

// The dispatch that is running or, while none is, the next one, counted from 1.
__device__ __forceinline__ uint32_t this_dispatch(const Communicator& comm) {
  return *reinterpret_cast<volatile uint32_t*>(&comm.workspace->dispatches) + 1;
}

// Of a row and the fp32 scales behind it, in whole words of a bulk copy.
__device__ __forceinline__ uint32_t travelling_bytes(int row_bytes, int row_scales) {
  return row_bytes + (row_scales * 4 + 15) / 16 * 16;
}

// Where in every rank's buffer the rows begin that `source` pushes there.
__device__ __forceinline__ int64_t pushed_rows(const Communicator& comm, int source) {
  return comm.layout.rows + source * comm.shape.max_tokens * comm.shape.max_row_bytes;
}

// The flags of the rows that `source` pushed to `rank`: the last dispatch that each was pushed for.
__device__ __forceinline__ uint32_t* landed_flags(const Communicator& comm, int rank, int source) {
  return part<uint32_t>(comm, rank, comm.layout.landed) + static_cast<int64_t>(source) * comm.shape.max_tokens;
}

// Where in every rank's buffer the rows of this dispatch begin that other nodes sent to that rank.
__device__ __forceinline__ int64_t arrived_rows(const Communicator& comm) {
  const int64_t copy = this_dispatch(comm) % 2;
  return comm.layout.rows + copy * comm.shape.max_tokens * comm.shape.max_row_bytes;
}

// All threads of all blocks; all blocks must be resident. Not bounded: blocks of one grid wait only for each other,
// and waits for peers before it are bounded.
//
// The blocks of a grid of any size add 2^31 together, so that the highest bit of the count turns over when the last one
// arrives, and nothing is reset: blocks look at the very word that the last one adds to.
__device__ inline void grid_barrier(const Communicator& comm) {
  constexpr uint32_t kOpen = 1u << 31;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* arrived = &comm.workspace->arrived_blocks;
    const uint32_t mine = blockIdx.x == 0 ? kOpen - (gridDim.x - 1) : 1;
    const uint32_t before = atom_add_acq_rel_gpu(arrived, mine);  // pairs with the acquire below, of other blocks
    uint32_t now = before + mine;
    while (((now ^ before) & kOpen) == 0) now = ld_acquire_gpu(arrived);
  }
  __syncthreads();
}

}  // namespace ep_moe
