"""How low-latency kernels reach other ranks: on one host by stores alone, between nodes by puts too.

``csrc/include/low_latency_reach.cuh`` says what a put does. A communicator is the same with either: what differs is the
library that holds its kernels, where symmetric memory comes from, and which ranks stores reach.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import nvlink_low_latency_args as native
from ep_moe.comm.nvlink_args import MAX_RANKS
from ep_moe.comm.symmetric import SymmetricBuffer, allocate_symmetric
from ep_moe.comm.topology import Topology


@dataclass(frozen=True)
class Reach:
    """What a low-latency communicator stands on.

    Attributes:
        library: with the entry points ``<prefix>_dispatch`` and ``<prefix>_combine``.
        prefix: of their names.
        allocate: symmetric memory of so many bytes, which it fills by the function given, with the address of every
            rank's where it is mapped, else 0; collective. It may free what it gave before.
        max_ranks: most ranks of a group.
        node: the ranks that stores reach, between nodes; ``None`` on one host, where they reach all.
    """

    library: ctypes.CDLL
    prefix: str
    allocate: Callable[[int, Callable[[Tensor], object]], SymmetricBuffer]
    max_ranks: int
    node: tuple[int, ...] | None = None


def one_host(group: dist.ProcessGroup, device: torch.device) -> Reach:
    """By stores to memory that is mapped.

    Raises:
        NativeLibraryError: if the CUDA library is missing.
    """
    return Reach(
        native.load_entry_points(),
        "low_latency",
        lambda num_bytes, fill: allocate_symmetric(num_bytes, group, device, fill),
        MAX_RANKS,
    )


def loopback_reach(group: dist.ProcessGroup, topology: Topology, device: torch.device) -> Reach:
    """Between GPUs of one host that pose as GPUs of several nodes: puts are stores too.

    Args:
        group: all ranks.
        topology: of them.
        device: this rank's GPU.

    Raises:
        NativeLibraryError: if the CUDA library is missing.
    """
    return Reach(
        native.load_entry_points(),
        "low_latency_nodes",
        lambda num_bytes, fill: allocate_symmetric(num_bytes, group, device, fill),
        native.MAX_NODE_RANKS,
        tuple(topology.ranks_of_node(topology.node_of(dist.get_rank(group)))),
    )
