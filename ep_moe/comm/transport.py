"""The hop between nodes: rows to and from the GPUs that have the same place on other nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.all_to_all import all_to_all_rows


@dataclass(frozen=True)
class NodeRoutes:
    """Which rows go to which node.

    Attributes:
        tokens: int64 ``[sent]``, the row to send, by destination node; ``None`` for all rows in their order.
        send_counts: rows to each node, this one included.
        recv_counts: rows from each node, this one included.
    """

    tokens: Tensor | None
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]

    def back(self) -> NodeRoutes:
        """The way back of what arrived."""
        return dataclasses.replace(self, tokens=None, send_counts=self.recv_counts, recv_counts=self.send_counts)


class NodeTransport(Protocol):
    """Moves rows between the ranks in one place of every node; all of them call it with the same kinds of rows."""

    def exchange(self, tensors: Sequence[Tensor], routes: NodeRoutes) -> list[Tensor]:
        """Send rows of each tensor along the routes, together.

        Args:
            tensors: contiguous ``[rows, width]`` of any dtypes.
            routes: of the rows of all tensors.

        Returns:
            For each tensor ``[received, width]``, by source node, in the order they were sent.
        """
        ...


class PortableTransport:
    """A :class:`NodeTransport` over collectives of a process group: gloo, or NCCL with whatever network it finds."""

    def __init__(self, counterparts: dist.ProcessGroup) -> None:
        """Exchange among ``counterparts``: the ranks in one place of every node, by node."""
        self._group = counterparts

    def exchange(self, tensors: Sequence[Tensor], routes: NodeRoutes) -> list[Tensor]:
        """See :meth:`NodeTransport.exchange`."""
        # FP8 dtypes lack most operations; as bytes they move like any other.
        moved = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
        chosen = moved if routes.tokens is None else [tensor[routes.tokens] for tensor in moved]
        arrived = [all_to_all_rows(rows, routes.send_counts, routes.recv_counts, self._group) for rows in chosen]
        return [rows.view(tensor.dtype) for rows, tensor in zip(arrived, tensors, strict=True)]
