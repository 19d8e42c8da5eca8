#!/usr/bin/env bash
# All tests that need a GPU, on a machine that has one or more: tests/run_gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python3 - <<'PY'
import torch

print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU(s)")
assert torch.cuda.is_available(), "no GPU here: these tests would all be skipped"
PY
python3 csrc/build.py  # the kernels under test are those of this checkout
exec python3 -m pytest -m "gpu or multi_gpu" -rs "$@"
