"""Every communicator that must pass the contract tests; a new one is a line in ``COMMUNICATORS``."""

from __future__ import annotations

import os
from typing import Literal

import pytest
import torch
import torch.distributed as dist

from ep_moe.comm import Communicator, CommunicatorFactory, PortableCommunicator
from ep_moe.comm.low_latency import LowLatencyCommunicator
from ep_moe.comm.low_latency_reach import Reach, loopback_reach
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.portable_low_latency import PortableLowLatencyCommunicator
from ep_moe.comm.topology import topology_of_group
from ep_moe.comm.transport import PortableTransport
from ep_moe.comm.two_hop import two_hop_communicator
from ep_moe.native import NativeLibraryError, open_nvshmem_library

COMMUNICATORS = [
    pytest.param("portable", "cpu", id="portable-cpu"),
    pytest.param("portable", "cuda", id="portable-cuda", marks=pytest.mark.gpu),
    pytest.param("nvlink", "cuda", id="nvlink", marks=pytest.mark.gpu),
    pytest.param("loopback", "cuda", id="loopback", marks=pytest.mark.gpu),
    # Several nodes, of two ranks and of one.
    pytest.param("two_hop", "cpu", id="two-hop-cpu"),
    pytest.param("two_hop_1", "cpu", id="two-hop-1-cpu"),
]


def make_communicator(kind: str, group: dist.ProcessGroup) -> Communicator:
    """The communicator ``kind`` over ``group``."""
    if kind in ("loopback", "nvshmem"):
        return _kernels_between_nodes(kind, group)
    if kind.startswith("two_hop"):
        key = (kind, dist.get_rank(group), dist.get_world_size(group))
        if key not in _two_hop:
            per_node = min(int(kind.removeprefix("two_hop").removeprefix("_") or 2), dist.get_world_size(group))
            topology = topology_of_group(group, per_node)
            _two_hop[key] = two_hop_communicator(group, topology, PortableCommunicator, PortableTransport)
        return _two_hop[key]
    if kind == "nvlink":
        key = (dist.get_rank(group), dist.get_world_size(group))
        if key not in _nvlink:
            _nvlink[key] = NvlinkCommunicator(group, rank_device("cuda", dist.get_rank()), max_tokens=64)
        return _nvlink[key]
    return PortableCommunicator(group)


def _kernels_between_nodes(kind: Literal["loopback", "nvshmem"], group: dist.ProcessGroup) -> Communicator:
    """Two nodes of half the ranks each, on one host: kernels on each node and between them."""
    key = (kind, dist.get_rank(group), dist.get_world_size(group))
    if key not in _two_hop:
        per_node = max(dist.get_world_size(group) // 2, 1)
        factory = CommunicatorFactory("nvlink", group, 64, 30.0, per_node, kind)
        _two_hop[key] = factory.build(rank_device("cuda", dist.get_rank()))
    return _two_hop[key]


_two_hop: dict[tuple[str, int, int], Communicator] = {}
_nvlink: dict[tuple[int, int], NvlinkCommunicator] = {}  # a process is a rank of one pool; buffers are costly


def rank_device(device: str, rank: int) -> torch.device:
    """The device of a rank, made the current one as in a program; ranks share GPUs where there are fewer."""
    if device == "cpu":
        return torch.device("cpu")
    on = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(on)  # CUDA graphs are captured on the current device
    return on


LOW_LATENCY_COMMUNICATORS = [
    pytest.param("portable", "cpu", id="portable-cpu"),
    pytest.param("nvlink", "cuda", id="nvlink", marks=pytest.mark.gpu),
    pytest.param("loopback", "cuda", id="loopback", marks=pytest.mark.gpu),
]


def make_low_latency_communicator(
    kind: str, group: dist.ProcessGroup, max_tokens: int, hidden: int, num_experts: int
) -> LowLatencyCommunicator:
    """The low-latency communicator ``kind`` over ``group``; one for each shape, as in a program.

    ``loopback`` and ``nvshmem`` are two nodes, ``loopback_1`` and ``nvshmem_1`` nodes of one rank.
    """
    key = (kind, dist.get_rank(group), dist.get_world_size(group), max_tokens, hidden, num_experts)
    if key not in _low_latency:
        sizes = {"max_tokens": max_tokens, "hidden": hidden, "num_experts": num_experts}
        if kind == "portable":
            _low_latency[key] = PortableLowLatencyCommunicator(group, **sizes)
        else:
            device = rank_device("cuda", dist.get_rank())
            reach = make_reach(kind, group, device)
            _low_latency[key] = NvlinkLowLatencyCommunicator(group, device, reach=reach, **sizes)
    return _low_latency[key]


def make_reach(kind: str, group: dist.ProcessGroup, device: torch.device) -> Reach | None:
    """How the ranks of a low-latency communicator ``kind`` reach each other."""
    if kind == "nvlink":
        return None
    between, _, per_node = kind.partition("_")
    topology = topology_of_group(group, int(per_node or max(dist.get_world_size(group) // 2, 1)))
    if between == "loopback":
        return loopback_reach(group, topology, device)
    from ep_moe.comm.nvshmem import nvshmem_reach

    return nvshmem_reach(group, topology, device)


def end_nvshmem() -> None:
    """End NVSHMEM on all ranks, with the communicators that use it."""
    from ep_moe.comm import nvshmem

    for key in [key for key in _low_latency if key[0].startswith("nvshmem")]:
        del _low_latency[key]
    nvshmem.shutdown()


def nvshmem_missing() -> str:
    """Why NVSHMEM cannot be tried; empty if it can."""
    try:
        open_nvshmem_library()
    except NativeLibraryError as error:
        return str(error)
    return ""


_low_latency: dict[tuple[str, int, int, int, int, int], LowLatencyCommunicator] = {}


DEEP_EP_DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="nvlink", marks=pytest.mark.gpu),
]


def use_deep_ep(device: str, rank: int) -> torch.device:
    """Let buffers of the DeepEP interface use the communicator that belongs to ``device``; the device of the rank."""
    os.environ["EP_MOE_COMM"] = "portable" if device == "cpu" else "nvlink"
    return rank_device(device, rank)
