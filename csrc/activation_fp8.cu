// Activations of the experts that leave in e4m3 with a scale for each 128 elements of a row, as the FP8 GEMM reads
// them.
//
// Forward reads x and writes the quantised activations: they are never there in bf16. Backward reads x and grad and
// writes the gradient of x twice, in bf16 for the gradient of the weights and quantised for that of the rows, with the
// gradients of the rows' weights and, for who has not kept them, the activations in bf16. Everything is rounded to bf16
// before it is quantised, so results have the bits of activation.cu with quantize.cu behind it; that costs nothing,
// and keeps what the GEMM reads and what the gradient of the weights reads the same numbers.
//
// 16 lanes have 128 elements of a row, eight each. Forward takes four rows in turn, so that all loads are in flight at
// once and a block column's scales, which lie side by side for neighbouring rows, go out together. Backward gives a
// warp to a row, whose weight's gradient it sums in the order of activation.cu (of widths up to 4096, where that one
// gives a warp to a row too).
#include "element.cuh"
#include "fp8.cuh"
#include "launch.cuh"
#include "pointwise.cuh"
#include "real_rows.cuh"

namespace ep_moe {

struct ActivationFp8Args {
  const void* x;             // bf16 [rows][2 or 1][width]; of gated activations the gate lies before the linear half
  const void* grad;          // bf16 [rows][width]; backward only
  const float* row_weights;  // [rows], or nullptr for weights of 1
  void* values;              // e4m3: forward [rows][width], backward as x
  float* scales;             // [width of values / 128][scale_stride], by row
  void* grad_x;              // bf16 as x; backward only
  void* activated;           // bf16 [rows][width]; backward only, or nullptr
  float* grad_weights;       // [rows]; backward only, or nullptr
  RealRows real;             // packed ones forward only
  int64_t scale_stride;
  int32_t width;       // a multiple of 128
  int32_t activation;  // Activation
};

namespace {

using Eight = Vector<__nv_bfloat16>;

constexpr int kThreads = 256;
constexpr int kLanes = 16;      // on 128 elements, eight each
constexpr int kRowsAtOnce = 4;  // of a lane, forward
constexpr int kChunk = 256;     // elements of a row that a warp has at a time, backward
constexpr int kChunksAtOnce = 2;
constexpr int kResidentBlocks = 3;  // of an SM, for the compiler: 85 registers a thread
constexpr int kMaxBlocks = 2112;    // 16 on each of 132 SMs: uneven ends of blocks even out

__device__ __forceinline__ float weight_of(const ActivationFp8Args& args, int64_t row) {
  return args.row_weights == nullptr ? 1.0f : args.row_weights[row];
}

// Rounds to bf16 what is to be quantised.
__device__ __forceinline__ Eight rounded(float (&values)[8]) {
  Eight result;
  result.from_float(values);
  result.to_float(values);
  return result;
}

// The scale of the 128 elements of which this lane has eight.
__device__ __forceinline__ BlockScale scale_of_lanes(const float (&values)[8]) {
  float amax = amax_of(values);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    amax = max_nan(amax, __shfl_xor_sync(~0u, amax, distance));
  return BlockScale::of(amax);
}

template <typename Function, bool gated>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    forward_kernel(const __grid_constant__ ActivationFp8Args args) {
  const int64_t rows = args.real.end();
  const int blocks = args.width / kScaleBlock, lane = threadIdx.x % kLanes;
  const int64_t items = (rows + kRowsAtOnce - 1) / kRowsAtOnce * blocks;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  // By the warp's first item: lanes without one go along, because the shuffles take all.
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32 * (32 / kLanes); first < items;
       first += stride) {
    const int64_t item = first + threadIdx.x % 32 / kLanes;
    const int64_t row = item / blocks * kRowsAtOnce;
    const int block = static_cast<int>(item % blocks);
    const int count = item < items ? static_cast<int>(min(rows - row, static_cast<int64_t>(kRowsAtOnce))) : 0;
    const int column = block * kScaleBlock + lane * 8;
    Eight gates[kRowsAtOnce], ups[kRowsAtOnce];
    float weights[kRowsAtOnce];
    bool real[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      real[i] = i < count && args.real.contain(row + i);
      if (!real[i]) continue;
      const __nv_bfloat16* gate =
          static_cast<const __nv_bfloat16*>(args.x) + (row + i) * args.width * (gated ? 2 : 1) + column;
      gates[i] = *reinterpret_cast<const Eight*>(gate);
      if constexpr (gated) ups[i] = *reinterpret_cast<const Eight*>(gate + args.width);
      weights[i] = weight_of(args, row + i);
    }
    float my_scale = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      float values[8] = {}, linear[8] = {};
      if (real[i]) {
        gates[i].to_float(values);
        if constexpr (gated) ups[i].to_float(linear);
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] = activated<Function, gated>(values[k], linear[k], weights[i]);
        rounded(values);
      }
      const BlockScale scale = scale_of_lanes(values);
      if (lane == i) my_scale = scale.scale;
      if (real[i]) {
        uint8_t* out = static_cast<uint8_t*>(args.values) + (row + i) * args.width + column;
        *reinterpret_cast<uint2*>(out) = pack_e4m3(values, scale.factor);
      }
    }
    if (lane < count) args.scales[block * args.scale_stride + row + lane] = my_scale;
  }
}

// Writes eight gradients of a row both ways, `column` elements from its start. All lanes of a warp call it.
__device__ __forceinline__ void store_gradients(const ActivationFp8Args& args, int64_t row, int64_t row_width,
                                                int column, float (&values)[8], bool real) {
  const Eight in_bf16 = rounded(values);
  const BlockScale scale = scale_of_lanes(values);
  if (!real) return;
  const int64_t offset = row * row_width + column;
  *reinterpret_cast<Eight*>(static_cast<__nv_bfloat16*>(args.grad_x) + offset) = in_bf16;
  *reinterpret_cast<uint2*>(static_cast<uint8_t*>(args.values) + offset) = pack_e4m3(values, scale.factor);
  if (threadIdx.x % kLanes == 0) args.scales[column / kScaleBlock * args.scale_stride + row] = scale.scale;
}

template <typename Function, bool gated>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_kernel(const __grid_constant__ ActivationFp8Args args) {
  const int64_t rows = args.real.end();
  const int64_t row_width = static_cast<int64_t>(args.width) * (gated ? 2 : 1);
  const int lane = threadIdx.x % 32;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < rows; row += stride) {
    const __nv_bfloat16* gate = static_cast<const __nv_bfloat16*>(args.x) + row * row_width;
    const __nv_bfloat16* grad = static_cast<const __nv_bfloat16*>(args.grad) + row * args.width;
    const float weight = weight_of(args, row);
    float sum = 0.0f;
    for (int first = 0; first < args.width; first += kChunksAtOnce * kChunk) {
      Eight gates[kChunksAtOnce], ups[kChunksAtOnce], grads[kChunksAtOnce];
#pragma unroll
      for (int j = 0; j < kChunksAtOnce; ++j) {
        const int column = first + j * kChunk + lane * 8;
        if (column >= args.width) break;
        gates[j] = *reinterpret_cast<const Eight*>(gate + column);
        if constexpr (gated) ups[j] = *reinterpret_cast<const Eight*>(gate + args.width + column);
        grads[j] = *reinterpret_cast<const Eight*>(grad + column);
      }
#pragma unroll
      for (int j = 0; j < kChunksAtOnce; ++j) {
        if (first + j * kChunk >= args.width) break;
        // A row of an odd number of blocks leaves half a warp without elements, which goes along for the shuffles.
        const int column = first + j * kChunk + lane * 8;
        const bool real = column < args.width;
        float from_gate[8] = {}, from_up[8] = {}, incoming[8] = {}, results[8] = {};
        if (real) {
          gates[j].to_float(from_gate);
          if constexpr (gated) ups[j].to_float(from_up);
          grads[j].to_float(incoming);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            results[k] = activation_gradients<Function, gated>(incoming[k], weight, from_gate[k], from_up[k], sum);
          }
          if (args.activated != nullptr) {
            *reinterpret_cast<Eight*>(static_cast<__nv_bfloat16*>(args.activated) + row * args.width + column) =
                rounded(results);
          }
        }
        store_gradients(args, row, row_width, column, from_gate, real);
        if constexpr (gated) store_gradients(args, row, row_width, args.width + column, from_up, real);
      }
    }
    if (args.grad_weights == nullptr) continue;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) args.grad_weights[row] = sum;
  }
}

using Kernel = void (*)(ActivationFp8Args);

template <typename Function, bool gated>
Kernel kernel_of(bool backward) {
  return backward ? backward_kernel<Function, gated> : forward_kernel<Function, gated>;
}

Kernel find_kernel(int32_t activation, bool backward) {
  switch (static_cast<Activation>(activation)) {
    case Activation::kSwiglu:
      return kernel_of<Silu, true>(backward);
    case Activation::kGeglu:
      return kernel_of<Gelu, true>(backward);
    case Activation::kGelu:
      return kernel_of<Gelu, false>(backward);
    case Activation::kRelu:
      return kernel_of<Relu, false>(backward);
    case Activation::kSquaredRelu:
      return kernel_of<SquaredRelu, false>(backward);
  }
  return nullptr;
}

const char* launch_over_rows(const char* what, const ActivationFp8Args& args, bool backward, cudaStream_t stream) {
  if (args.real.rows == 0 || args.width == 0) return nullptr;
  if (args.width % kScaleBlock != 0 || (backward && args.real.room > 0)) return error_text(cudaErrorInvalidValue, what);
  const int64_t threads = backward
                              ? args.real.rows * 32
                              : (args.real.rows + kRowsAtOnce - 1) / kRowsAtOnce * (args.width / kScaleBlock) * kLanes;
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return launch(what, find_kernel(args.activation, backward), args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
}

}  // namespace
}  // namespace ep_moe

// Both leave rows that are not real alone. Pointers to rows are multiples of 16.
EP_MOE_API const char* ep_moe_activation_fp8_forward(const ep_moe::ActivationFp8Args* args, cudaStream_t stream) {
  return ep_moe::launch_over_rows("FP8 activation kernel", *args, false, stream);
}

EP_MOE_API const char* ep_moe_activation_fp8_backward(const ep_moe::ActivationFp8Args* args, cudaStream_t stream) {
  return ep_moe::launch_over_rows("FP8 activation backward kernel", *args, true, stream);
}

EP_MOE_API size_t ep_moe_activation_fp8_args_bytes() { return sizeof(ep_moe::ActivationFp8Args); }
