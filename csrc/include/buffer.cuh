// The symmetric buffer of a communicator: its parts, and where they lie.
//
// Every rank has one, of the same layout; offsets are from its start. `chunk` is 32 consecutive tokens of a rank.
// Parts written by peers are indexed by the writer's rank.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ep_moe {

constexpr int kMaxRanks = 8;
constexpr int kMaxNodes = 32;
constexpr int kMaxTopK = 32;
constexpr int kMaxExperts = 1024;
constexpr int kChunkTokens = 32;
constexpr int kCombineGroup = 8;  // tokens that share a landing flag
constexpr uint16_t kNotRouted = 0xffff;

struct BufferShape {
  int32_t ranks;
  int32_t max_tokens;  // of a rank; a multiple of kChunkTokens
  int32_t max_top_k;
  int32_t row_places;     // for the rows of as many ranks: all that push here, or two copies of what nodes send
  int64_t max_row_bytes;  // of a row as it travels; a multiple of 16
};

struct BufferLayout {
  int64_t entered;        // uint32 [ranks]: the round each peer has entered
  int64_t chunk_flags;    // uint64 [2][ranks][chunks]: round << 32 | tokens in the chunk
  int64_t ready;          // uint32 [ranks]: the last dispatch that each peer may be sent rows for
  int64_t landed;         // uint32 [ranks][max_tokens]: the last dispatch that the token's row was pushed here for
  int64_t arrivals;       // uint32 [ranks][chunks]: the last dispatch that the chunk arrived for from a node
  int64_t landing_flags;  // uint32 [ranks][max_tokens / kCombineGroup]: round
  int64_t weight_flags;   // uint32 [ranks]: round
  int64_t routing;        // uint16 [2][ranks][max_tokens][top_k rounded up to 8]: expert or kNotRouted
  int64_t weights;        // float [2][ranks][max_tokens][max_top_k]
  int64_t rows;           // [row_places][max_tokens] rows that ranks pushed here; where they come from other nodes,
                          // two copies of those of this rank, which peers pull
  int64_t landing;        // [ranks - 1][max_tokens] rows that peers pushed; this rank needs no place
  int64_t total;          // bytes
};

__host__ __device__ inline int routing_stride(int max_top_k) { return (max_top_k + 7) / 8 * 8; }

inline BufferLayout buffer_layout(const BufferShape& shape) {
  const int64_t ranks = shape.ranks, tokens = shape.max_tokens, top_k = shape.max_top_k;
  int64_t end = 0;
  auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end = (end + bytes + 255) / 256 * 256;
    return start;
  };
  BufferLayout layout;
  layout.entered = place(ranks * 4);
  layout.chunk_flags = place(2 * ranks * (tokens / kChunkTokens) * 8);
  layout.ready = place(ranks * 4);
  layout.landed = place(ranks * tokens * 4);
  layout.arrivals = place(ranks * (tokens / kChunkTokens) * 4);
  layout.landing_flags = place(ranks * (tokens / kCombineGroup) * 4);
  layout.weight_flags = place(ranks * 4);
  layout.routing = place(2 * ranks * tokens * routing_stride(shape.max_top_k) * 2);
  layout.weights = place(2 * ranks * tokens * top_k * 4);
  layout.rows = place(shape.row_places * tokens * shape.max_row_bytes);
  layout.landing = place((ranks - 1) * tokens * shape.max_row_bytes);
  layout.total = end;
  return layout;
}

}  // namespace ep_moe
