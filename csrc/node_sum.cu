// The sum over nodes at a token's source: one row from every node that had an expert of it, in ascending order of
// nodes, added in fp32 and rounded once. Tokens that went nowhere get zeros.
//
// What moves: every returned row once, by ordinary 16-byte loads, and the result. A thread adds 16 bytes of a token; no
// two threads share anything.
#include <algorithm>

#include "buffer.cuh"
#include "element.cuh"
#include "launch.cuh"

namespace ep_moe {

struct NodeSumArgs {
  const uint8_t* rows[kMaxNodes];  // of each node, [returned][row_bytes]
  const int32_t* places;           // [nodes][tokens]: the token's row among those of the node, or -1
  uint8_t* out;                    // [tokens][row_bytes]
  int32_t row_bytes;               // a multiple of 16
  int32_t element;                 // Element of the rows
  int32_t tokens;
  int32_t nodes;
};

namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) node_sum_kernel(const __grid_constant__ NodeSumArgs args) {
  const int vectors = args.row_bytes / 16;
  const int64_t count = static_cast<int64_t>(args.tokens) * vectors;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    const int64_t token = i / vectors, vector = i - token * vectors;
    float total[Vector<T>::kCount] = {};
#pragma unroll 2
    for (int node = 0; node < args.nodes; ++node) {
      const int64_t place = args.places[node * static_cast<int64_t>(args.tokens) + token];
      if (place < 0) continue;
      float values[Vector<T>::kCount];
      reinterpret_cast<const Vector<T>*>(args.rows[node])[place * vectors + vector].to_float(values);
#pragma unroll
      for (int j = 0; j < Vector<T>::kCount; ++j) total[j] += values[j];
    }
    reinterpret_cast<Vector<T>*>(args.out)[i].from_float(total);
  }
}

}  // namespace
}  // namespace ep_moe

// Runs the kernel above.
EP_MOE_API const char* ep_moe_node_sum(const ep_moe::NodeSumArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error_text(error, "sum over nodes");
  const auto kernel =
      kernel_of_element(args->element, node_sum_kernel<float>, node_sum_kernel<__nv_bfloat16>, node_sum_kernel<__half>);
  const int64_t vectors = static_cast<int64_t>(args->tokens) * (args->row_bytes / 16);
  const int64_t blocks = std::clamp<int64_t>((vectors + kThreads - 1) / kThreads, 1, kBlocksPerSm * multiprocessors);
  return launch("sum over nodes", kernel, *args, static_cast<int>(blocks), kThreads, 0, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_node_sum_args_bytes() { return sizeof(ep_moe::NodeSumArgs); }
