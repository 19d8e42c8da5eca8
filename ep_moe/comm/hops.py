"""What an exchange over several nodes is made of: the hop between nodes and the hop within a node, together."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ep_moe.comm.communicator import Dispatched, RowLayout
from ep_moe.comm.nvlink_faults import PeerTimeoutError
from ep_moe.comm.topology import Topology
from ep_moe.comm.transport import NodeRoutes


@dataclass(frozen=True)
class Counts:
    """What the host knows of a dispatch; int64 on the CPU.

    Attributes:
        nodes: ``[ranks, nodes]``, rows that each rank sends to each node.
        bins: ``[local experts + 1, ranks]``: slots of each of this rank's experts, then its rows, by source rank.
    """

    nodes: Tensor
    bins: Tensor

    @property
    def slots(self) -> Tensor:
        """``[local experts, ranks]``, slots by source rank."""
        return self.bins[:-1]

    @property
    def rows(self) -> Tensor:
        """``[1, ranks]``, received rows by source rank."""
        return self.bins[-1:]


class Hops(Protocol):
    """Moves rows over both hops; all ranks call it with the same kinds of rows.

    Tensors of rows and slots are those of the contract: ordered by expert, source rank and token. What comes back to
    the tokens comes as one tensor a node, whose rows are in the order in which they were sent to it.
    """

    def dispatch(
        self,
        payload: Sequence[Tensor],
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        routes: NodeRoutes,
        counts: Counts,
        *,
        num_experts: int,
        layout: RowLayout,
        alignment: int,
        max_rows: int | None,
        num_sms: int | None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts.

        Args:
            payload: contiguous ``[tokens, hidden]``, and ``[tokens, hidden / 128]`` scales of rows in FP8.
            topk_idx: as of a communicator's dispatch, as are the others; values are in range.
            topk_weights: likewise.
            routes: of tokens to nodes.
            counts: of this dispatch.
            num_experts: of all ranks.
            layout: likewise.
            alignment: likewise.
            max_rows: enough for what arrives, or ``None``.
            num_sms: likewise.

        Returns:
            What arrives; its handle, opaque but for ``num_rows(layout)``, names the exchange in the other methods. Of
            its ``routing``, rows from each rank are those from each rank of the node.
        """
        ...

    def dispatch_cached(self, x: Tensor, handle: Any, layout: RowLayout) -> Tensor:
        """Send contiguous rows along the routes of a dispatch."""
        ...

    def dispatch_weights(self, topk_weights: Tensor, handle: Any) -> Tensor:
        """Send contiguous weights along them: ``[num_rows]``."""
        ...

    def combine(self, rows: Tensor, handle: Any, layout: RowLayout) -> Sequence[Tensor]:
        """The sum of each token over the ranks of a node, from each node ``[sent, hidden]``."""
        ...

    def combine_weights(self, row_weights: Tensor, handle: Any) -> Sequence[Tensor]:
        """One value per row, back at its token, from each node ``[sent, top_k]``."""
        ...


@dataclass(frozen=True)
class Place:
    """A rank among all, and in its node.

    Attributes:
        rank: in the whole group.
        topology: of that.
    """

    rank: int
    topology: Topology

    @property
    def node(self) -> int:
        """Of the rank."""
        return self.topology.node_of(self.rank)

    def experts(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """int64, the experts of ``topk_idx`` (in range, or -1) among those of the node, -1 for others."""
        return _experts_of_node(self.node, self.topology.nodes, num_experts, topk_idx.device)[topk_idx]

    @contextmanager
    def ranks_named(self) -> Iterator[None]:
        """Errors of the node's communicator name ranks of the node: say which of the group that is."""
        try:
            yield
        except PeerTimeoutError as error:
            rank = self.topology.ranks_of_node(self.node)[error.rank]
            raise PeerTimeoutError(
                f"node {self.node}, whose rank {error.rank} is rank {rank}: {error}", rank
            ) from error


@functools.lru_cache(maxsize=64)
def _experts_of_node(node: int, nodes: int, num_experts: int, device: torch.device) -> Tensor:
    """int64 ``[num_experts + 1]``: of each expert its number among those of a node or -1; the last is that of -1."""
    here = num_experts // nodes
    table = torch.full((num_experts + 1,), -1, dtype=torch.int64, device=device)
    table[node * here : (node + 1) * here] = torch.arange(here, device=device)
    return table
