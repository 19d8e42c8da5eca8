// Block-scaled e4m3: a scale of the largest magnitude of a block over 448, as ep_moe/comm/fp8.py computes it, bit for
// bit. A block that holds NaN or infinity becomes NaN as a whole.
#pragma once

#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>

#include "ptx.cuh"

namespace ep_moe {

constexpr int kScaleBlock = 128;
constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

struct BlockScale {
  float scale;   // times an e4m3 value is the value
  float factor;  // times a value is the e4m3 value

  // Both are rounded once, as a division rounds, but without a branch, which would keep the compiler from working on
  // several blocks at once: what is left over of the dividend corrects a product with the reciprocal. That of a number
  // near the largest would be subnormal; it is taken of one 2^-64 times as large.
  static __device__ __forceinline__ BlockScale of(float amax) {
    constexpr float kInverse = 1.0f / kE4m3Max, kHuge = 0x1p64f;
    const float largest = max_nan(amax, kMinAmax);
    const float product = largest * kInverse;
    const float scale = __fmaf_rn(__fmaf_rn(-kE4m3Max, product, largest), kInverse, product);
    const float shrink = largest > kHuge ? 1.0f / kHuge : 1.0f, divisor = largest * shrink;
    const float estimate = rcp_approx_ftz(divisor);
    const float inverse = __fmaf_rn(__fmaf_rn(-divisor, estimate, 1.0f), estimate, estimate);
    const float quotient = kE4m3Max * inverse;
    const float factor = __fmaf_rn(__fmaf_rn(-divisor, quotient, kE4m3Max), inverse, quotient) * shrink;
    return largest == INFINITY ? BlockScale{INFINITY, 0.0f} : BlockScale{scale, factor};
  }
};

// Four values as e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Eight scaled values.
__device__ __forceinline__ uint2 pack_e4m3(const float (&values)[8], float factor) {
  return make_uint2(pack_e4m3(values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor),
                    pack_e4m3(values[4] * factor, values[5] * factor, values[6] * factor, values[7] * factor));
}

// The largest magnitude of eight values; NaN if one is.
__device__ __forceinline__ float amax_of(const float (&values)[8]) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) amax = max_nan(amax, fabsf(values[i]));
  return amax;
}

}  // namespace ep_moe
