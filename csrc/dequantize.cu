// Rows in e4m3 with a scale for each 128 elements, back to an ordinary dtype: one pass, each result rounded once.
//
// A thread takes eight elements, so 16 of them share a scale; threads go along the rows, and rows round the grid.
#include "element.cuh"
#include "fp8.cuh"
#include "launch.cuh"

namespace ep_moe {

struct DequantizeRowsArgs {
  const void* values;       // e4m3 [rows][width]
  const float* scales;      // of row r and block b of 128 elements: [r * row_stride + b * block_stride]
  void* out;                // [rows][width]
  const int32_t* num_rows;  // how many of the rows are real, or nullptr for all
  int64_t rows;
  int64_t row_stride;
  int64_t block_stride;
  int32_t width;    // a multiple of 128
  int32_t element;  // Element of out
};

namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 2112;
constexpr int kOfThread = 8;  // elements
constexpr int kAtOnce = 4;    // such parts whose loads a thread has in flight

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_rows_kernel(const __grid_constant__ DequantizeRowsArgs args) {
  constexpr int kVectors = kOfThread / Vector<T>::kCount;
  const int64_t rows = args.num_rows == nullptr ? args.rows : min(args.rows, static_cast<int64_t>(*args.num_rows));
  const int64_t row_parts = args.width / kOfThread, parts = rows * row_parts;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; first < parts;
       first += kAtOnce * threads) {
    uint2 loaded[kAtOnce];
    float scales[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t part = first + i * threads;
      if (part >= parts) break;
      loaded[i] = static_cast<const uint2*>(args.values)[part];
      const int64_t row = part / row_parts, block = part % row_parts / (kScaleBlock / kOfThread);
      scales[i] = args.scales[row * args.row_stride + block * args.block_stride];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t part = first + i * threads;
      if (part >= parts) break;
      const __nv_fp8_e4m3* values = reinterpret_cast<const __nv_fp8_e4m3*>(&loaded[i]);
      Vector<T>* out = static_cast<Vector<T>*>(args.out) + part * kVectors;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        float results[Vector<T>::kCount];
#pragma unroll
        for (int k = 0; k < Vector<T>::kCount; ++k) {
          results[k] = static_cast<float>(values[j * Vector<T>::kCount + k]) * scales[i];
        }
        Vector<T> packed;  // and stored as a whole
        packed.from_float(results);
        out[j] = packed;
      }
    }
  }
}

}  // namespace
}  // namespace ep_moe

// Rows that are not real are left alone. Pointers to rows are multiples of 16.
EP_MOE_API const char* ep_moe_dequantize_rows(const ep_moe::DequantizeRowsArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "row dequantisation kernel";
  if (args->rows == 0 || args->width == 0) return nullptr;
  if (args->width % kScaleBlock != 0) return error_text(cudaErrorInvalidValue, kWhat);
  const auto kernel = kernel_of_element(args->element, dequantize_rows_kernel<float>,
                                        dequantize_rows_kernel<__nv_bfloat16>, dequantize_rows_kernel<__half>);
  const int64_t threads = (args->rows * (args->width / kOfThread) + kAtOnce - 1) / kAtOnce;
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return launch(kWhat, kernel, *args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_dequantize_rows_args_bytes() { return sizeof(ep_moe::DequantizeRowsArgs); }
