// Activations of the experts with the routing weight inside: one pass forward, one backward.
//
// Forward reads x and writes out. Backward reads x and grad, recomputes the activation and writes grad_x, the
// activation where it is wanted again and, summed over each row, the gradient of its weight. The arithmetic is fp32,
// and every result is rounded once.
//
// The threads of a block form teams of one size, which depends on the width alone; a team works on one row at a time,
// its threads side by side in vectors of 16 bytes. So a row's sum always has the same order, whatever the number of
// rows. Rows go round the teams of the grid, and teams beyond the real rows, whose number only the device knows, end.
// The device alone may know the first row to work on, too. Packed rows have room for more in every expert; what is
// behind an expert's count is passed over.
#include "element.cuh"
#include "launch.cuh"
#include "pointwise.cuh"

namespace ep_moe {

struct ActivationArgs {
  const void* x;             // [rows][2 or 1][row_vectors]; of gated activations the gate lies before the linear half
  const void* grad;          // [rows][row_vectors]; backward only
  const float* row_weights;  // [rows], or nullptr for weights of 1
  void* out;                 // [rows][row_vectors]; backward: or nullptr, may be grad
  void* grad_x;              // as x; backward only, or nullptr
  float* grad_weights;       // [rows]; backward only, or nullptr
  const int32_t* num_rows;   // how many of the rows are real, or nullptr for all; with `room`: in each room
  const int32_t* start;      // which row is the first to work on, or nullptr for row 0; not with `room`
  int64_t rows;
  int32_t row_vectors;  // of an output row; vectors of 16 bytes
  int32_t element;      // Element of x, grad, out and grad_x
  int32_t activation;   // Activation
  int32_t room;         // if not 0: the real rows are the first of every `room` rows; forward only
};

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kResidentBlocks = 4;  // of an SM, for the compiler: enough bytes in flight, and 64 registers a thread
constexpr int kMaxBlocks = 2112;    // 16 on each of 132 SMs: uneven ends of blocks even out
constexpr int kWideRow = 512;       // vectors from which a whole block works on a row
constexpr int kForwardUnroll = 4;   // vectors of a row whose loads a thread has in flight
constexpr int kBackwardUnroll = 2;

__host__ __device__ inline int team_threads(int row_vectors) {
  if (row_vectors > kWideRow) return kThreads;
  int threads = 1;
  while (threads < 32 && threads < row_vectors) threads *= 2;
  return threads;
}

// The part of the work that is this thread's.
struct Share {
  int64_t rows;        // that are real
  int64_t first_row;   // of the block
  int64_t row_stride;  // rows that the grid works on at a time
  int team;            // threads on a row
  int lane;            // of the team
  int row;             // of the block's rows, the team's
};

__device__ __forceinline__ Share share_of(const ActivationArgs& args) {
  Share share;
  const bool all = args.num_rows == nullptr || args.room > 0;
  share.rows = all ? args.rows : min(args.rows, static_cast<int64_t>(*args.num_rows));
  share.team = team_threads(args.row_vectors);
  const int teams = kThreads / share.team;
  share.first_row = (args.start == nullptr ? 0 : *args.start) + static_cast<int64_t>(blockIdx.x) * teams;
  share.row_stride = static_cast<int64_t>(gridDim.x) * teams;
  share.lane = threadIdx.x % share.team;
  share.row = threadIdx.x / share.team;
  return share;
}

// Whether a row of packed rooms is real.
__device__ __forceinline__ bool in_use(const ActivationArgs& args, int64_t row) {
  return args.room == 0 || row % args.room < args.num_rows[row / args.room];
}

__device__ __forceinline__ float weight_of(const ActivationArgs& args, int64_t row) {
  return args.row_weights == nullptr ? 1.0f : args.row_weights[row];
}

template <typename T, typename Function, bool gated>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    forward_kernel(const __grid_constant__ ActivationArgs args) {
  constexpr int kCount = Vector<T>::kCount;
  const Share share = share_of(args);
  const int vectors = args.row_vectors;
  for (int64_t row = share.first_row + share.row; row < share.rows; row += share.row_stride) {
    if (!in_use(args, row)) continue;
    const Vector<T>* gate = static_cast<const Vector<T>*>(args.x) + row * vectors * (gated ? 2 : 1);
    const Vector<T>* up = gate + vectors;
    Vector<T>* out = static_cast<Vector<T>*>(args.out) + row * vectors;
    const float weight = weight_of(args, row);
    for (int first = share.lane; first < vectors; first += kForwardUnroll * share.team) {
      Vector<T> gates[kForwardUnroll], ups[kForwardUnroll];
#pragma unroll
      for (int j = 0; j < kForwardUnroll; ++j) {
        const int i = first + j * share.team;
        if (i >= vectors) break;
        gates[j] = gate[i];
        if constexpr (gated) ups[j] = up[i];
      }
#pragma unroll
      for (int j = 0; j < kForwardUnroll; ++j) {
        const int i = first + j * share.team;
        if (i >= vectors) break;
        float values[kCount], linear[kCount];
        gates[j].to_float(values);
        if constexpr (gated) ups[j].to_float(linear);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          values[k] = activated<Function, gated>(values[k], gated ? linear[k] : 0.0f, weight);
        }
        Vector<T> result;
        result.from_float(values);
        out[i] = result;
      }
    }
  }
}

// The sum over a team, for its first thread. All threads of the block call it; `turn` alternates from call to call, so
// that one barrier a call is enough: a slot is written again only after the barrier that follows its reading.
__device__ __forceinline__ float team_sum(float value, int team, int turn) {
  __shared__ float warp_sums[2][kWarps];
  for (int distance = min(team, 32) / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  if (team <= 32) return value;
  if (threadIdx.x % 32 == 0) warp_sums[turn][threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value += warp_sums[turn][warp];
  }
  return value;
}

template <typename T, typename Function, bool gated>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    backward_kernel(const __grid_constant__ ActivationArgs args) {
  constexpr int kCount = Vector<T>::kCount;
  const Share share = share_of(args);
  const int vectors = args.row_vectors;
  int turn = 0;
  // By the block's first row: teams without a row go along, because team_sum takes all threads.
  for (int64_t first_row = share.first_row; first_row < share.rows; first_row += share.row_stride) {
    const int64_t row = first_row + share.row;
    const bool real = row < share.rows;
    const Vector<T>* gate = static_cast<const Vector<T>*>(args.x) + row * vectors * (gated ? 2 : 1);
    const Vector<T>* up = gate + vectors;
    const Vector<T>* grad = static_cast<const Vector<T>*>(args.grad) + row * vectors;
    Vector<T>* out = static_cast<Vector<T>*>(args.out) + row * vectors;
    Vector<T>* grad_gate = static_cast<Vector<T>*>(args.grad_x) + row * vectors * (gated ? 2 : 1);
    Vector<T>* grad_up = grad_gate + vectors;
    const float weight = real ? weight_of(args, row) : 0.0f;
    float sum = 0.0f;
    for (int first = real ? share.lane : vectors; first < vectors; first += kBackwardUnroll * share.team) {
      Vector<T> gates[kBackwardUnroll], ups[kBackwardUnroll], grads[kBackwardUnroll];
#pragma unroll
      for (int j = 0; j < kBackwardUnroll; ++j) {
        const int i = first + j * share.team;
        if (i >= vectors) break;
        gates[j] = gate[i];
        if constexpr (gated) ups[j] = up[i];
        grads[j] = grad[i];
      }
#pragma unroll
      for (int j = 0; j < kBackwardUnroll; ++j) {
        const int i = first + j * share.team;
        if (i >= vectors) break;
        float from_gate[kCount], from_up[kCount], incoming[kCount];
        gates[j].to_float(from_gate);
        if constexpr (gated) ups[j].to_float(from_up);
        grads[j].to_float(incoming);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          float none = 0.0f;
          incoming[k] =
              activation_gradients<Function, gated>(incoming[k], weight, from_gate[k], gated ? from_up[k] : none, sum);
        }
        Vector<T> result;
        if (args.out != nullptr) {
          result.from_float(incoming);
          out[i] = result;
        }
        if (args.grad_x == nullptr) continue;
        result.from_float(from_gate);
        grad_gate[i] = result;
        if constexpr (gated) {
          result.from_float(from_up);
          grad_up[i] = result;
        }
      }
    }
    if (args.grad_weights == nullptr) continue;
    sum = team_sum(sum, share.team, turn);
    turn ^= 1;
    if (real && share.lane == 0) args.grad_weights[row] = sum;
  }
}

using Kernel = void (*)(ActivationArgs);

template <typename T, typename Function, bool gated>
Kernel kernel_of(bool backward) {
  return backward ? backward_kernel<T, Function, gated> : forward_kernel<T, Function, gated>;
}

template <typename T>
Kernel find_kernel(Activation activation, bool backward) {
  switch (activation) {
    case Activation::kSwiglu:
      return kernel_of<T, Silu, true>(backward);
    case Activation::kGeglu:
      return kernel_of<T, Gelu, true>(backward);
    case Activation::kGelu:
      return kernel_of<T, Gelu, false>(backward);
    case Activation::kRelu:
      return kernel_of<T, Relu, false>(backward);
    case Activation::kSquaredRelu:
      return kernel_of<T, SquaredRelu, false>(backward);
  }
  return nullptr;
}

Kernel find_kernel(const ActivationArgs& args, bool backward) {
  const auto activation = static_cast<Activation>(args.activation);
  return kernel_of_element(args.element, find_kernel<float>(activation, backward),
                           find_kernel<__nv_bfloat16>(activation, backward), find_kernel<__half>(activation, backward));
}

const char* launch_over_rows(const char* what, const ActivationArgs& args, bool backward, cudaStream_t stream) {
  if (args.rows == 0 || args.row_vectors == 0) return nullptr;
  const int64_t teams = kThreads / team_threads(args.row_vectors);
  const int64_t wanted = (args.rows + teams - 1) / teams;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return launch(what, find_kernel(args, backward), args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
}

}  // namespace
}  // namespace ep_moe

// Writes `out`. Pointers to vectors are multiples of 16.
EP_MOE_API const char* ep_moe_activation_forward(const ep_moe::ActivationArgs* args, cudaStream_t stream) {
  return ep_moe::launch_over_rows("activation kernel", *args, false, stream);
}

// Writes `grad_x`, `grad_weights` and `out`, those that are given.
EP_MOE_API const char* ep_moe_activation_backward(const ep_moe::ActivationArgs* args, cudaStream_t stream) {
  return ep_moe::launch_over_rows("activation backward kernel", *args, true, stream);
}

EP_MOE_API size_t ep_moe_activation_args_bytes() { return sizeof(ep_moe::ActivationArgs); }
