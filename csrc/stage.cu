// Staging: a rank's tokens into its own symmetric buffer, where peers will pull them; as they are, with their scales
// behind the values if they have any, or quantised to e4m3 with one fp32 scale per 128 channels behind the values.
//
// It may run beside the layout kernel ahead of it, which waits for peers while this one waits for memory: nothing of
// either is the other's.
//
//   writer                     reader                         ordered by
//   rows[d % 2] (own buffer)   peers, dispatch d              end of this kernel, then announce_round of that dispatch
//   (reuse of the copy)        peers, dispatch d - 2          rule (1) of communicator.cuh: this kernel runs after
//                                                             dispatch d - 1 on the same stream
//   the results of the layout  the kernel behind this one     griddepcontrol_wait of one block here
#include <cuda_fp8.h>

#include <algorithm>

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
  int32_t early;     // the kernel ahead is the layout, which need not have ended
};

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;  // channels a thread quantises: 8 threads a block of 128
constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

// Keeps the kernel from ending before the one ahead has. One block does it, so that those that are done make room.
__device__ __forceinline__ void end_after_layout() {
  if (blockIdx.x == gridDim.x - 1) griddepcontrol_wait();
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ StageArgs args) {
  uint8_t* rows = part<uint8_t>(args.comm, args.comm.rank, staged_rows(args.comm));
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
  end_after_layout();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 6) quantize_kernel(const __grid_constant__ StageArgs args) {
  constexpr int kVectors = kPerThread / Vector<T>::kCount;
  uint8_t* rows = part<uint8_t>(args.comm, args.comm.rank, staged_rows(args.comm));
  const uint32_t pieces = args.hidden / kPerThread;  // of a row; a multiple of 8, so blocks do not straddle warps
  const uint32_t total = args.tokens * pieces;       // 2^32 would be 128 GB
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < total; i += gridDim.x * kThreads) {
    const int64_t token = i / pieces;
    const uint32_t piece = i % pieces;
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
  end_after_layout();
}

}  // namespace
}  // namespace ep_moe

// Runs one of the kernels above. To quantise, `hidden` is a multiple of 128.
EP_MOE_API const char* ep_moe_stage(const ep_moe::StageArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  if (args->tokens == 0) return nullptr;
  const int64_t work = args->quantize ? static_cast<int64_t>(args->tokens) * args->hidden / kPerThread
                                      : args->tokens * args->wire_bytes / 64;
  // A thread has one turn: blocks come and go, so that none waits for a second wave, and the layout finds SMs to end
  // on.
  const int64_t wanted = (work + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, INT32_MAX / kThreads));
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
  const LaunchMode mode = args->early ? LaunchMode::kProgrammatic : LaunchMode::kPlain;
  return launch("staging kernel", kernel, *args, blocks, kThreads, 0, mode, stream);
}

EP_MOE_API size_t ep_moe_stage_args_bytes() { return sizeof(ep_moe::StageArgs); }
