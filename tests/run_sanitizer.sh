#!/usr/bin/env bash
# compute-sanitizer over kernels on small shapes:
#   tests/run_sanitizer.sh memcheck|racecheck|synccheck|initcheck experts
#   tests/run_sanitizer.sh memcheck|... normal|low_latency|nodes [ranks]
#
# Only kernels of this library are looked at, and no errors of driver calls, with which PyTorch finds out what a machine
# can do. Ranks share a GPU, one process each.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=${1:-memcheck} kernels=${2:-experts} ranks=${3:-2}
[[ -f tests/sanitize_$kernels.py ]] || { echo "expected experts, normal, low_latency or nodes, got $kernels" >&2; exit 2; }
export PYTHONPATH=$PWD:$PWD/tests TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1
exec compute-sanitizer --tool "$tool" --target-processes all --kernel-name kernel_substring=ep_moe --report-api-errors no --error-exitcode 9 \
  python3 "tests/sanitize_$kernels.py" "$ranks"
