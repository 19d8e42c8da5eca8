"""With how many ranks GPU tests run: a few numbers by default, one of them with ``tests/run_gpu.sh --ranks``."""

from __future__ import annotations

import os

import torch

VARIABLE = "EP_MOE_TEST_RANKS"


def chosen_ranks() -> int | None:
    """The number asked for, if one was."""
    text = os.environ.get(VARIABLE, "")
    return int(text) if text else None


def gpu_ranks(*default: int) -> list[int]:
    """The numbers of ranks to run a test with."""
    chosen = chosen_ranks()
    return list(default) if chosen is None else [chosen]


def gpu_ranks_and_counts(default: dict[int, int], full: int) -> list[tuple[int, int]]:
    """Numbers of ranks, each with how often to repeat a test.

    Args:
        default: the counts for ranks that share a GPU, where kernels take turns and everything is slow.
        full: the count for a number asked for where every rank has a GPU.
    """
    chosen = chosen_ranks()
    if chosen is None:
        return list(default.items())
    shared = chosen > torch.cuda.device_count()
    return [(chosen, default.get(chosen, min(default.values())) if shared else full)]
