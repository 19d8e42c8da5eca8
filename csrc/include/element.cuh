// The element types that rows may have, and their conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ep_moe {

enum class Element : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The kernel for rows of an Element; nullptr, which `launch` refuses, for any other number.
template <typename Kernel>
Kernel* kernel_of_element(int32_t element, Kernel* of_float32, Kernel* of_bfloat16, Kernel* of_float16) {
  switch (static_cast<Element>(element)) {
    case Element::kFloat32:
      return of_float32;
    case Element::kBFloat16:
      return of_bfloat16;
    case Element::kFloat16:
      return of_float16;
  }
  return nullptr;
}

// 16 bytes of elements.
template <typename T>
struct Vector {
  static constexpr int kCount = 16 / sizeof(T);
  uint4 bits;

  __device__ __forceinline__ void to_float(float (&values)[kCount]) const {
    const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(elements[i]);
  }

  __device__ __forceinline__ void from_float(const float (&values)[kCount]) {
    T* elements = reinterpret_cast<T*>(&bits);
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = static_cast<T>(values[i]);
  }
};

}  // namespace ep_moe
