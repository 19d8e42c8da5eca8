"""Symmetric memory of a group: one buffer per rank, mapped by all ranks, from PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SymmetricBuffer:
    """A buffer of the same size on every rank.

    Attributes:
        local: uint8 ``[bytes]`` of this rank; keeps the memory alive.
        pointers: address, in this process, of every rank's buffer.
    """

    local: Tensor
    pointers: tuple[int, ...]


def allocate_symmetric(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device, fill: Callable[[Tensor], object] = Tensor.zero_
) -> SymmetricBuffer:
    """Allocate a buffer on every rank of ``group``, ``fill`` it and map all of them; collective.

    Peers must be GPUs of one host that can access each other, or the same GPU
    (with ``TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1``).

    PyTorch tells one rendezvous from the next by counting those of a process over all its groups: ranks that meet must
    have met equally often, also in groups of which only one of them is a member, or they wait for each other for ever.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    if dist.get_world_size(group) == 1:
        local = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        fill(local)
        return SymmetricBuffer(local, (local.data_ptr(),))
    local = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    mapped = symmetric_memory.rendezvous(local, group.group_name)
    fill(local)
    torch.cuda.synchronize(device)
    dist.barrier(group)  # nobody writes into a buffer before its owner has filled it
    return SymmetricBuffer(local, tuple(mapped.buffer_ptrs))
