// The way of a warpgroup's results out of the accumulators: through shared memory, where they come to lie as in global
// memory, and out in long copies. Both layouts keep the matrix stores, which write 16 bytes of each of 8 rows at a
// time, from meeting in a bank.
//
// Products over tokens: the accumulators' columns are rows of the result. A staged row has 128 elements in 16 chunks of
// 16 bytes, chunk c of row r at c ^ (r % 8), and goes out by ordinary stores, because the number of rows is any.
//
// Gradients of weights: rows are rows. They lie in boxes under the 128-byte swizzle and go out by tensor copies.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ptx.cuh"

namespace ep_moe {

constexpr int kStagedRowBytes = 256;
constexpr int kStagedChunks = kStagedRowBytes / 16;

constexpr __host__ __device__ int staged_bytes(int rows) { return rows * kStagedRowBytes; }

__device__ __forceinline__ uint32_t staged_chunk(uint32_t staging, int row, int chunk) {
  return staging + row * kStagedRowBytes + ((chunk ^ (row % 8)) * 16);
}

constexpr int kGradientBoxBytes = 64 * 128;  // 64 rows of 64 bf16 or 32 fp32

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four 8 x 8 matrices of 16-bit elements, a row from each lane's address; `transposed` writes columns as rows.
template <bool transposed>
__device__ __forceinline__ void stmatrix(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
  }
}

__device__ __forceinline__ void stmatrix_trans(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}

__device__ __forceinline__ uint4 ld_shared(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ float ld_shared_f32(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float2 ld_shared_f32x2(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Stages 128 x `width` accumulators of a warpgroup as `width` rows: the product's columns become rows.
template <int width>
__device__ __forceinline__ void stage_columns(uint32_t staging, const float (&sums)[2][width / 2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int matrix =
      lane / 8;  // whose row's address this lane gives: upper and lower 8 product rows, then 8 columns on
  const int row = matrix / 2 * 8 + lane % 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float (&d)[width / 2] = sums[half];
    const uint32_t address = staged_chunk(staging, row, half * 8 + warp * 2 + matrix % 2);
#pragma unroll
    for (int j = 0; j + 1 < width / 8; j += 2) {
      stmatrix<true>(address + j * 8 * kStagedRowBytes, pack_bf16(d[4 * j], d[4 * j + 1]),
                     pack_bf16(d[4 * j + 2], d[4 * j + 3]), pack_bf16(d[4 * j + 4], d[4 * j + 5]),
                     pack_bf16(d[4 * j + 6], d[4 * j + 7]));
    }
    if constexpr (width / 8 % 2 == 1) {
      constexpr int j = width / 8 - 1;
      const uint32_t last = staged_chunk(staging, lane % 8, half * 8 + warp * 2 + matrix % 2);
      stmatrix_trans(last + j * 8 * kStagedRowBytes, pack_bf16(d[4 * j], d[4 * j + 1]),
                     pack_bf16(d[4 * j + 2], d[4 * j + 3]));
    }
  }
}

// Writes the first `rows` staged rows, and of them the first `chunks` chunks, by all threads of a warpgroup. Rows of
// `out` are `row_stride` elements apart.
__device__ __forceinline__ void store_staged(uint32_t staging, __nv_bfloat16* out, int64_t row_stride, int rows,
                                             int chunks) {
  constexpr int kUnroll = 4, kRowsAtOnce = 128 / kStagedChunks;
  const int thread = threadIdx.x % 128, chunk = thread % kStagedChunks;
  if (chunk >= chunks) return;
  __nv_bfloat16* target = out + chunk * 8;
  for (int first = thread / kStagedChunks; first < rows; first += kUnroll * kRowsAtOnce) {
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = first + i * kRowsAtOnce;
      if (row < rows) values[i] = ld_shared(staged_chunk(staging, row, chunk));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = first + i * kRowsAtOnce;
      if (row < rows) *reinterpret_cast<uint4*>(target + row * row_stride) = values[i];
    }
  }
}

__device__ __forceinline__ void st_shared(uint32_t address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

// Stages 64 x 256 accumulators of a warpgroup as bf16, in four boxes. A warp stages 16 rows.
__device__ __forceinline__ void stage_rows(uint32_t staging, const float (&sums)[128]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int matrix = lane / 8;
  const int row = warp * 16 + matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int j = 0; j < 32; j += 2) {
    const int chunk = j + matrix / 2;
    const uint32_t address = staging + chunk / 8 * kGradientBoxBytes + row * 128 + ((chunk ^ row) % 8) * 16;
    const float* d = &sums[4 * j];
    stmatrix<false>(address, pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]),
                    pack_bf16(d[6], d[7]));
  }
}

// Stages half of 64 x 256 accumulators of a warpgroup in fp32, 128 columns in four boxes.
template <int half>
__device__ __forceinline__ void stage_rows_fp32(uint32_t staging, const float (&sums)[128]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = warp * 16 + lane / 4, pair = lane % 4;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int chunk = j * 2 + pair / 2;
    const uint32_t address =
        staging + chunk / 8 * kGradientBoxBytes + row * 128 + ((chunk ^ row) % 8) * 16 + pair % 2 * 8;
    const float* d = &sums[half * 64 + 4 * j];
    st_shared(address, d[0], d[1]);
    st_shared(address + 8 * 128, d[2], d[3]);
  }
}

// Adds columns 32 * `column_box` and following of 64 x 256 accumulators of a warpgroup to a box of fp32.
//
// Half a warp reads 8 bytes a lane of four rows. With the same columns of all rows, every second row would meet the
// banks of the one before: so odd rows take two of the four groups of 8 columns in the other order.
__device__ __forceinline__ void add_to_staged_rows(uint32_t box, const float (&sums)[128], int column_box) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = warp * 16 + lane / 4, pair = lane % 4;
  const bool odd = row % 2 != 0;
  const uint32_t first = (box + row * 128 + ((pair / 2) ^ (row % 8)) * 16 + pair % 2 * 8) ^ (odd ? 64 : 0);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float* near = &sums[4 * (column_box * 4 + j)];
    const float* far = near + 8;
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      const uint32_t address = first ^ (j * 32 + turn * 64);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // and the row 8 further down
        const float x = (turn != 0) != odd ? far[2 * i] : near[2 * i];
        const float y = (turn != 0) != odd ? far[2 * i + 1] : near[2 * i + 1];
        const float2 old = ld_shared_f32x2(address + i * 8 * 128);
        st_shared(address + i * 8 * 128, old.x + x, old.y + y);
      }
    }
  }
}

}  // namespace ep_moe
