"""Every communicator that must pass the contract tests; a new one is a line in ``COMMUNICATORS``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ep_moe.comm import Communicator, PortableCommunicator

COMMUNICATORS = [
    pytest.param("portable", "cpu", id="portable-cpu"),
    pytest.param("portable", "cuda", id="portable-cuda", marks=pytest.mark.gpu),
]


def make_communicator(kind: str, group: dist.ProcessGroup) -> Communicator:
    """The communicator ``kind`` over ``group``."""
    return {"portable": PortableCommunicator}[kind](group)


def rank_device(device: str, rank: int) -> torch.device:
    """The device of a rank; ranks share GPUs where there are fewer."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if device == "cuda" else torch.device("cpu")
