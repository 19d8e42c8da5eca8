// The pointwise functions of the experts' activations: value, and value with derivative, in fp32.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace ep_moe {

enum class Activation : int32_t { kSwiglu = 0, kGeglu = 1, kGelu = 2, kRelu = 3, kSquaredRelu = 4 };

struct Silu {
  // Four instructions, to about |x| + 3 ulp: between the tiles of a GEMM every one counts.
  static __device__ __forceinline__ float sigmoid_of(float x) {
    constexpr float kLog2E = 1.4426950408889634f;
    return rcp_approx_ftz(1.0f + ex2_approx_ftz(-kLog2E * x));
  }
  static __device__ __forceinline__ float value(float x) { return x * sigmoid_of(x); }
  static __device__ __forceinline__ void value_and_slope(float x, float& value, float& slope) {
    const float sigmoid = sigmoid_of(x);
    value = x * sigmoid;
    slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
  }
};

struct Gelu {
  static constexpr float kSqrtHalf = 0.70710678118654752f;
  static constexpr float kDensityAtZero = 0.39894228040143268f;  // 1 / sqrt(2 pi)
  static __device__ __forceinline__ float distribution(float x) { return 0.5f * (1.0f + erff(x * kSqrtHalf)); }
  static __device__ __forceinline__ float value(float x) { return x * distribution(x); }
  static __device__ __forceinline__ void value_and_slope(float x, float& value, float& slope) {
    const float below = distribution(x);
    value = x * below;
    slope = below + x * (kDensityAtZero * expf(-0.5f * x * x));
  }
};

struct Relu {
  static __device__ __forceinline__ float value(float x) { return max_nan(x, 0.0f); }
  static __device__ __forceinline__ void value_and_slope(float x, float& value, float& slope) {
    value = max_nan(x, 0.0f);
    slope = x > 0.0f ? 1.0f : 0.0f;
  }
};

struct SquaredRelu {
  static __device__ __forceinline__ float value(float x) {
    const float positive = max_nan(x, 0.0f);
    return positive * positive;
  }
  static __device__ __forceinline__ void value_and_slope(float x, float& value, float& slope) {
    const float positive = max_nan(x, 0.0f);
    value = positive * positive;
    slope = 2.0f * positive;
  }
};

// An activation times the weight of its row. Gated ones multiply by `up`, which others do not have.
template <typename Function, bool gated>
__device__ __forceinline__ float activated(float gate, float up, float weight) {
  float value = Function::value(gate);
  if constexpr (gated) value *= up;
  return value * weight;
}

// From the gradient of that to those of gate and up, which take their places; that of the weight is added to its sum
// over the row. Returns the activation, in the bits of forward.
template <typename Function, bool gated>
__device__ __forceinline__ float activation_gradients(float incoming, float weight, float& gate, float& up,
                                                      float& weight_sum) {
  float value, slope;
  Function::value_and_slope(gate, value, slope);
  const float scaled = incoming * weight;
  if constexpr (gated) {
    const float result = value * up * weight;
    weight_sum += incoming * value * up;
    gate = scaled * up * slope;
    up = value * scaled;
    return result;
  } else {
    weight_sum += incoming * value;
    gate = scaled * slope;
    return value * weight;
  }
}

}  // namespace ep_moe
