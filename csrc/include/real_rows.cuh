// Which rows of a tensor are real: those before a count that only the device knows, or, packed, in each of the rooms
// that follow each other those before a count of its own. What lies behind a count holds garbage.
#pragma once

#include <cstdint>

namespace ep_moe {

struct RealRows {
  const int32_t* counts;  // one, or with `room` one a room; nullptr if all rows are real
  int64_t rows;           // of the tensor
  int32_t room;           // 0 if the rows are not packed

  // Rows before which all real ones lie.
  __device__ __forceinline__ int64_t end() const {
    return counts == nullptr || room > 0 ? rows : min(rows, static_cast<int64_t>(*counts));
  }

  // Of a row before the end.
  __device__ __forceinline__ bool contain(int64_t row) const { return room == 0 || row % room < counts[row / room]; }
};

}  // namespace ep_moe
