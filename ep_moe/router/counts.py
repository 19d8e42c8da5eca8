"""Counting assignments per expert."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def count_assignments(topk_idx: Tensor, num_experts: int, valid: Tensor | None, sequences: int = 1) -> Tensor:
    """Count how often each expert was chosen, per sequence.

    Args:
        topk_idx: int64 ``[tokens, top_k]``, -1 for not routed; token ``t`` belongs to sequence ``t % sequences``.
        num_experts: experts over all ranks.
        valid: bool ``[tokens]``, the tokens that count; None for all.
        sequences: number of interleaved sequences.

    Returns:
        int64 ``[sequences, num_experts]``.
    """
    tokens = topk_idx.shape[0]
    counted = topk_idx >= 0 if valid is None else (topk_idx >= 0) & valid.unsqueeze(1)
    sequence = torch.arange(tokens, device=topk_idx.device).unsqueeze(1) % max(sequences, 1)
    # What does not count goes to an extra bin: selecting the rest would need its number on the host.
    bins = torch.where(counted, sequence * num_experts + topk_idx, sequences * num_experts).flatten()
    counts = torch.zeros(sequences * num_experts + 1, dtype=torch.int64, device=topk_idx.device)
    counts.scatter_add_(0, bins, torch.ones_like(bins))
    return counts[:-1].view(sequences, num_experts)


def sum_over_group(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``counts`` over the ranks of ``group``, in place; None stands for this rank alone."""
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts
