"""The routes of one dispatch between GPUs, which later exchanges take again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ep_moe.comm.communicator import ExpertSegments, RowLayout
from ep_moe.comm.expert_groups import expert_groups
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_args import ExpertRange


@dataclass(frozen=True)
class NvlinkHandle:
    """The routes of one dispatch.

    Attributes:
        experts_per_rank: local experts of every rank.
        num_sms: SMs that kernels may occupy, or ``None``.
        topk_idx: int64 ``[tokens, top_k]``, as dispatched.
        slots: int32 ``[ranks, slot_tokens, top_k]``, slot of each arrived entry or -1.
        rows: int32 ``[ranks, slot_tokens]``, place of each arrived token among the received rows or -1.
        owners: uint8 ``[tokens]``, bit ``r`` for every rank that has an expert of the token.
        segments: of the expert-major rows.
        num_received: rows of a tensor in the layout ``rows``.
        nodes: that tokens came from; ``None`` if they are this rank's own.
    """

    experts_per_rank: int
    num_sms: int | None
    topk_idx: Tensor
    slots: Tensor
    rows: Tensor
    owners: Tensor
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
        return self.topk_idx.shape[1]

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        return self.num_received if layout == "rows" else self.segments.num_rows

    def places(self, layout: RowLayout) -> tuple[Tensor, int]:
        """Where each arrived token's row goes, ``[ranks, slot_tokens, ...]``, and the places of a token."""
        return (self.rows, 1) if layout == "rows" else (self.slots, self.top_k)

    def ranges(self, layout: RowLayout, groups: int) -> list[ExpertRange]:
        """The local experts with whose groups the launches of an exchange move tokens."""
        if layout == "rows":
            return [ExpertRange()]
        experts = self.experts_per_rank
        return [ExpertRange(first, end, experts) for first, end in expert_groups(experts, groups)]
