"""Dropping what exceeds the capacity of an expert."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows an expert takes from one rank: ``factor`` times the fair share of ``tokens * top_k`` rows, rounded up."""
    return math.ceil(tokens * top_k / num_experts * factor)


def drop_beyond_capacity(
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    factor: float,
    policy: Literal["probs", "position"],
) -> tuple[Tensor, Tensor]:
    """Drop the assignments beyond each expert's capacity; deterministic and without host synchronisation.

    Weights of the remaining assignments are not renormalised. Nothing is dropped where the capacity exceeds the
    number of tokens (Switch Transformer, arXiv 2101.03961, for capacities; the policies are Megatron-Core's).

    Args:
        topk_idx: int64 ``[tokens, top_k]``; no expert twice for a token.
        topk_weights: floating ``[tokens, top_k]``.
        num_experts: experts over all ranks.
        factor: capacity factor, see :func:`expert_capacity`.
        policy: an expert keeps its largest weights (the earlier token wins a tie), or its earliest tokens.

    Returns:
        The two tensors, with index -1 and weight 0 where dropped.
    """
    tokens, top_k = topk_idx.shape
    capacity = expert_capacity(tokens, top_k, num_experts, factor)
    if capacity > tokens:
        return topk_idx, topk_weights
    keep = _place_in_expert(topk_idx, topk_weights, num_experts, policy) < capacity
    return topk_idx.masked_fill(~keep, -1), topk_weights.masked_fill(~keep, 0.0)


def _place_in_expert(topk_idx: Tensor, topk_weights: Tensor, num_experts: int, policy: str) -> Tensor:
    """The place of every assignment in its expert's order of preference, ``[tokens, top_k]``."""
    experts = topk_idx.flatten()
    if policy == "probs":
        # Sorting by weight and then, stably, by expert orders by (expert, weight); ties stay in token order.
        by_weight = topk_weights.detach().flatten().argsort(descending=True, stable=True)
        order = by_weight[experts[by_weight].argsort(stable=True)]
    else:
        order = experts.argsort(stable=True)
    every_expert = torch.arange(num_experts, device=experts.device)
    sorted_experts = experts[order]
    starts = torch.searchsorted(sorted_experts, every_expert)
    places = torch.arange(len(experts), device=experts.device) - starts[sorted_experts]
    return torch.empty_like(places).scatter_(0, order, places).view_as(topk_idx)
