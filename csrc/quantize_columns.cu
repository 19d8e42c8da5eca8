// Rows to e4m3 with scales of their channels, transposed: what the gradient of weights multiplies. A channel has a
// scale for each 128 tokens, or one for all tokens of an expert, whose largest value a pass before finds. Who needs the
// rows with a scale for each 128 channels of a token too, as quantize.cu makes them, gets both of one read.
//
// Rows come as bf16, or as e4m3 with a scale for each 128 channels, of which no copy in bf16 is made. They leave in
// blocks of 128 tokens that each belong to one expert (token_blocks.cuh), a channel's tokens side by side. Slots behind
// an expert's last token get zeros, so that the multiply needs no masks; rows of no expert are not read, and blocks
// behind the last expert's not written.
//
// A block of threads takes 128 tokens of 128 channels at a time. 16 lanes read 128 channels of a row, eight each; a
// thread has those of eight consecutive tokens, so that it packs words of tokens without exchanging any. It keeps them
// in registers while the largest of each channel is sought. Through shared memory the block turns into 16 KB that are
// written as they lie; there, chunks of eight tokens are permuted by the channel, so that the lanes, whose channels are
// eight apart, write to other banks. What is quantised along the channels leaves from the registers.
#include <cuda_fp16.h>

#include "element.cuh"
#include "fp8.cuh"
#include "launch.cuh"
#include "token_blocks.cuh"

namespace ep_moe {

struct QuantizeColumnsArgs {
  const void* rows;         // [rows][width], bf16, or e4m3 if there are scales
  const float* row_scales;  // of row r and channels from 128 * b on: [r * row_stride + b * block_stride]; or nullptr
  void* values;             // e4m3 [token_blocks][width][128]
  float* scales;            // [token_blocks][width]; with `largest`: [experts][width], not written without tokens
  uint32_t* largest;        // [experts][width], room for the bits of magnitudes: scales are of all tokens; or nullptr
  const int32_t* ends;      // [experts], where each one's segment of rows ends; the next one's starts there
  void* row_values;         // e4m3 [rows][width], quantised along the channels, of rows in bf16; or nullptr
  float* row_value_scales;  // [width / 128][scale_stride], by row
  int64_t row_stride;
  int64_t block_stride;
  int64_t scale_stride;
  int32_t token_blocks;  // that there is room for; no less than the experts' segments have
  int32_t experts;
  int32_t width;  // a multiple of 128
  int32_t reserved;
};

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLanes = 16;  // on 128 channels, eight each
constexpr int kTokens = 8;  // of a thread
constexpr int kChunks = kTokenBlock / kTokens;
constexpr int kPairs = kChunks / 2;  // of chunks, 16 bytes: what a thread writes at a time
constexpr int kPasses = kScaleBlock * kPairs / kThreads;
constexpr int kResidentBlocks = 3;       // of an SM, for the compiler: 85 registers a thread
constexpr int kMaxBlocks = 792;          // 6 on each of 132 SMs
constexpr int kLargestMaxBlocks = 1980;  // 15 on each, where up to five are resident: 6 would leave the last one alone
static_assert(kThreads / kLanes == kChunks && kTokenBlock == kScaleBlock);

// Eight channels of a row: loaded by load(), of which many are in flight, and read behind decode(). Zeros before. Its
// Largest has the largest magnitudes of the channels in all parts that it was shown.
struct Bf16Part {
  struct Largest {
    uint32_t pairs[4] = {};

    __device__ __forceinline__ void add(const Bf16Part& part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = max_nan_bf16x2(pairs[i], part.magnitudes(i));
    }

    __device__ __forceinline__ float get(int channel) const {
      return __uint_as_float(channel % 2 == 0 ? pairs[channel / 2] << 16 : pairs[channel / 2] & 0xffff0000u);
    }
  };

  Vector<__nv_bfloat16> bits = {};

  __device__ __forceinline__ void load(const QuantizeColumnsArgs& args, int64_t row, int column) {
    const __nv_bfloat16* from = static_cast<const __nv_bfloat16*>(args.rows) + row * args.width + column;
    bits = *reinterpret_cast<const Vector<__nv_bfloat16>*>(from);
  }

  __device__ __forceinline__ void decode() {}

  // Makes the compiler convert again what it would else keep in registers that it does not have.
  __device__ __forceinline__ void touch() {
    asm volatile("" : "+r"(bits.bits.x), "+r"(bits.bits.y), "+r"(bits.bits.z), "+r"(bits.bits.w));
  }

  __device__ __forceinline__ float get(int channel) const {
    return static_cast<float>(reinterpret_cast<const __nv_bfloat16*>(&bits)[channel]);
  }

  // Of channels 2 * pair and the next, a bf16 each.
  __device__ __forceinline__ uint32_t magnitudes(int pair) const {
    const uint4& words = bits.bits;
    return (pair < 2 ? (pair == 0 ? words.x : words.y) : (pair == 2 ? words.z : words.w)) & 0x7fff7fffu;
  }

  // Of all channels.
  __device__ __forceinline__ float largest() const {
    const uint32_t pair =
        max_nan_bf16x2(max_nan_bf16x2(magnitudes(0), magnitudes(1)), max_nan_bf16x2(magnitudes(2), magnitudes(3)));
    return max_nan(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};

struct Fp8Part {
  struct Largest {
    float values[8] = {};

    __device__ __forceinline__ void add(const Fp8Part& part) {
#pragma unroll
      for (int k = 0; k < 8; ++k) values[k] = max_nan(values[k], fabsf(part.get(k)));
    }

    __device__ __forceinline__ float get(int channel) const { return values[channel]; }
  };

  uint2 bits = {};
  float scale = 0.0f;
  __half2 pairs[4];  // e4m3 are a part of fp16

  __device__ __forceinline__ void load(const QuantizeColumnsArgs& args, int64_t row, int column) {
    const uint8_t* from = static_cast<const uint8_t*>(args.rows) + row * args.width + column;
    bits = *reinterpret_cast<const uint2*>(from);
    scale = args.row_scales[row * args.row_stride + column / kScaleBlock * args.block_stride];
  }

  __device__ __forceinline__ void decode() {
    const __nv_fp8x2_storage_t* values = reinterpret_cast<const __nv_fp8x2_storage_t*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __half2(__nv_cvt_fp8x2_to_halfraw2(values[i], __NV_E4M3));
  }

  __device__ __forceinline__ float get(int channel) const {
    const __half2 pair = pairs[channel / 2];
    return (channel % 2 == 0 ? __low2float(pair) : __high2float(pair)) * scale;
  }
};

// Place of eight tokens of a channel in shared memory, of a channel's 16.
__device__ __forceinline__ int staged_chunk(int channel, int chunk) { return chunk ^ channel / 8; }

// Quantises tokens along the channels, of which the thread and its 15 neighbours have 128. The first `count` are real.
template <typename Part>
__device__ __forceinline__ void store_rows(const QuantizeColumnsArgs& args, const Part (&parts)[kTokens], int64_t row,
                                           int column, int lane, int count) {
  float my_amax = 0.0f;  // of a token a lane
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float amax = parts[i].largest();
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      amax = max_nan(amax, __shfl_xor_sync(~0u, amax, distance));
    if (lane == i) my_amax = amax;
  }
  const BlockScale my_scale = BlockScale::of(my_amax);
  uint8_t* out = static_cast<uint8_t*>(args.row_values) + row * args.width + column + lane * 8;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float values[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = parts[i].get(k);
    const float factor = __shfl_sync(~0u, my_scale.factor, i, kLanes);
    if (i < count) *reinterpret_cast<uint2*>(out + static_cast<int64_t>(i) * args.width) = pack_e4m3(values, factor);
  }
  if (lane < min(count, kTokens))
    args.row_value_scales[column / kScaleBlock * args.scale_stride + row + lane] = my_scale.scale;
}

// The 128 tokens of 128 channels that a block works on, and the thread's of them.
struct Tile {
  int expert;
  int token_block;
  int column;       // the first channel
  int row;          // the thread's first token
  int count;        // real ones from there on
  bool first;       // of the expert's
  int lane, chunk;  // of the channels, of the tokens

  __device__ __forceinline__ Tile(const QuantizeColumnsArgs& args, const int32_t* padded_ends, int index,
                                  int earlier_expert)
      : lane(threadIdx.x % kLanes), chunk(threadIdx.x / kLanes) {
    const int column_blocks = args.width / kScaleBlock;
    token_block = index / column_blocks;
    column = index % column_blocks * kScaleBlock;
    const int slot = token_block * kTokenBlock;
    expert = expert_of(padded_ends, args.experts, slot, earlier_expert);
    const int first_slot = expert == 0 ? 0 : padded_ends[expert - 1];
    first = slot == first_slot;
    row = (expert == 0 ? 0 : args.ends[expert - 1]) + slot - first_slot + chunk * kTokens;
    count = args.ends[expert] - row;
  }

  template <typename Part>
  __device__ __forceinline__ void load(const QuantizeColumnsArgs& args, Part (&parts)[kTokens]) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i < count) parts[i].load(args, row + i, column + lane * 8);
    }
  }
};

__device__ __forceinline__ int tiles_of(const QuantizeColumnsArgs& args, const int32_t* padded_ends) {
  return padded_ends[args.experts - 1] / kTokenBlock * (args.width / kScaleBlock);
}

// The largest magnitudes of a tile's channels, by warp: of the thread's parts to those of the block.
template <typename Part>
__device__ __forceinline__ void gather_largest(float (&warp_amax)[kWarps][kScaleBlock], const Part (&parts)[kTokens],
                                               int lane) {
  typename Part::Largest largest;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) largest.add(parts[i]);
  float amax[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) amax[k] = max_nan(largest.get(k), __shfl_xor_sync(~0u, largest.get(k), kLanes));
  if (threadIdx.x % 32 >= kLanes) return;
  float4* target = reinterpret_cast<float4*>(&warp_amax[threadIdx.x / 32][lane * 8]);
  target[0] = make_float4(amax[0], amax[1], amax[2], amax[3]);
  target[1] = make_float4(amax[4], amax[5], amax[6], amax[7]);
}

__device__ __forceinline__ float largest_of(const float (&warp_amax)[kWarps][kScaleBlock], int channel) {
  float largest = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) largest = max_nan(largest, warp_amax[warp][channel]);
  return largest;
}

// The largest magnitude of each channel of an expert. Bits of magnitudes ascend with them, NaN behind infinity.
template <typename Part>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    largest_kernel(const __grid_constant__ QuantizeColumnsArgs args) {
  __shared__ int32_t padded_ends[kMaxGemmExperts];
  __shared__ alignas(16) float warp_amax[2][kWarps][kScaleBlock];  // in turns: read while the next is written
  pad_segments(padded_ends, args.ends, args.experts);
  const int tiles = tiles_of(args, padded_ends);
  int expert = 0, turn = 0;
  for (int index = blockIdx.x; index < tiles; index += gridDim.x, turn ^= 1) {
    const Tile tile(args, padded_ends, index, expert);
    expert = tile.expert;
    Part parts[kTokens];
    tile.load(args, parts);
#pragma unroll
    for (Part& part : parts) part.decode();
    gather_largest(warp_amax[turn], parts, tile.lane);
    __syncthreads();
    if (threadIdx.x >= kScaleBlock) continue;
    const float largest = largest_of(warp_amax[turn], threadIdx.x);
    atomicMax(&args.largest[static_cast<int64_t>(expert) * args.width + tile.column + threadIdx.x],
              __float_as_uint(largest));
  }
}

template <typename Part, bool both, bool by_expert>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    quantize_columns_kernel(const __grid_constant__ QuantizeColumnsArgs args) {
  __shared__ int32_t padded_ends[kMaxGemmExperts];
  __shared__ alignas(16) float warp_amax[kWarps][kScaleBlock];
  __shared__ alignas(16) float factors[kScaleBlock];
  __shared__ alignas(16) uint2 staged[kScaleBlock][kChunks];
  pad_segments(padded_ends, args.ends, args.experts);
  const int tiles = tiles_of(args, padded_ends);
  int expert = 0;
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(args, padded_ends, index, expert);
    expert = tile.expert;
    const int lane = tile.lane;
    Part parts[kTokens];
    tile.load(args, parts);
    const int64_t first_scale = static_cast<int64_t>(by_expert ? expert : tile.token_block) * args.width + tile.column;
    if (by_expert && threadIdx.x < kScaleBlock) {
      const BlockScale scale = BlockScale::of(__uint_as_float(args.largest[first_scale + threadIdx.x]));
      factors[threadIdx.x] = scale.factor;
      if (tile.first) args.scales[first_scale + threadIdx.x] = scale.scale;
    }
#pragma unroll
    for (Part& part : parts) part.decode();
    if constexpr (both) {
      store_rows(args, parts, tile.row, tile.column, lane, tile.count);
#pragma unroll
      for (Part& part : parts) part.touch();
    }
    if constexpr (!by_expert) {
      gather_largest(warp_amax, parts, lane);
      __syncthreads();
      if (threadIdx.x < kScaleBlock) {
        const BlockScale scale = BlockScale::of(largest_of(warp_amax, threadIdx.x));
        factors[threadIdx.x] = scale.factor;
        args.scales[first_scale + threadIdx.x] = scale.scale;
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int channel = lane * 8 + k;
      float values[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) values[i] = parts[i].get(k);
      staged[channel][staged_chunk(channel, tile.chunk)] = pack_e4m3(values, factors[channel]);
    }
    __syncthreads();
    // 16 bytes a thread: two chunks, which lie side by side, the other way round for every second eight of channels.
    const int64_t first_channel = static_cast<int64_t>(tile.token_block) * args.width + tile.column;
    uint4* out = reinterpret_cast<uint4*>(static_cast<uint8_t*>(args.values) + first_channel * kTokenBlock);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = pass * kThreads + threadIdx.x, channel = i / kPairs, pair = i % kPairs;
      const uint4 found = *reinterpret_cast<const uint4*>(&staged[channel][staged_chunk(channel, pair * 2) & ~1]);
      out[i] = channel / 8 % 2 == 0 ? found : make_uint4(found.z, found.w, found.x, found.y);
    }
    // Every array is written next behind a barrier that follows its last reads: `factors` are read before the one
    // above.
  }
}

using Kernel = void (*)(QuantizeColumnsArgs);

template <bool by_expert>
Kernel find_kernel(const QuantizeColumnsArgs& args) {
  if (args.row_scales != nullptr) return quantize_columns_kernel<Fp8Part, false, by_expert>;
  if (args.row_values != nullptr) return quantize_columns_kernel<Bf16Part, true, by_expert>;
  return quantize_columns_kernel<Bf16Part, false, by_expert>;
}

}  // namespace
}  // namespace ep_moe

// Pointers to rows and values are multiples of 16.
EP_MOE_API const char* ep_moe_quantize_columns(const ep_moe::QuantizeColumnsArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  constexpr const char* kWhat = "column quantisation kernel";
  if (args->token_blocks == 0 || args->width == 0) return nullptr;
  const int64_t tiles = static_cast<int64_t>(args->token_blocks) * (args->width / kScaleBlock);
  if (args->experts <= 0 || args->experts > kMaxGemmExperts || args->width % kScaleBlock != 0 || tiles <= 0 ||
      tiles > INT32_MAX - kLargestMaxBlocks || (args->row_values != nullptr && args->row_scales != nullptr) ||
      static_cast<int64_t>(args->token_blocks) * kTokenBlock > INT32_MAX) {
    return error_text(cudaErrorInvalidValue, kWhat);
  }
  const int blocks = static_cast<int>(tiles < kMaxBlocks ? tiles : kMaxBlocks);
  if (args->largest == nullptr) {
    return launch(kWhat, find_kernel<false>(*args), *args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
  }
  const size_t bytes = sizeof(uint32_t) * static_cast<size_t>(args->experts) * args->width;
  const cudaError_t cleared = cudaMemsetAsync(args->largest, 0, bytes, stream);
  if (cleared != cudaSuccess) return error_text(cleared, kWhat);
  const Kernel largest = args->row_scales != nullptr ? largest_kernel<Fp8Part> : largest_kernel<Bf16Part>;
  const int largest_blocks = static_cast<int>(tiles < kLargestMaxBlocks ? tiles : kLargestMaxBlocks);
  const char* error = launch(kWhat, largest, *args, largest_blocks, kThreads, 0, LaunchMode::kPlain, stream);
  if (error != nullptr) return error;
  return launch(kWhat, find_kernel<true>(*args), *args, blocks, kThreads, 0, LaunchMode::kPlain, stream);
}

EP_MOE_API size_t ep_moe_quantize_columns_args_bytes() { return sizeof(ep_moe::QuantizeColumnsArgs); }
