"""Every communicator that must pass the contract tests; a new one is a line in ``COMMUNICATORS``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ep_moe.comm import Communicator, PortableCommunicator
from ep_moe.comm.nvlink import NvlinkCommunicator

COMMUNICATORS = [
    pytest.param("portable", "cpu", id="portable-cpu"),
    pytest.param("portable", "cuda", id="portable-cuda", marks=pytest.mark.gpu),
    pytest.param("nvlink", "cuda", id="nvlink", marks=pytest.mark.gpu),
]


def make_communicator(kind: str, group: dist.ProcessGroup) -> Communicator:
    """The communicator ``kind`` over ``group``."""
    if kind == "nvlink":
        key = (dist.get_rank(group), dist.get_world_size(group))
        if key not in _nvlink:
            _nvlink[key] = NvlinkCommunicator(group, rank_device("cuda", dist.get_rank()), max_tokens=64)
        return _nvlink[key]
    return PortableCommunicator(group)


_nvlink: dict[tuple[int, int], NvlinkCommunicator] = {}  # a process is a rank of one pool; buffers are costly


def rank_device(device: str, rank: int) -> torch.device:
    """The device of a rank; ranks share GPUs where there are fewer."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if device == "cuda" else torch.device("cpu")
