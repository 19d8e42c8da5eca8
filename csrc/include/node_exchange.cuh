// The hop between nodes: rows to and from the GPUs in this one's place on other nodes, by put-and-signal.
//
// A channel is a pair of blocks, one on the sending and one on the receiving GPU, with a ring of kNodeSlots slots of
// kNodeChunkRows rows. The sender gathers a chunk into its staging slot and puts it, with a flag behind it, into the
// landing slot of the receiver; the receiver copies it out and puts back a credit. A credit says that the landing slot
// was read, hence that the put has read the staging slot: both may be filled again. Flags and credits are the number of
// times the slot was filled, and only grow. How many chunks travel is known to both sides before the launch.
//
// What a put is, the template argument says:
//   put(args, node, from, to, bytes, flag, value)  block; bytes at offset `from` of this rank's memory go to offset
//   `to`
//                                                  of the node's, then 8 bytes `value` to offset `flag`
//   signal(args, node, flag, value)                one thread; 8 bytes, behind what this thread has read
//   fetch(word)                                    one thread; this rank's 8 bytes, before what this thread reads next
#pragma once

#include "fault.cuh"
#include "launch.cuh"
#include "ptx.cuh"

namespace ep_moe {

constexpr int kMaxNodes = 32;
constexpr int kNodeParts = 4;
constexpr int kNodeSlots = 2;
constexpr int kNodeChunkRows = 32;
constexpr int kNodeThreads = 512;

// One of the tensors whose rows travel together.
struct NodePart {
  const uint8_t* rows;  // [rows][width]
  uint8_t* received;    // [received][width]
  int32_t width;        // bytes of a row
  int32_t offset;       // in a slot, a multiple of 16: kNodeChunkRows rows of this part
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
  int32_t send_first[kMaxNodes];   // row behind those to earlier nodes
  int32_t send_counts[kMaxNodes];  // rows to every node; those to the own one do not travel
  int32_t recv_first[kMaxNodes];   // likewise, received
  int32_t recv_counts[kMaxNodes];
  const int64_t* tokens;  // [sent], the row to send, or null for the rows in their order
  NodeWorkspace* workspace;
  FaultReport* report;
  int64_t slot_bytes;  // a multiple of 16
  uint64_t timeout_ns;
  int32_t node;
  int32_t nodes;
  int32_t num_parts;
  int32_t channels;  // of each pair of nodes and direction
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

// Copies `rows` rows of `width` bytes by words T, the block together; row r is at from(r) and goes to to(r).
template <typename T, typename From, typename To>
__device__ __forceinline__ void copy_rows(int rows, int width, From from, To to) {
  const int words = width / static_cast<int>(sizeof(T));
  for (int i = threadIdx.x; i < rows * words; i += blockDim.x) {
    const int row = i / words, word = i % words;
    reinterpret_cast<T*>(to(row))[word] = reinterpret_cast<const T*>(from(row))[word];
  }
}

template <typename From, typename To>
__device__ __forceinline__ void copy_rows_of_width(int rows, int width, From from, To to) {
  if (width % 16 == 0)
    copy_rows<uint4>(rows, width, from, to);
  else if (width % 4 == 0)
    copy_rows<uint32_t>(rows, width, from, to);
  else
    copy_rows<uint8_t>(rows, width, from, to);
}

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
    int bytes = 0;
    for (int p = 0; p < args.num_parts; ++p) {
      const NodePart& part = args.parts[p];
      uint8_t* slot = node_memory<uint8_t>(args, args.node, staging + part.offset);
      copy_rows_of_width(
          rows, part.width,
          [&](int row) {
            return part.rows + (args.tokens == nullptr ? begin + row : args.tokens[begin + row]) * part.width;
          },
          [&](int row) { return slot + static_cast<int64_t>(row) * part.width; });
      bytes = part.offset + (rows * part.width + 15) / 16 * 16;
    }
    __threadfence_system();  // what the network card reads was written by all threads
    __syncthreads();
    Transport::put(args, node, staging, node_offset(args, NodeRegion::kLanding, theirs), bytes,
                   node_offset(args, NodeRegion::kFlags, theirs), filled + 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) *done = chunks;
}

template <typename Transport>
__device__ void receive_from_node(const NodeExchangeArgs& args, int node, int channel, uint64_t* done) {
  const int count = args.recv_counts[node];
  uint64_t chunks = *done;
  for (int first = channel * kNodeChunkRows; first < count; first += args.channels * kNodeChunkRows, ++chunks) {
    const int rows = min(kNodeChunkRows, count - first), place = chunks % kNodeSlots;
    const uint64_t filled = chunks / kNodeSlots;
    const int64_t ours = node_slot(args, node, channel, place), theirs = node_slot(args, args.node, channel, place);
    if (!node_wait<Transport>(args, node, node_offset(args, NodeRegion::kFlags, ours), filled + 1)) return;
    const int64_t landing = node_offset(args, NodeRegion::kLanding, ours);
    const int64_t begin = args.recv_first[node] + first;
    for (int p = 0; p < args.num_parts; ++p) {
      const NodePart& part = args.parts[p];
      const uint8_t* slot = node_memory<uint8_t>(args, args.node, landing + part.offset);
      copy_rows_of_width(
          rows, part.width, [&](int row) { return slot + static_cast<int64_t>(row) * part.width; },
          [&](int row) { return part.received + (begin + row) * part.width; });
    }
    __syncthreads();  // all threads have read
    if (threadIdx.x == 0) Transport::signal(args, node, node_offset(args, NodeRegion::kCredits, theirs), filled + 1);
  }
  if (threadIdx.x == 0) *done = chunks;
}

// Block [other node][channel][direction]; all must be resident, for senders wait for receivers of other GPUs.
template <typename Transport>
__global__ void __launch_bounds__(kNodeThreads) node_exchange_kernel(const __grid_constant__ NodeExchangeArgs args) {
  const bool receives = blockIdx.x % 2 != 0;
  const int channel = blockIdx.x / 2 % args.channels, other = blockIdx.x / 2 / args.channels;
  const int node = other + (other >= args.node);
  uint64_t* done = reinterpret_cast<uint64_t*>(args.workspace + 1) +
                   (static_cast<int64_t>(receives) * args.nodes + node) * args.channels + channel;
  if (receives)
    receive_from_node<Transport>(args, node, channel, done);
  else
    send_to_node<Transport>(args, node, channel, done);
}

template <typename Transport>
const char* launch_node_exchange(const NodeExchangeArgs& args, cudaStream_t stream) {
  const int blocks = (args.nodes - 1) * args.channels * 2;
  return launch("exchange between nodes", node_exchange_kernel<Transport>, args, blocks, kNodeThreads, 0,
                LaunchMode::kCooperative, stream);
}

}  // namespace ep_moe
