// Staging: a rank's tokens into its own symmetric buffer, where peers pull them; as they are, with their scales behind
// the values if they have any, or quantised to e4m3 with one fp32 scale per 128 channels behind the values.
//
// It runs beside the kernels around it: beside the layout ahead of it, which waits for peers while this one waits for
// memory, and beside the dispatch behind it, which pulls what is staged already. Tokens are staged in order, in
// kStagedChunks chunks; whoever completes one tells all ranks. Warps draw their next part by an atomic counter, for
// blocks start when the kernel ahead leaves them room: which warp stages what changes no bit.
//
//   writer                     reader                         ordered by
//   rows[d % 2] (own buffer)   peers, dispatch d              count of the chunk's units: __syncwarp, then
//                                                             atom.acq_rel; then its flag: st.release / ld.acquire
//   (reuse of the copy)        peers, dispatch d - 2          rule (1) of communicator.cuh: this kernel runs after
//                                                             dispatch d - 1 on the same stream
//   the results of the layout  the kernels behind             griddepcontrol_wait of one block here and one of dispatch
#include <cuda_fp8.h>

#include <algorithm>

#include "communicator.cuh"
#include "element.cuh"
#include "launch.cuh"

namespace ep_moe {

struct StageArgs {
  Communicator comm;
  const void* x;        // [tokens][hidden], or [tokens][row_bytes] where rows travel as they are
  const float* scales;  // [tokens][row_scales], of rows that are quantised already; or nullptr
  int64_t wire_bytes;   // from row to row in the symmetric buffer; a multiple of 128
  int32_t row_bytes;    // of a row as it travels, without scales; a multiple of 16
  int32_t row_scales;
  int32_t tokens;
  int32_t hidden;
  int32_t element;   // Element of x, if it is to be quantised
  int32_t quantize;  // to e4m3
  int32_t early;     // the kernel ahead is the layout, which need not have ended
};

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Resident at once, so that dispatch may start beside them. More stage no faster, but what they have under way stands
// in the way of rows that peers pull meanwhile.
constexpr int kBlocksPerSm = 1;
constexpr int kCopyVectors = 4;  // of 16 bytes that a thread copies at once
constexpr int kPerThread = 16;   // channels that make a piece when quantising: 8 threads a block of 128
template <typename T>
constexpr int kQuantizePieces = sizeof(T) == 4 ? 1 : 2;  // that a thread quantises at once
constexpr int kSteps = 4;
constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;

// A rank's tokens cut into pieces, and those into units: what a warp does between two signals, kSteps times what it
// loads at once. A unit lies in a chunk.
struct Units {
  uint32_t chunk_pieces;
  uint32_t pieces;  // 2^32 would be 64 GB
  uint32_t unit_pieces;
  uint32_t units_per_chunk;

  __host__ __device__ Units(const StageArgs& args, int row_pieces, int at_once) {
    chunk_pieces = args.comm.shape.max_tokens / kStagedChunks * row_pieces;
    pieces = static_cast<uint32_t>(args.tokens) * row_pieces;
    unit_pieces = 32 * at_once * kSteps;
    units_per_chunk = (chunk_pieces + unit_pieces - 1) / unit_pieces;
  }

  __host__ __device__ uint32_t units_of(uint32_t chunk) const {
    const uint32_t rest = pieces - chunk * chunk_pieces;
    return rest < chunk_pieces ? (rest + unit_pieces - 1) / unit_pieces : units_per_chunk;
  }

  // With those of the last chunk, which may have fewer.
  __host__ __device__ uint32_t count() const {
    const uint32_t full = pieces / chunk_pieces;
    return full * units_per_chunk + (full * chunk_pieces < pieces ? units_of(full) : 0);
  }
};

// A unit as one lane sees it: every 32nd piece from `first` on, to `end`.
struct Unit {
  uint32_t chunk;
  uint32_t first;
  uint32_t end;

  __device__ Unit(const Units& units, uint32_t unit, int lane) {
    chunk = unit / units.units_per_chunk;
    const uint32_t chunk_start = chunk * units.chunk_pieces;
    const uint32_t start = chunk_start + (unit - chunk * units.units_per_chunk) * units.unit_pieces;
    first = start + lane;
    end = min(min(start + units.unit_pieces, chunk_start + units.chunk_pieces), units.pieces);
  }
};

// A whole warp, which has done its part of a chunk: tells all ranks of the chunk if it was the last part.
__device__ __forceinline__ void finish_unit(const Communicator& comm, const Units& units, uint32_t chunk,
                                            uint32_t dispatch, int lane) {
  __syncwarp();
  if (lane != 0) return;
  uint32_t* finished = &comm.workspace->staged_units[chunk];
  if (atom_add_acq_rel_gpu(finished, 1) != units.units_of(chunk) - 1) return;
  *finished = 0;
#pragma unroll 1
  for (int peer = 0; peer < comm.shape.ranks; ++peer)  // pairs with wait_staged of dispatch.cu
    st_release_sys(part<uint32_t>(comm, peer, comm.layout.staged) + comm.rank * kStagedChunks + chunk, dispatch);
}

// One lane: the next unit that nobody has drawn.
__device__ __forceinline__ uint32_t draw_unit(Workspace* workspace, int lane) {
  return lane == 0 ? atomicAdd(&workspace->staging_units, 1) : 0;
}

// All warps: `Piece::load` and `Piece::store` of all pieces; the loads of a step are under way while the one before is
// stored.
template <int kAtOnce, typename Piece>
__device__ __forceinline__ void stage_units(const StageArgs& args, const Units& units, const Piece& piece) {
  griddepcontrol_launch_dependents();  // dispatch
  Workspace* workspace = args.comm.workspace;
  const int lane = threadIdx.x % 32;
  const uint32_t dispatch = staging_dispatch(args.comm), count = units.count();
  uint32_t unit = __shfl_sync(~0u, draw_unit(workspace, lane), 0);
#pragma unroll 1
  while (unit < count) {
    const uint32_t drawn = draw_unit(workspace, lane);  // arrives while this one is staged
    const Unit place(units, unit, lane);
    typename Piece::Values now[kAtOnce], next[kAtOnce];
    auto load = [&](uint32_t first) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j * 32 < place.end) next[j] = piece.load(first + j * 32);
    };
    load(place.first);
#pragma unroll 1
    for (uint32_t first = place.first; first - lane < place.end; first += 32 * kAtOnce) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) now[j] = next[j];
      load(first + 32 * kAtOnce);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j * 32 < place.end) piece.store(first + j * 32, now[j]);
    }
    finish_unit(args.comm, units, place.chunk, dispatch, lane);
    unit = __shfl_sync(~0u, drawn, 0);
  }
  // Every warp has drawn one unit too many; the last leaves the counter as it was found.
  if (lane == 0 && unit == count + gridDim.x * kWarps - 1) workspace->staging_units = 0;
  // Keeps the kernel from ending before the one ahead has. One block does it, so that those that are done make room.
  if (blockIdx.x == gridDim.x - 1) griddepcontrol_wait();
}

// 16 bytes of a row as it is, with the scale of the same number if the row has so many.
struct CopiedPiece {
  struct Values {
    uint4 vector;
    float scale;
  };
  const StageArgs& args;
  uint8_t* rows;
  uint32_t row_vectors;  // at least row_scales

  __device__ Values load(uint32_t piece) const {
    Values values = {static_cast<const uint4*>(args.x)[piece], 0.0f};
    const uint32_t token = piece / row_vectors, vector = piece - token * row_vectors;
    if (vector < static_cast<uint32_t>(args.row_scales))
      values.scale = args.scales[static_cast<int64_t>(token) * args.row_scales + vector];
    return values;
  }

  __device__ void store(uint32_t piece, const Values& values) const {
    const uint32_t token = piece / row_vectors, vector = piece - token * row_vectors;
    uint8_t* row = rows + token * args.wire_bytes;
    reinterpret_cast<uint4*>(row)[vector] = values.vector;
    if (vector < static_cast<uint32_t>(args.row_scales))
      reinterpret_cast<float*>(row + args.row_bytes)[vector] = values.scale;
  }
};

__global__ void __launch_bounds__(kThreads, 4) copy_kernel(const __grid_constant__ StageArgs args) {
  const uint32_t row_vectors = args.row_bytes / 16;
  uint8_t* rows = part<uint8_t>(args.comm, args.comm.rank, staged_rows(args.comm));
  stage_units<kCopyVectors>(args, Units(args, row_vectors, kCopyVectors), CopiedPiece{args, rows, row_vectors});
}

// kPerThread channels, quantised together with those of the seven lanes that have the same block of 128.
template <typename T>
struct QuantizedPiece {
  static constexpr int kVectors = kPerThread / Vector<T>::kCount;
  struct Values {
    Vector<T> vectors[kVectors];
  };
  const StageArgs& args;
  uint8_t* rows;
  uint32_t row_pieces;  // a multiple of 8, so blocks of channels do not straddle units

  __device__ Values load(uint32_t piece) const {
    Values values;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      values.vectors[v] = static_cast<const Vector<T>*>(args.x)[static_cast<int64_t>(piece) * kVectors + v];
    return values;
  }

  __device__ void store(uint32_t index, const Values& loaded) const {
    const uint32_t token = index / row_pieces, piece = index - token * row_pieces;
    float values[kPerThread];
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      loaded.vectors[v].to_float(reinterpret_cast<float (&)[Vector<T>::kCount]>(values[v * Vector<T>::kCount]));
    float amax = 0.0f;
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) amax = max_nan(amax, fabsf(values[c]));
    const uint32_t lanes = 0xffu << (threadIdx.x % 32 / 8 * 8);
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) amax = max_nan(amax, __shfl_xor_sync(lanes, amax, distance));
    amax = max_nan(amax, kMinAmax);
    const float factor = kE4m3Max / amax;
    __align__(16) __nv_fp8x2_storage_t quantised[kPerThread / 2];
#pragma unroll
    for (int c = 0; c < kPerThread / 2; ++c) {
      const float2 pair = make_float2(values[2 * c] * factor, values[2 * c + 1] * factor);
      quantised[c] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    uint8_t* row = rows + token * args.wire_bytes;
    *reinterpret_cast<uint4*>(row + piece * kPerThread) = *reinterpret_cast<const uint4*>(quantised);
    if (piece % 8 == 0) reinterpret_cast<float*>(row + args.hidden)[piece / 8] = amax / kE4m3Max;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) quantize_kernel(const __grid_constant__ StageArgs args) {
  const uint32_t row_pieces = args.hidden / kPerThread;
  uint8_t* rows = part<uint8_t>(args.comm, args.comm.rank, staged_rows(args.comm));
  stage_units<kQuantizePieces<T>>(args, Units(args, row_pieces, kQuantizePieces<T>),
                                  QuantizedPiece<T>{args, rows, row_pieces});
}

// A kernel and how many pieces a thread takes at once, of so many a row.
struct Staging {
  void (*kernel)(StageArgs);
  int row_pieces;
  int at_once;
};

Staging staging(const StageArgs& args) {
  if (!args.quantize) return {copy_kernel, args.row_bytes / 16, kCopyVectors};
  const int row_pieces = args.hidden / kPerThread;
  switch (static_cast<Element>(args.element)) {
    case Element::kFloat32:
      return {quantize_kernel<float>, row_pieces, kQuantizePieces<float>};
    case Element::kFloat16:
      return {quantize_kernel<__half>, row_pieces, kQuantizePieces<__half>};
    case Element::kBFloat16:
      break;
  }
  return {quantize_kernel<__nv_bfloat16>, row_pieces, kQuantizePieces<__nv_bfloat16>};
}

}  // namespace
}  // namespace ep_moe

// Runs one of the kernels above. To quantise, `hidden` is a multiple of 128.
EP_MOE_API const char* ep_moe_stage(const ep_moe::StageArgs* args, cudaStream_t stream) {
  using namespace ep_moe;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error_text(error, "staging kernel");
  const Staging chosen = staging(*args);
  const uint32_t warps = Units(*args, chosen.row_pieces, chosen.at_once).count();
  // A rank without tokens launches too: dispatch counts on this kernel to stand between it and earlier ones.
  const int blocks = std::clamp<int>((warps + kWarps - 1) / kWarps, 1, kBlocksPerSm * multiprocessors);
  // Dispatch takes nearly all shared memory of an SM. Beside the layout, with which an SM must be set up alike, it
  // starts no sooner for it.
  const LaunchMode mode = args->early ? LaunchMode::kProgrammatic : LaunchMode::kLeavesShared;
  return launch("staging kernel", chosen.kernel, *args, blocks, kThreads, 0, mode, stream);
}

EP_MOE_API size_t ep_moe_stage_args_bytes() { return sizeof(ep_moe::StageArgs); }
