// A row in shared memory quantised by one warp, where it lies: its values become e4m3, one fp32 scale per 128 channels
// behind them.
#pragma once

#include <type_traits>

#include "element.cuh"
#include "fp8.cuh"
#include "ptx.cuh"

namespace ep_moe {

constexpr int kPieceChannels = 16;  // channels that a thread quantises together: 8 threads a block of 128
constexpr int kQuantizeStep = 32 * kPieceChannels;  // from one piece of a lane to the next

struct Unchanged {};  // instead of an element type, for rows that are not quantised

// How many pieces a lane should have at a time, 4 or 7: the last ones may lie behind the end of the row. 7,168 channels
// are 14 steps, 4,096 are 8.
inline int quantize_pieces(int channels) {
  const auto of_row = [=](int at_once) {
    return (channels + at_once * kQuantizeStep - 1) / (at_once * kQuantizeStep) * at_once;
  };
  return of_row(7) <= of_row(4) ? 7 : 4;
}

// Neighbouring channels of one thread.
template <typename T>
struct Piece {
  static constexpr int kVectors = kPieceChannels / Vector<T>::kCount;
  Vector<T> vectors[kVectors];

  __device__ __forceinline__ void to_float(float (&values)[kPieceChannels]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      vectors[v].to_float(reinterpret_cast<float (&)[Vector<T>::kCount]>(values[v * Vector<T>::kCount]));
  }

  // The largest magnitude; NaN if one is.
  __device__ __forceinline__ float amax() const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      uint32_t largest = 0;  // a pair
#pragma unroll
      for (const Vector<T>& vector : vectors) {
        const uint4 bits = vector.bits;
        const uint32_t left = max_nan_bf16x2(bits.x & 0x7fff7fff, bits.y & 0x7fff7fff);
        const uint32_t right = max_nan_bf16x2(bits.z & 0x7fff7fff, bits.w & 0x7fff7fff);
        largest = max_nan_bf16x2(largest, max_nan_bf16x2(left, right));
      }
      return max_nan(__uint_as_float(largest << 16), __uint_as_float(largest & 0xffff0000));
    }
    float values[kPieceChannels];
    to_float(values);
    return max_nan(amax_of(reinterpret_cast<const float (&)[8]>(values[0])),
                   amax_of(reinterpret_cast<const float (&)[8]>(values[8])));
  }

  __device__ __forceinline__ uint4 quantized(float factor) const {
    float values[kPieceChannels];
    to_float(values);
    const uint2 low = pack_e4m3(reinterpret_cast<const float (&)[8]>(values[0]), factor);
    const uint2 high = pack_e4m3(reinterpret_cast<const float (&)[8]>(values[8]), factor);
    return make_uint4(low.x, low.y, high.x, high.y);
  }
};

// A whole warp: a row of `T` to e4m3 over its own beginning, and its scales behind that. What a step writes lies in
// front of what later ones read; scales would not, and wait in `scales`. A lane has kAtOnce pieces at a time: the
// latency of a step is most of its time.
template <typename T, int kAtOnce>
__device__ __forceinline__ void quantize_row(uint8_t* row, float* scales, int channels, int lane) {
#pragma unroll 1
  for (int first = lane * kPieceChannels; first < channels + lane * kPieceChannels; first += kAtOnce * kQuantizeStep) {
    Piece<T> pieces[kAtOnce] = {};
    float amax[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kQuantizeStep < channels)
        pieces[i] = reinterpret_cast<const Piece<T>*>(row)[(first + i * kQuantizeStep) / kPieceChannels];
      amax[i] = pieces[i].amax();
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) amax[i] = max_nan(amax[i], __shfl_xor_sync(~0u, amax[i], distance));
    __syncwarp();  // all lanes have read
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const BlockScale scale = BlockScale::of(amax[i]);
      const uint4 quantized = pieces[i].quantized(scale.factor);
      const int channel = first + i * kQuantizeStep;
      if (channel < channels) *reinterpret_cast<uint4*>(row + channel) = quantized;
      if (channel < channels && lane % 8 == 0) scales[channel / kScaleBlock] = scale.scale;
    }
  }
  __syncwarp();
  for (int i = lane; i < channels / kScaleBlock; i += 32) reinterpret_cast<float*>(row + channels)[i] = scales[i];
}

}  // namespace ep_moe
