"""Where rows go: pure index arithmetic on routing decisions, without communication.

The source side decides which (token, rank) pairs travel: a token crosses to a rank once, however many of that
rank's experts want it. The receiving side decides which slots of the expert-major tensor each arrived row fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm.communicator import ExpertSegments


@dataclass(frozen=True)
class SendLayout:
    """The (token, rank) pairs that leave this rank, ordered by rank, then token.

    Attributes:
        tokens: int64 ``[sent]``, the token of each pair.
        owned: bool ``[sent, top_k]``, which of the token's top-k entries belong to the pair's rank.
        local_experts: int32 ``[sent, top_k]``, the expert's index on that rank, or -1 where not ``owned``.
        rows_per_rank: int64 ``[ranks]``.
        rows_per_expert: int64 ``[num_experts]``; this rank's contribution to every expert.
    """

    tokens: Tensor
    owned: Tensor
    local_experts: Tensor
    rows_per_rank: Tensor
    rows_per_expert: Tensor


def send_layout(topk_idx: Tensor, num_experts: int, ranks: int) -> SendLayout:
    """Lay out what this rank sends for ``topk_idx`` (int64 ``[tokens, top_k]``, -1 for not routed)."""
    experts_per_rank = num_experts // ranks
    owner = torch.where(topk_idx < 0, ranks, topk_idx // experts_per_rank)
    wanted = torch.zeros(topk_idx.shape[0], ranks + 1, dtype=torch.bool, device=topk_idx.device)
    wanted.scatter_(1, owner, True)
    pairs = wanted[:, :ranks].t().nonzero()
    rank, tokens = pairs[:, :1], pairs[:, 1]
    owned = owner[tokens] == rank
    local_experts = torch.where(owned, topk_idx[tokens] - rank * experts_per_rank, -1).to(torch.int32)
    routed = torch.where(topk_idx < 0, num_experts, topk_idx).flatten()
    return SendLayout(
        tokens=tokens,
        owned=owned,
        local_experts=local_experts,
        rows_per_rank=wanted[:, :ranks].sum(0),
        rows_per_expert=torch.bincount(routed, minlength=num_experts + 1)[:num_experts],
    )


@dataclass(frozen=True)
class ExpertLayout:
    """Which slots of the expert-major tensor the arrived rows fill.

    Attributes:
        segments: the segment of each local expert.
        entries: int64 ``[filled]``, index into the flattened ``[arrived, top_k]`` entries, in slot order.
        slots: int64 ``[filled]``, the slot each of these entries fills.
        slot_of: int64 ``[arrived, top_k]``, the inverse; -1 where an entry fills no slot.
    """

    segments: ExpertSegments
    entries: Tensor
    slots: Tensor
    slot_of: Tensor


def expert_layout(local_experts: Tensor, counts: list[int], alignment: int) -> ExpertLayout:
    """Assign slots in the order local expert, arrival (source rank, token), position among the token's top-k.

    Args:
        local_experts: int32 ``[arrived, top_k]``, the expert on this rank or -1.
        counts: rows of each local expert.
        alignment: segments are padded to a multiple of this.
    """
    device = local_experts.device
    sizes = tuple(-(-count // alignment) * alignment for count in counts)
    filled = sum(counts)
    flat = local_experts.flatten()
    # A stable sort puts unrouted entries (mapped past the last expert) behind the filled ones.
    entries = torch.where(flat < 0, len(counts), flat).argsort(stable=True)[:filled]

    count = torch.tensor(counts, dtype=torch.int64, device=device)
    size = torch.tensor(sizes, dtype=torch.int64, device=device)
    padding_before = (size.cumsum(0) - size) - (count.cumsum(0) - count)
    slots = torch.arange(filled, device=device) + padding_before.repeat_interleave(count, output_size=filled)
    slot_of = torch.full_like(flat, -1, dtype=torch.int64)
    slot_of[entries] = slots
    return ExpertLayout(
        segments=ExpertSegments(counts=count, ends=size.cumsum(0).to(torch.int32), sizes=sizes),
        entries=entries,
        slots=slots,
        slot_of=slot_of.view(local_experts.shape),
    )


def sum_by_token(returned: Sequence[Tensor], tokens: Tensor, num_tokens: int, accumulate: torch.dtype) -> Tensor:
    """Add returned rows to their tokens, source by source in ascending order.

    Args:
        returned: from each source ``[rows, width]``.
        tokens: int64 ``[all rows]``, the token of each row; a source returns a token once.
        num_tokens: rows of the result.
        accumulate: dtype of the sum and of the result, ``[num_tokens, width]``.
    """
    out = returned[0].new_zeros((num_tokens, returned[0].shape[1]), dtype=accumulate)
    for values, of in zip(returned, tokens.split([len(values) for values in returned]), strict=True):
        # A source returns a token once, so no two additions of one call meet: the result is reproducible.
        out.index_add_(0, of, values.to(accumulate))
    return out
