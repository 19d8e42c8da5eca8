// A range of a rank's experts: the part of an exchange that one launch moves.
//
// The rows of consecutive experts are neighbours in an expert-major tensor. A token *arrives* with the first range that
// has a slot of it, and is stored in all its slots; it *leaves* with the last one, when all its rows are there. So
// every token crosses once and its rows are added at once, however many ranges there are.
#pragma once

#include <climits>
#include <cstdint>

namespace ep_moe {

struct ExpertRange {
  int32_t first;
  int32_t end;
  int32_t experts;  // of this rank; 0, as the others, for rows that are not expert-major

  __host__ __device__ bool is_last() const { return end == experts; }
  __host__ __device__ bool is_all() const { return first == 0 && is_last(); }
  __host__ __device__ bool holds(int expert) const { return expert >= first && expert < end; }
};

struct RowRange {
  int first;
  int end;

  // False for -1, which is no slot.
  __device__ __forceinline__ bool holds(int slot) const { return slot >= first && slot < end; }
};

// The rows of a range of experts, whose segments end at `ends`.
__device__ __forceinline__ RowRange rows_of(const ExpertRange& range, const int32_t* ends) {
  return {range.first == 0 ? 0 : ends[range.first - 1], range.is_last() ? INT_MAX : ends[range.end - 1]};
}

}  // namespace ep_moe
