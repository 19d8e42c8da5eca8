"""The routes of one dispatch between GPUs, which later exchanges take again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ep_moe.comm.communicator import ExpertSegments, RowLayout
from ep_moe.comm.expert_groups import expert_groups
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_args import ExpertRange


@dataclass(frozen=True)
class Places:
    """Where each arrived token goes, by the addresses that kernels read.

    Attributes:
        memory: in which all of it lies.
        slots: of int32 ``[ranks, slot_tokens, top_k]``, slot of each arrived entry or -1.
        rows: of int32 ``[ranks, slot_tokens]``, place of each arrived token among the received rows or -1.
        owners: of uint8 ``[tokens]``, bit ``r`` for every rank that has an expert of this rank's token.
        counts: of int64 ``[experts]``, real rows of each.
        ends: of int32 ``[experts]``, where its segment ends.
        slot_tokens: tokens of a rank there is room for.
        top_k: experts per token.
        experts: of every rank.
    """

    memory: Tensor
    slots: int
    rows: int
    owners: int
    counts: int
    ends: int
    slot_tokens: int
    top_k: int
    experts: int

    def in_layout(self, layout: RowLayout) -> tuple[int, int]:
        """Address of the places of each arrived token's row, ``[ranks, slot_tokens, n]``, and n."""
        return (self.rows, 1) if layout == "rows" else (self.slots, self.top_k)

    def ranges(self, layout: RowLayout, groups: int) -> list[ExpertRange]:
        """The local experts with whose groups the launches of an exchange move tokens."""
        if layout == "rows":
            return [ExpertRange()]
        return [ExpertRange(first, end, self.experts) for first, end in expert_groups(self.experts, groups)]


@dataclass(frozen=True)
class NvlinkHandle:
    """The routes of one dispatch.

    Attributes:
        num_sms: SMs that kernels may occupy, or ``None``.
        topk_idx: int64 ``[tokens, top_k]``, as dispatched.
        places: of the tokens that arrived.
        segments: of the expert-major rows.
        num_received: rows of a tensor in the layout ``rows``.
        nodes: that tokens came from; ``None`` if they are this rank's own.
    """

    num_sms: int | None
    topk_idx: Tensor
    places: Places
    segments: ExpertSegments
    num_received: int
    nodes: NodeChunks | None = None

    @property
    def tokens(self) -> int:
        """Tokens at this rank."""
        return self.topk_idx.shape[0]

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.places.top_k

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        return self.num_received if layout == "rows" else self.segments.num_rows
