// The hop between nodes: rows to and from the GPUs in this one's place on other nodes, by put-and-signal.
//
// A channel is a pair of blocks, one on the sending and one on the receiving GPU, with a ring of kNodeSlots slots of
// kNodeChunkRows rows. The sender gathers a chunk into its staging slot and puts it, with a flag behind it, into the
// landing slot of the receiver; the receiver copies it out and puts back a credit. A credit says that the landing slot
// was read, hence that the put has read the staging slot: both may be filled again. Flags and credits are the number of
// times the slot was filled, and only grow. How many chunks travel is known to both sides before the launch. Rows to
// this rank's own node are copied by blocks of their own.
//
// Beside the kernels of the node. In a dispatch it takes the place of the push (push.cu): it stores rows, from all
// nodes, where peers of the node pull them, and raises a flag for every chunk that is there. In a combine it sends a
// chunk as soon as the node's combine has summed it.
//
//   writer                          reader                       ordered by
//   landing slot (put of a sender)  receiver                     flag of the slot, by the transport's put
//   (reuse of both slots)           sender                       credit: __syncthreads, then the transport's signal
//   rows[d % 2] (own buffer)        peers, dispatch d            `arrivals` of the chunk: __syncthreads, then
//                                                                st.release / ld.acquire
//   (reuse of rows[d % 2])          peers, dispatch d - 2        rule (1) of communicator.cuh: as stage.cu
//   sums (combine of the node)      sender                       `summed` of 8 rows: st.release / ld.acquire, then
//                                                                __syncthreads
//   all of the kernel ahead         the kernels behind           griddepcontrol_wait of one block here
//
// Why it ends. Senders wait for receivers of other GPUs, and the other way round, so all blocks of every rank's kernel
// must come to run whatever other kernels do:
//   - in a dispatch, beside the layout ahead of it, which waits for peers of the node and not for this kernel, so it
//     ends and makes room. Dispatch behind it, whose blocks wait for this kernel here and on peers, starts only when
//     all blocks of this one have started (launch_dependents). It never has to leave them room, nor they it: they do
//     not wait for it.
//   - in a combine, behind the node's combine, all of whose blocks have started (launch_dependents there). They wait
//     for peers' combines and not for this kernel, so they end and make room.
//   - otherwise alone: a cooperative launch.
// A grid that a GPU cannot hold is refused: before a launch beside another kernel there is a cooperative one of as many
// blocks, for the routing of the same tokens. So all blocks are resident once others have made room. A rank's kernels
// of an exchange wait for those of the same exchange on other ranks, which are behind earlier ones only: the first
// exchange that has not ended anywhere can go on. Waits for other nodes are bounded; those for kernels of this GPU end
// because these do.
//
// What a put is, the template argument says:
//   put(args, node, from, to, bytes, flag, value)  block; bytes at offset `from` of this rank's memory go to offset
//   `to`
//                                                  of the node's, then 8 bytes `value` to offset `flag`
//   signal(args, node, flag, value)                one thread; 8 bytes, behind what this thread has read
//   fetch(word)                                    one thread; this rank's 8 bytes, before what this thread reads next
#pragma once

#include "communicator.cuh"
#include "launch.cuh"

namespace ep_moe {

constexpr int kNodeParts = 4;
constexpr int kNodeSlots = 2;
constexpr int kNodeChunkRows = kChunkTokens;
constexpr int kNodeThreads = 512;
constexpr int kNodeWarps = kNodeThreads / 32;

// One of the tensors whose rows travel together.
struct NodePart {
  const uint8_t* rows;  // [rows][width]
  uint8_t* received;    // [received][width]; not read if rows are staged
  int32_t width;        // bytes of a row
  int32_t column;       // of a staged row, where this part of it begins
  int32_t offset;       // in a slot, a multiple of 16: kNodeChunkRows rows of this part
  int32_t reserved;
};

// In local device memory, zero at first.
struct NodeWorkspace {
  uint32_t failed;    // set once a wait ended in vain: later waits end at once
  uint32_t reported;  // set once there is a fault report
  // Behind it: uint64 [2][nodes][channels], chunks ever sent to, and received from, each node.
};

// The symmetric memory of a rank: uint64 flags [nodes][channels][kNodeSlots], credits likewise, staging slots likewise,
// landing slots likewise. Flags and landing slots are indexed by the sender's node, the others by the receiver's.
struct NodeExchangeArgs {
  NodePart parts[kNodeParts];
  uint8_t* memory[kMaxNodes];      // of every node, mapped here; NVSHMEM uses this node's only
  int32_t ranks[kMaxNodes];        // the rank in this one's place on every node, in the group
  int32_t send_first[kMaxNodes];   // the first row to every node
  int32_t send_counts[kMaxNodes];  // rows to every node
  int32_t recv_first[kMaxNodes];   // likewise, received
  int32_t recv_counts[kMaxNodes];
  const int64_t* tokens;  // [sent], the row to send, or null for the rows in their order
  NodeWorkspace* workspace;
  FaultReport* report;
  const uint32_t* summed;  // [rows / kCombineGroup], `epoch` once these rows are final; or nullptr if all are
  Communicator comm;       // of the node, if rows are staged: then received rows of a node start at a multiple of
                           // kNodeChunkRows
  int64_t staged_bytes;    // from row to row where they are staged; 0 if they are not
  int64_t slot_bytes;      // a multiple of 16
  uint64_t timeout_ns;
  uint32_t epoch;
  int32_t node;
  int32_t nodes;
  int32_t num_parts;
  int32_t channels;    // of each pair of nodes and direction
  int32_t own_blocks;  // that copy rows to this node; 0 if these stay where they are
  int32_t beside;      // the kernel ahead, which lets this one start, need not have ended
  int32_t reserved;
};

__device__ __forceinline__ int64_t node_slot(const NodeExchangeArgs& args, int node, int channel, int slot) {
  return (static_cast<int64_t>(node) * args.channels + channel) * kNodeSlots + slot;
}

enum class NodeRegion { kFlags, kCredits, kStaging, kLanding };

// Bytes from the start of the memory to a slot's word or rows.
__device__ __forceinline__ int64_t node_offset(const NodeExchangeArgs& args, NodeRegion region, int64_t slot) {
  const int64_t slots = static_cast<int64_t>(args.nodes) * args.channels * kNodeSlots;
  const int64_t words = (2 * slots * 8 + 15) / 16 * 16;
  switch (region) {
    case NodeRegion::kFlags:
      return slot * 8;
    case NodeRegion::kCredits:
      return (slots + slot) * 8;
    case NodeRegion::kStaging:
      return words + slot * args.slot_bytes;
    default:
      return words + (slots + slot) * args.slot_bytes;
  }
}

template <typename T>
__device__ __forceinline__ T* node_memory(const NodeExchangeArgs& args, int node, int64_t offset) {
  return reinterpret_cast<T*>(args.memory[node] + offset);
}

// All threads of the block: waits until this rank's word reaches `value`; false after a wait in vain.
template <typename Transport>
__device__ bool node_wait(const NodeExchangeArgs& args, int node, int64_t offset, uint64_t value) {
  __shared__ bool reached;
  if (threadIdx.x == 0) {
    uint64_t* word = node_memory<uint64_t>(args, args.node, offset);
    const uint64_t start = global_timer_ns();
    reached = true;
    while (Transport::fetch(word) < value) {
      const bool late = global_timer_ns() - start > args.timeout_ns;
      if (late)
        report_fault(args.report, &args.workspace->reported, Fault::kTimeout, Step::kNodes, args.ranks[node],
                     static_cast<uint32_t>(value), 0, 0);
      if (late || *reinterpret_cast<volatile uint32_t*>(&args.workspace->failed) != 0) {
        args.workspace->failed = 1;
        if (args.staged_bytes > 0) args.comm.workspace->failed = 1;  // dispatch waits for rows that will not be there
        reached = false;
        break;
      }
    }
  }
  __syncthreads();
  const bool result = reached;
  __syncthreads();  // the next call writes it
  return result;
}

// All threads of the block: until the rows to send, from `begin` on, have been summed, if they are sums.
__device__ __forceinline__ void wait_summed(const NodeExchangeArgs& args, int64_t begin, int rows) {
  if (args.summed == nullptr) return;
  const int64_t group = begin / kCombineGroup + threadIdx.x;
  if (group * kCombineGroup < begin + rows)
    while (ld_acquire_gpu(args.summed + group) != args.epoch) {  // pairs with the release in finish_sums of combine.cu
    }
  __syncthreads();
}

// Thread `thread` of kTogether that copy `bytes` by words T; the loads of several words are under way at once.
template <typename T, int kTogether>
__device__ __forceinline__ void copy_bytes(const uint8_t* from, uint8_t* to, int bytes, int thread) {
  constexpr int kAtOnce = 4;
  const int words = bytes / static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int first = thread; first < words; first += kTogether * kAtOnce) {
    T values[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * kTogether < words) values[j] = reinterpret_cast<const T*>(from)[first + j * kTogether];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (first + j * kTogether < words) reinterpret_cast<T*>(to)[first + j * kTogether] = values[j];
  }
}

// The block together, a row a warp: row r of every part is at from(part, r) and goes to to(part, r).
template <typename From, typename To>
__device__ __forceinline__ void copy_rows(const NodeExchangeArgs& args, int rows, From from, To to) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int p = 0; p < args.num_parts; ++p) {
    const NodePart& part = args.parts[p];
#pragma unroll 1
    for (int row = warp; row < rows; row += kNodeWarps) {
      const uint8_t* source = from(part, row);
      uint8_t* target = to(part, row);
      if (part.width % 16 == 0)
        copy_bytes<uint4, 32>(source, target, part.width, lane);
      else if (part.width % 4 == 0)
        copy_bytes<uint32_t, 32>(source, target, part.width, lane);
      else
        copy_bytes<uint8_t, 32>(source, target, part.width, lane);
    }
  }
}

// Row `row` of those that are sent.
__device__ __forceinline__ const uint8_t* sent_row(const NodeExchangeArgs& args, const NodePart& part, int64_t row) {
  return part.rows + (args.tokens == nullptr ? row : args.tokens[row]) * part.width;
}

// Where received rows go: those of a part behind each other, or all parts of a row to where they are staged.
struct Received {
  const NodeExchangeArgs& args;
  uint8_t* staged = nullptr;
  uint32_t dispatch = 0;  // that they are staged for

  __device__ explicit Received(const NodeExchangeArgs& args) : args(args) {
    if (args.staged_bytes == 0) return;
    staged = part<uint8_t>(args.comm, args.comm.rank, arrived_rows(args.comm));
    dispatch = this_dispatch(args.comm);
  }

  __device__ uint8_t* row(const NodePart& part, int64_t row) const {
    return staged == nullptr ? part.received + row * part.width : staged + row * args.staged_bytes + part.column;
  }

  // All threads of the block, which have stored a chunk of rows from `begin` on: if they are staged, tells the ranks of
  // the node. Pairs with FromNodes of dispatch.cu.
  __device__ void finish(int64_t begin) const {
    __syncthreads();
    const Communicator& comm = args.comm;
    if (staged == nullptr || threadIdx.x >= comm.shape.ranks) return;
    const int chunks = comm.shape.max_tokens / kChunkTokens;
    st_release_sys(part<uint32_t>(comm, threadIdx.x, comm.layout.arrivals) + comm.rank * chunks + begin / kChunkTokens,
                   dispatch);
  }
};

template <typename Transport>
__device__ void send_to_node(const NodeExchangeArgs& args, int node, int channel, uint64_t* done) {
  const int count = args.send_counts[node];
  uint64_t chunks = *done;
  for (int first = channel * kNodeChunkRows; first < count; first += args.channels * kNodeChunkRows, ++chunks) {
    const int rows = min(kNodeChunkRows, count - first), place = chunks % kNodeSlots;
    const uint64_t filled = chunks / kNodeSlots;
    const int64_t theirs = node_slot(args, args.node, channel, place), ours = node_slot(args, node, channel, place);
    if (!node_wait<Transport>(args, node, node_offset(args, NodeRegion::kCredits, ours), filled)) return;
    const int64_t staging = node_offset(args, NodeRegion::kStaging, ours);
    const int64_t begin = args.send_first[node] + first;
    wait_summed(args, begin, rows);
    copy_rows(
        args, rows, [&](const NodePart& part, int row) { return sent_row(args, part, begin + row); },
        [&](const NodePart& part, int row) {
          return node_memory<uint8_t>(args, args.node, staging + part.offset + static_cast<int64_t>(row) * part.width);
        });
    const NodePart& last = args.parts[args.num_parts - 1];
    __threadfence_system();  // what the network card reads was written by all threads
    __syncthreads();
    Transport::put(args, node, staging, node_offset(args, NodeRegion::kLanding, theirs),
                   last.offset + (rows * last.width + 15) / 16 * 16, node_offset(args, NodeRegion::kFlags, theirs),
                   filled + 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) *done = chunks;
}

template <typename Transport>
__device__ void receive_from_node(const NodeExchangeArgs& args, const Received& received, int node, int channel,
                                  uint64_t* done) {
  const int count = args.recv_counts[node];
  uint64_t chunks = *done;
  for (int first = channel * kNodeChunkRows; first < count; first += args.channels * kNodeChunkRows, ++chunks) {
    const int rows = min(kNodeChunkRows, count - first), place = chunks % kNodeSlots;
    const uint64_t filled = chunks / kNodeSlots;
    const int64_t ours = node_slot(args, node, channel, place), theirs = node_slot(args, args.node, channel, place);
    if (!node_wait<Transport>(args, node, node_offset(args, NodeRegion::kFlags, ours), filled + 1)) return;
    const int64_t landing = node_offset(args, NodeRegion::kLanding, ours);
    const int64_t begin = args.recv_first[node] + first;
    copy_rows(
        args, rows,
        [&](const NodePart& part, int row) {
          return node_memory<uint8_t>(args, args.node, landing + part.offset + static_cast<int64_t>(row) * part.width);
        },
        [&](const NodePart& part, int row) { return received.row(part, begin + row); });
    received.finish(begin);  // and all threads have read
    if (threadIdx.x == 0) Transport::signal(args, node, node_offset(args, NodeRegion::kCredits, theirs), filled + 1);
  }
  if (threadIdx.x == 0) *done = chunks;
}

// Block `block` of those that copy the rows to this rank's own node.
__device__ inline void copy_own(const NodeExchangeArgs& args, const Received& received, int block) {
  const int count = args.send_counts[args.node];
  const int64_t from = args.send_first[args.node], to = args.recv_first[args.node];
  for (int first = block * kNodeChunkRows; first < count; first += args.own_blocks * kNodeChunkRows) {
    copy_rows(
        args, min(kNodeChunkRows, count - first),
        [&](const NodePart& part, int row) { return sent_row(args, part, from + first + row); },
        [&](const NodePart& part, int row) { return received.row(part, to + first + row); });
    received.finish(to + first);
  }
}

// Block [other node][channel][direction], then those for this node. Two would fit a multiprocessor: the rest of it is
// for the kernels beside this one.
template <typename Transport>
__global__ void __launch_bounds__(kNodeThreads, 2) node_exchange_kernel(const __grid_constant__ NodeExchangeArgs args) {
  griddepcontrol_launch_dependents();  // dispatch, if these rows are for it
  const Received received(args);
  const int own = static_cast<int>(blockIdx.x) - (args.nodes - 1) * args.channels * 2;
  if (own >= 0) {
    copy_own(args, received, own);
  } else {
    const bool receives = blockIdx.x % 2 != 0;
    const int channel = blockIdx.x / 2 % args.channels, other = blockIdx.x / 2 / args.channels;
    const int node = other + (other >= args.node);
    uint64_t* done = reinterpret_cast<uint64_t*>(args.workspace + 1) +
                     (static_cast<int64_t>(receives) * args.nodes + node) * args.channels + channel;
    if (receives)
      receive_from_node<Transport>(args, received, node, channel, done);
    else
      send_to_node<Transport>(args, node, channel, done);
  }
  // Keeps the kernel from ending before the one ahead has. One block does it, so that those that are done make room.
  if (blockIdx.x == gridDim.x - 1) griddepcontrol_wait();
}

template <typename Transport>
const char* launch_node_exchange(const NodeExchangeArgs& args, cudaStream_t stream) {
  const int blocks = (args.nodes - 1) * args.channels * 2 + args.own_blocks;
  return launch("exchange between nodes", node_exchange_kernel<Transport>, args, blocks, kNodeThreads, 0,
                args.beside ? LaunchMode::kProgrammatic : LaunchMode::kCooperative, stream);
}

}  // namespace ep_moe
