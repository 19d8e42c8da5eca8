"""How tests start processes: as forks of one that has imported what all of them need.

Importing PyTorch and Megatron costs a process seconds of a core, and a fork of one that has done so nothing. A process
must not use CUDA before it is forked, and who knows what a library does when it finds a GPU; so where there is one,
processes start from nothing.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from multiprocessing.context import ForkServerContext, SpawnContext

import torch

Context = SpawnContext | ForkServerContext
FROM_NOTHING = multiprocessing.get_context("spawn")


@functools.cache
def quickest() -> Context:
    """What starts processes that may have imported anything."""
    if torch.cuda.is_available():
        return FROM_NOTHING
    forking = multiprocessing.get_context("forkserver")
    # Most of the time is Megatron's, which few test files need: only if one of those was collected.
    megatron = ["train_moe", "generate"] if "megatron.core" in sys.modules else []
    forking.set_forkserver_preload(["ep_moe", "pytest", "hypothesis", *megatron])
    return forking
