// What goes wrong on the device, as the host gets to know it.
#pragma once

#include <cstdint>

namespace ep_moe {

enum class Step : uint32_t { kNone = 0, kRouting = 1, kRows = 2, kCombine = 3, kWeights = 4, kCall = 5, kNodes = 6 };

enum class Fault : uint32_t { kNone = 0, kTimeout = 1, kExpertRange = 2, kOverflow = 3, kTokens = 4 };

// In host memory that the device can write; the host reads it whenever it likes. The first fault stays.
struct FaultReport {
  uint32_t fault;
  uint32_t step;
  int32_t rank;     // waited for (kTimeout)
  uint32_t round;   // in which it happened
  int64_t value;    // the bad expert (kExpertRange), the rows needed (kOverflow), the tokens of a rank (kTokens)
  int64_t allowed;  // number of experts, or rows or tokens there was room for
};

// Describes the first fault to the host; later ones are its consequences, or will be found again. `reported` is a word
// of device memory, 0 until there is a report.
__device__ inline void report_fault(volatile FaultReport* report, uint32_t* reported, Fault fault, Step step, int rank,
                                    uint32_t round, int64_t value, int64_t allowed) {
  if (atomicExch(reported, 1) != 0) return;
  report->step = static_cast<uint32_t>(step);
  report->rank = rank;
  report->round = round;
  report->value = value;
  report->allowed = allowed;
  __threadfence_system();  // the host must not see the fault before what describes it
  report->fault = static_cast<uint32_t>(fault);
}

}  // namespace ep_moe
