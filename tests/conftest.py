"""Shared test setup: import paths, GPU skips, one thread per process."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests", ROOT / "examples", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
# Processes that tests start find the same modules through the environment.
_ahead = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _ahead))
# Threads of several processes would wait for one another's cores: tests have more processes than most machines cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Several ranks may share a GPU in tests.
os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there are not enough GPUs."""
    available = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
        if available < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {available}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
