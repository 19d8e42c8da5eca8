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

_NARROW_BYTES = 256  # of rows that are copied once more rather than have a collective of their own


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
        """See :meth:`NodeTransport.exchange`; a collective for each tensor of wide rows, and one for all others."""
        # As bytes, for FP8 dtypes lack most operations.
        chosen = [_as_bytes(tensor) for tensor in tensors]
        if routes.tokens is not None:
            chosen = [rows[routes.tokens] for rows in chosen]
        narrow = [place for place, rows in enumerate(chosen) if rows.shape[1] <= _NARROW_BYTES]
        arrived: list[Tensor] = [
            rows if place in narrow else self._move(rows, routes) for place, rows in enumerate(chosen)
        ]
        if narrow:
            widths = [chosen[place].shape[1] for place in narrow]
            together = self._move(torch.cat([chosen[place] for place in narrow], dim=1), routes)
            for place, rows in zip(narrow, together.split(widths, dim=1), strict=True):
                arrived[place] = rows.clone(memory_format=torch.contiguous_format)
        return [_of_dtype(rows, tensor) for rows, tensor in zip(arrived, tensors, strict=True)]

    def _move(self, rows: Tensor, routes: NodeRoutes) -> Tensor:
        return all_to_all_rows(rows, routes.send_counts, routes.recv_counts, self._group)


def _as_bytes(tensor: Tensor) -> Tensor:
    """uint8 ``[rows, bytes of a row]`` of a contiguous tensor; without elements any strides count as that."""
    if tensor.numel():
        return tensor.view(torch.uint8)
    return tensor.new_empty(tensor.shape[0], tensor.shape[1] * tensor.element_size(), dtype=torch.uint8)


def _of_dtype(rows: Tensor, like: Tensor) -> Tensor:
    """Bytes as rows of another tensor's dtype."""
    return rows.view(like.dtype) if rows.numel() else like.new_empty(rows.shape[0], like.shape[1])
