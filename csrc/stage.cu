// Staging: a rank's tokens into its own symmetric buffer, where peers will pull them; as they are, with their scales
// behind the values if they have any, or quantised to e4m3 with one fp32 scale per 128 channels behind the values.
//
//   writer                     reader                         ordered by
//   rows[e % 2] (own buffer)   peers, dispatch round e        end of this kernel, then announce_round of round e
//   (reuse of the copy)        peers, dispatch round e - 2    rule (1) of communicator.cuh: this kernel runs after
//                                                             round e - 1 on the same stream
#include <cuda_fp8.h>

#include "communicator.cuh"
#include "element.cuh"
#include "launch.cuh"

namespace ep_moe {

struct StageArgs {
  Communicator comm;
  const void* x;        // [tokens][hidden], or [tokens][row_bytes] where rows travel as they are
  const float* scales;  // [tokens][row_scales], of rows that are quantised already; or nullptr
  int64_t wire_bytes;   // from row to row in the symmetric buffer; a multiple of 16
  int32_t row_bytes;    // of a row as it travels, without scales; a multiple of 16
  int32_t row_scales;
  int32_t tokens;
  int32_t hidden;
  int32_t element;   // Element of x, if it is to be quantised
  int32_t quantize;  // to e4m3
};

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;  // channels a thread quantises: 8 threads a block of 128
constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

__device__ __forceinline__ uint8_t* staged_rows(const StageArgs& args) {
  const Communicator& comm = args.comm;
  const int copy = begin_round(comm) % 2;  // of the dispatch that follows
  return part<uint8_t>(comm, comm.rank, comm.layout.rows) + copy * comm.shape.max_tokens * comm.shape.max_row_bytes;
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ StageArgs args) {
  uint8_t* rows = staged_rows(args);
  const uint4* x = static_cast<const uint4*>(args.x);
  const uint32_t row_vectors = args.row_bytes / 16;
  const int64_t vectors = static_cast<int64_t>(args.tokens) * row_vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < vectors; i += 4 * step) {
    uint4 values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j * step < vectors) values[j] = x[i + j * step];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * step >= vectors) break;
      const uint32_t vector = i + j * step;  // 2^32 would be 64 GB
      reinterpret_cast<uint4*>(rows + vector / row_vectors * args.wire_bytes)[vector % row_vectors] = values[j];
    }
  }
  for (int64_t i = first; i < static_cast<int64_t>(args.tokens) * args.row_scales; i += step) {
    float* scales = reinterpret_cast<float*>(rows + i / args.row_scales * args.wire_bytes + args.row_bytes);
    scales[i % args.row_scales] = args.scales[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ StageArgs args) {
  constexpr int kVectors = kPerThread / Vector<T>::kCount;
  uint8_t* rows = staged_rows(args);
  const int pieces = args.hidden / kPerThread;  // of a row; a multiple of 8, so blocks do not straddle warps
  const int64_t total = static_cast<int64_t>(args.tokens) * pieces;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t token = i / pieces;
    const int piece = i % pieces;
    const Vector<T>* source =
        reinterpret_cast<const Vector<T>*>(static_cast<const T*>(args.x) + token * args.hidden + piece * kPerThread);
    float values[kPerThread];
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      source[j].to_float(reinterpret_cast<float (&)[Vector<T>::kCount]>(values[j * Vector<T>::kCount]));
    float amax = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) amax = max_nan(amax, fabsf(values[j]));
    const uint32_t lanes = 0xffu << (threadIdx.x % 32 / 8 * 8);  // the threads of this block of channels
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) amax = max_nan(amax, __shfl_xor_sync(lanes, amax, distance));
    amax = max_nan(amax, kMinAmax);
    const float factor = kE4m3Max / amax;
    __align__(16) __nv_fp8x2_storage_t quantised[kPerThread / 2];
#pragma unroll
    for (int j = 0; j < kPerThread / 2; ++j) {
      const float2 pair = make_float2(values[2 * j] * factor, values[2 * j + 1] * factor);
      quantised[j] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    uint8_t* row = rows + token * args.wire_bytes;
    *reinterpret_cast<uint4*>(row + piece * kPerThread) = *reinterpret_cast<const uint4*>(quantised);
    if (piece % 8 == 0) reinterpret_cast<float*>(row + args.hidden)[piece / 8] = amax / kE4m3Max;
  }
}

}  // namespace
}  // namespace ep_moe

// Runs one of the kernels above. To quantise, `hidden` is a multiple of 128.
EP_MOE_API const char* ep_moe_stage(const ep_moe::StageArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  if (args->tokens == 0) return nullptr;
  const int64_t work = args->quantize ? static_cast<int64_t>(args->tokens) * args->hidden / kPerThread
                                      : args->tokens * args->wire_bytes / 64;
  const int64_t wanted = (work + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < 1056 ? (wanted < 1 ? 1 : wanted) : 1056);  // 8 on each of 132 SMs
  void (*kernel)(StageArgs) = copy_kernel;
  if (args->quantize) {
    switch (static_cast<Element>(args->element)) {
      case Element::kFloat32:
        kernel = quantize_kernel<float>;
        break;
      case Element::kBFloat16:
        kernel = quantize_kernel<__nv_bfloat16>;
        break;
      case Element::kFloat16:
        kernel = quantize_kernel<__half>;
        break;
    }
  }
  return launch("staging kernel", kernel, *args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_stage_args_bytes() { return sizeof(ep_moe::StageArgs); }
