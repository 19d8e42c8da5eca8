#!/usr/bin/env bash
# compute-sanitizer over the low-latency kernels on small shapes: tests/run_sanitizer.sh [memcheck|racecheck|...] [ranks]
#
# Only kernels of this library are looked at. Ranks share a GPU, one process each.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=${1:-memcheck} ranks=${2:-2}
export PYTHONPATH=$PWD:$PWD/tests TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1
exec compute-sanitizer --tool "$tool" --target-processes all --kernel-name kernel_substring=ep_moe --error-exitcode 9 \
  python3 tests/sanitize_low_latency.py "$ranks"
