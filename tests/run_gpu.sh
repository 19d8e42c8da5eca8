#!/usr/bin/env bash
# All tests that need a GPU, on a machine that has one or more: tests/run_gpu.sh [--ranks 2|4|8] [pytest arguments]
#
# --ranks: tests that run with several numbers of ranks run with this one instead, and longer where every rank has a GPU
# of its own: 1000 random shapes, 10,000 graph replays. Ranks share GPUs where there are fewer.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == --ranks ]]; then
  [[ "${2:-}" =~ ^[2-8]$ ]] || { echo "--ranks: expected 2 to 8, got ${2:-nothing}" >&2; exit 2; }
  export EP_MOE_TEST_RANKS=$2
  shift 2
fi
python3 - <<'PY'
import os

import torch

gpus, ranks = torch.cuda.device_count(), int(os.environ.get("EP_MOE_TEST_RANKS", 0))
print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {gpus} GPU(s)")
assert torch.cuda.is_available(), "no GPU here: these tests would all be skipped"
if ranks > gpus:
    print(f"{ranks} ranks share {gpus} GPU(s): this shows that results are right, nothing about time")
PY
python3 csrc/build.py  # the kernels under test are those of this checkout
exec python3 -m pytest -m "gpu or multi_gpu" -rs "$@"
