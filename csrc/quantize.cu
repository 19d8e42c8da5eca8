// Quantisation of the experts' operands to e4m3 with block scales: rows with a scale for each 128 elements, weights
// with one for each 128 x 128, as they lie and transposed.
//
// Rows: 16 lanes take 128 elements of eight rows in turn, so that all loads are in flight at once and a block column's
// scales, which lie side by side for neighbouring rows where a GEMM reads them, go out in one store. Rows that travel
// have theirs by row.
//
// Weights: a block of threads takes 128 x 128 elements, kept in registers while their largest is sought. The transposed
// copy goes through shared memory. Its scales are the same ones, transposed.
#include "element.cuh"
#include "fp8.cuh"
#include "launch.cuh"
#include "real_rows.cuh"

namespace ep_moe {

struct QuantizeRowsArgs {
  const void* x;  // [rows][width]
  void* values;   // e4m3 [rows][width]
  float* scales;  // of row r and block b of 128 elements: [r * row_stride + b * block_stride]
  RealRows real;
  int64_t row_stride;
  int64_t block_stride;
  int32_t width;    // a multiple of 128
  int32_t element;  // Element of x
};

struct QuantizeWeightArgs {
  const void* weight;        // [experts][rows][columns]
  void* values;              // e4m3 [experts][rows][columns]
  float* scales;             // [experts][rows / 128][columns / 128]
  void* transposed;          // e4m3 [experts][columns][rows], or nullptr
  float* transposed_scales;  // [experts][columns / 128][rows / 128], or nullptr
  int32_t experts;
  int32_t rows;  // multiples of 128
  int32_t columns;
  int32_t element;  // Element of weight
};

namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 16;      // on 128 elements, eight each
constexpr int kRowsAtOnce = 8;  // of a lane
constexpr int kMaxBlocks = 2112;

// Eight elements in the form in which they are loaded.
template <typename T>
struct Eight {
  static constexpr int kVectors = 8 * sizeof(T) / 16;
  Vector<T> vectors[kVectors];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const Vector<T>*>(from)[i];
  }

  __device__ __forceinline__ void to_float(float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float part[Vector<T>::kCount];
      vectors[i].to_float(part);
#pragma unroll
      for (int j = 0; j < Vector<T>::kCount; ++j) values[i * Vector<T>::kCount + j] = part[j];
    }
  }
};

__device__ __forceinline__ float amax_of_lanes(float amax) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    amax = max_nan(amax, __shfl_xor_sync(~0u, amax, distance));
  return amax;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const __grid_constant__ QuantizeRowsArgs args) {
  const int64_t rows = args.real.end();
  const int blocks = args.width / kScaleBlock;
  const int64_t items = (rows + kRowsAtOnce - 1) / kRowsAtOnce * blocks;
  const int lane = threadIdx.x % kLanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  // By the warp's first item: lanes without one go along, because the shuffles take all.
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32 * (32 / kLanes); first < items;
       first += stride) {
    const int64_t item = first + threadIdx.x % 32 / kLanes;
    const int64_t row = item / blocks * kRowsAtOnce;
    const int block = static_cast<int>(item % blocks);
    const int count = item < items ? static_cast<int>(min(rows - row, static_cast<int64_t>(kRowsAtOnce))) : 0;
    const int64_t offset = row * args.width + block * kScaleBlock + lane * 8;
    Eight<T> loaded[kRowsAtOnce];
    bool real[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      real[i] = i < count && args.real.contain(row + i);
      if (real[i]) loaded[i].load(static_cast<const T*>(args.x) + offset + static_cast<int64_t>(i) * args.width);
    }
    float my_scale = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      float values[8] = {};
      if (real[i]) loaded[i].to_float(values);
      const BlockScale scale = BlockScale::of(amax_of_lanes(amax_of(values)));
      if (lane == i) my_scale = scale.scale;
      if (real[i]) {
        uint8_t* out = static_cast<uint8_t*>(args.values) + offset + static_cast<int64_t>(i) * args.width;
        *reinterpret_cast<uint2*>(out) = pack_e4m3(values, scale.factor);
      }
    }
    if (lane < count) args.scales[(row + lane) * args.row_stride + block * args.block_stride] = my_scale;
  }
}

// A block's e4m3 in shared memory, four columns a word. Words are permuted by groups of 16 rows, so that those of four
// columns lie in other banks in every group.
constexpr int kStagedWords = kScaleBlock / 4;
constexpr int kGroupRows = 16;
constexpr int kStagedGroups = kScaleBlock / kGroupRows;
static_assert(kStagedGroups * kStagedWords == kThreads && kGroupRows == kThreads / kLanes);

__device__ __forceinline__ int staged_word(int group, int word) { return word ^ group * 4; }

// Four rows of four bytes to four columns.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140), low23 = __byte_perm(words[2], words[3], 0x5140);
  const uint32_t high01 = __byte_perm(words[0], words[1], 0x7362), high23 = __byte_perm(words[2], words[3], 0x7362);
  words[0] = __byte_perm(low01, low23, 0x5410);
  words[1] = __byte_perm(low01, low23, 0x7632);
  words[2] = __byte_perm(high01, high23, 0x5410);
  words[3] = __byte_perm(high01, high23, 0x7632);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_weight_kernel(const __grid_constant__ QuantizeWeightArgs args) {
  constexpr int kRowsOfPass = kThreads / kLanes, kPasses = kScaleBlock / kRowsOfPass;
  __shared__ float warp_amax[kThreads / 32];
  __shared__ alignas(16) uint32_t staged[kScaleBlock][kStagedWords];
  const int column_blocks = args.columns / kScaleBlock, row_blocks = args.rows / kScaleBlock;
  const int column_block = blockIdx.x % column_blocks;
  const int row_block = blockIdx.x / column_blocks % row_blocks;
  const int64_t expert = blockIdx.x / (column_blocks * row_blocks);
  const int64_t base = expert * args.rows * args.columns;
  const int lane = threadIdx.x % kLanes, first_row = threadIdx.x / kLanes;
  const int64_t offset = base + (static_cast<int64_t>(row_block) * kScaleBlock + first_row) * args.columns +
                         column_block * kScaleBlock + lane * 8;

  Eight<T> loaded[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i)
    loaded[i].load(static_cast<const T*>(args.weight) + offset + static_cast<int64_t>(i) * kRowsOfPass * args.columns);
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float values[8];
    loaded[i].to_float(values);
    amax = max_nan(amax, amax_of(values));
  }
  amax = amax_of_lanes(amax);
  amax = max_nan(amax, __shfl_xor_sync(~0u, amax, kLanes));
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) amax = max_nan(amax, warp_amax[warp]);
  const BlockScale scale = BlockScale::of(amax);
  if (threadIdx.x == 0) {
    args.scales[(expert * row_blocks + row_block) * column_blocks + column_block] = scale.scale;
    if (args.transposed != nullptr)
      args.transposed_scales[(expert * column_blocks + column_block) * row_blocks + row_block] = scale.scale;
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float values[8];
    loaded[i].to_float(values);
    const uint2 packed = pack_e4m3(values, scale.factor);
    uint8_t* out = static_cast<uint8_t*>(args.values) + offset + static_cast<int64_t>(i) * kRowsOfPass * args.columns;
    *reinterpret_cast<uint2*>(out) = packed;
    *reinterpret_cast<uint2*>(&staged[i * kRowsOfPass + first_row][staged_word(i, lane * 2)]) = packed;
  }
  if (args.transposed == nullptr) return;
  __syncthreads();
  // 16 rows of four columns each: eight neighbouring threads write 128 bytes of a transposed row.
  const int group = threadIdx.x % kStagedGroups, quad = threadIdx.x / kStagedGroups;
  uint32_t out[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = staged[group * kGroupRows + i * 4 + j][staged_word(group, quad)];
    transpose_bytes(words);
#pragma unroll
    for (int column = 0; column < 4; ++column) out[column][i] = words[column];
  }
#pragma unroll
  for (int column = 0; column < 4; ++column) {
    const int64_t transposed_row = static_cast<int64_t>(column_block) * kScaleBlock + quad * 4 + column;
    uint8_t* target = static_cast<uint8_t*>(args.transposed) + base + transposed_row * args.rows +
                      row_block * kScaleBlock + group * kGroupRows;
    *reinterpret_cast<uint4*>(target) = make_uint4(out[column][0], out[column][1], out[column][2], out[column][3]);
  }
}

}  // namespace
}  // namespace ep_moe

// Rows that are not real are left alone. Pointers to rows are multiples of 16.
EP_MOE_API const char* ep_moe_quantize_rows(const ep_moe::QuantizeRowsArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "row quantisation kernel";
  if (args->real.rows == 0 || args->width == 0) return nullptr;
  if (args->width % kScaleBlock != 0) return error_text(cudaErrorInvalidValue, kWhat);
  const auto kernel = kernel_of_element(args->element, quantize_rows_kernel<float>, quantize_rows_kernel<__nv_bfloat16>,
                                        quantize_rows_kernel<__half>);
  const int64_t items = (args->real.rows + kRowsAtOnce - 1) / kRowsAtOnce * (args->width / kScaleBlock);
  const int64_t wanted = (items * kLanes + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return launch(kWhat, kernel, *args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
}

EP_MOE_API const char* ep_moe_quantize_weight(const ep_moe::QuantizeWeightArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "weight quantisation kernel";
  const int64_t blocks =
      static_cast<int64_t>(args->experts) * (args->rows / kScaleBlock) * (args->columns / kScaleBlock);
  if (blocks == 0) return nullptr;
  if (args->rows % kScaleBlock != 0 || args->columns % kScaleBlock != 0 || blocks > INT32_MAX)
    return error_text(cudaErrorInvalidValue, kWhat);
  const auto kernel = kernel_of_element(args->element, quantize_weight_kernel<float>,
                                        quantize_weight_kernel<__nv_bfloat16>, quantize_weight_kernel<__half>);
  return launch(kWhat, kernel, *args, static_cast<int>(blocks), kThreads, 0, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_quantize_rows_args_bytes() { return sizeof(ep_moe::QuantizeRowsArgs); }
EP_MOE_API size_t ep_moe_quantize_weight_args_bytes() { return sizeof(ep_moe::QuantizeWeightArgs); }
