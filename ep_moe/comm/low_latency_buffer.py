"""The symmetric buffer of low-latency kernels: where the rows, sums and routing of other ranks land."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm import nvlink_low_latency_args as native
from ep_moe.comm.low_latency_reach import Reach
from ep_moe.comm.symmetric import SymmetricBuffer


@dataclass(frozen=True)
class LandingBuffer:
    """A buffer of one shape, filled with the words that say that nothing has landed.

    Attributes:
        shape: that it has room for.
        layout: of its parts.
        memory: of all ranks.
        nodes: a ``LowLatencyNodes`` on the device, between nodes.
        own: the place of this rank among ``pointers``.
        pointers: the buffers that kernels know by their arguments.
    """

    shape: native.LowLatencyShape
    layout: native.LowLatencyLayout
    memory: SymmetricBuffer
    nodes: Tensor | None
    own: int
    pointers: tuple[int, ...]


def allocate_landing(reach: Reach, shape: native.LowLatencyShape, rank: int, device: torch.device) -> LandingBuffer:
    """Allocate one; collective, since all ranks pass the same shape. Waits until the device is done with an older one.

    Args:
        reach: of the kernels; it gives the memory.
        shape: what there must be room for.
        rank: this one.
        device: its GPU.
    """
    library, layout, staging = native.load_entry_points(), native.LowLatencyLayout(), native.LowLatencyStaging()
    library.ep_moe_low_latency_layout(ctypes.byref(shape), ctypes.byref(layout))
    library.ep_moe_low_latency_staging(ctypes.byref(shape), ctypes.byref(staging))
    torch.cuda.synchronize(device)

    def fill(local: Tensor) -> None:
        words = local.view(torch.int32)
        words[: layout.rows // 4] = 0
        words[layout.rows // 4 : layout.weights // 4] = native.EMPTY_WORD
        words[layout.weights // 4 : layout.total // 4] = native.EMPTY_WEIGHT

    if reach.node is None:
        memory = reach.allocate(layout.total, fill)
        return LandingBuffer(shape, layout, memory, None, rank, memory.pointers)
    memory = reach.allocate(staging.total, fill)
    # Stores reach the ranks of the node whose memory is mapped.
    near = sum(1 << other for other in reach.node if memory.pointers[other] != 0)
    buffers = (ctypes.c_void_p * native.MAX_NODE_RANKS)(*memory.pointers)
    nodes = native.LowLatencyNodes(buffers=buffers, staging=staging, near=near)
    on_device = torch.frombuffer(bytearray(nodes), dtype=torch.uint8).to(device)
    return LandingBuffer(shape, layout, memory, on_device, 0, (memory.local.data_ptr(),))
