// Tensor copies: boxes of a matrix in global memory to shared memory, by maps that the host encodes.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"
#include "wgmma.cuh"

namespace ep_moe {

// The box of `map` whose first element has these coordinates, fastest first. Completes on `barrier` with the whole
// box's bytes; elements outside the tensor arrive as zeros.
__device__ __forceinline__ void cp_async_bulk_tensor_load(uint32_t shared, const CUtensorMap* map, int32_t x, int32_t y,
                                                          int32_t z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same with a policy for the L2 cache.
__device__ __forceinline__ void cp_async_bulk_tensor_load(uint32_t shared, const CUtensorMap* map, int32_t x, int32_t y,
                                                          int32_t z, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// Shared memory to the box of `map` at these coordinates; elements outside the tensor are left out. Belongs to the
// thread's open bulk group.
__device__ __forceinline__ void cp_async_bulk_tensor_store(const CUtensorMap* map, int32_t x, int32_t y, int32_t z,
                                                           uint32_t shared) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// The same, added to what the box holds.
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_add(const CUtensorMap* map, int32_t x, int32_t y, int32_t z,
                                                                uint32_t shared) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The driver's encoder, found through the runtime so that the library does not link the driver; or nullptr. The driver
// wants a context bound to the calling thread, which the runtime does at a thread's first call that needs one.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  return encoder;
}

// False if the driver refuses. Three dimensions, fastest first; strides in bytes, of all but the first.
inline bool encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, const void* base,
                              const cuuint64_t (&sizes)[3], const cuuint64_t (&strides)[2],
                              const cuuint32_t (&box)[3]) {
  const auto encode = tensor_map_encoder();
  int device = 0;
  // binds the context
  if (encode == nullptr || cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return false;
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(map, type, 3, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Encodes boxes 128 bytes wide and `box_rows` high of `matrices` row-major matrices of bf16, fp32 or bytes behind one
// another, which lie in shared memory under the 128-byte swizzle. A box takes the same rows of `box_matrices` matrices.
inline bool encode_rows(CUtensorMap* map, CUtensorMapDataType type, const void* base, int64_t matrices, int64_t rows,
                        int64_t columns, int box_rows, int box_matrices = 1) {
  const cuuint64_t element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4
                                   : type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1
                                                                           : 2;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * element_bytes;
  return encode_tensor_map(
      map, type, base,
      {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(matrices)},
      {row_bytes, row_bytes * static_cast<cuuint64_t>(rows)},
      {static_cast<cuuint32_t>(kSwizzleRowBytes / element_bytes), static_cast<cuuint32_t>(box_rows),
       static_cast<cuuint32_t>(box_matrices)});
}

// Encodes boxes of `box_rows` rows and `box_blocks` blocks of 64 columns of a row-major bf16 matrix, whose coordinates
// are 0, the row and the block. The blocks lie one behind the other in shared memory, each under the 128-byte swizzle:
// one copy instead of one a block, which a thread that does nothing else could not issue fast enough.
inline bool encode_column_blocks(CUtensorMap* map, const void* base, int64_t rows, int64_t columns, int box_rows,
                                 int box_blocks) {
  return encode_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, base,
                           {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / 64)},
                           {static_cast<cuuint64_t>(columns) * 2, kSwizzleRowBytes},
                           {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_blocks)});
}

}  // namespace ep_moe
