"""From logits to a choice of experts and their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ep_moe.config import RouterConfig
from ep_moe.router import route_kernels

SelectExperts = Callable[[Tensor, int, int | None, int | None], tuple[Tensor, Tensor]]
"""``(scores [tokens, num_experts], top_k, num_groups, group_topk) -> (values, indices)``, both ``[tokens, top_k]``.

``values`` are the scores at the int64 ``indices`` and carry their gradient, as in :func:`torch.topk`.
"""


def select_experts(
    scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the ``topk`` experts of the highest scores, from the best ``group_topk`` groups where those are given.

    A group scores the sum of its best ``topk // group_topk`` experts (DeepSeek-V2, arXiv 2405.04434, and
    DeepSeek-V3, arXiv 2412.19437).

    Args:
        scores: floating ``[tokens, num_experts]``.
        topk: experts per token.
        num_groups: equal groups of consecutive experts.
        group_topk: groups a token may choose from; None for no limit.

    Returns:
        Values and int64 indices, both ``[tokens, topk]``, in descending order of score.
    """
    if num_groups is None or group_topk is None:
        return torch.topk(scores, topk, dim=-1)
    tokens, num_experts = scores.shape
    per_group = num_experts // num_groups
    with torch.no_grad():
        grouped = scores.detach().view(tokens, num_groups, per_group)
        group_scores = grouped.topk(topk // group_topk, dim=-1).values.sum(-1)
        allowed = torch.zeros(tokens, num_groups, dtype=torch.bool, device=scores.device)
        allowed.scatter_(1, group_scores.topk(group_topk, dim=-1, sorted=False).indices, True)
        excluded = ~allowed.repeat_interleave(per_group, dim=1)
    return torch.topk(scores.masked_fill(excluded, float("-inf")), topk, dim=-1)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision scores of logits of ``dtype`` are computed in: that dtype, but at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def score_distribution(logits: Tensor, score_function: Literal["softmax", "sigmoid"]) -> Tensor:
    """Scores over all experts that sum to one per token: what balance losses and the entropy statistic look at.

    Args:
        logits: floating ``[tokens, num_experts]``.
        score_function: softmax, or sigmoid divided by its sum.

    Returns:
        ``[tokens, num_experts]``, fp32, or fp64 for fp64 logits.
    """
    logits = logits.to(score_dtype(logits.dtype))
    if score_function == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def route(
    logits: Tensor,
    top_k: int,
    router: RouterConfig,
    expert_bias: Tensor | None = None,
    select: SelectExperts = select_experts,
) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts per token and weigh them.

    Scores are fp32 or better, and only the weights are rounded to the dtype of the logits, for scores rounded to
    bf16 would often tie. The bias takes part in the choice only (DeepSeek-V3, arXiv 2408.15664), never in the weights.

    On Hopper or newer GPUs, fp32 logits take one CUDA kernel forward and one backward; others, and all logits where the
    CUDA library was not built or ``select`` is replaced, take PyTorch operations.

    Args:
        logits: floating ``[tokens, num_experts]``.
        top_k: experts per token.
        router: score function, groups and scaling.
        expert_bias: fp32 ``[num_experts]``; with the sigmoid score function only.
        select: makes the choice, by default the highest scores.

    Returns:
        int64 ``[tokens, top_k]`` expert indices, and their weights, same shape, dtype of the logits.
    """
    if select is select_experts and route_kernels.usable(logits, top_k, router):
        return route_kernels.route(logits, top_k, router, expert_bias)
    wide = score_dtype(logits.dtype)
    groups = (router.num_groups, router.group_topk)
    if router.score_function == "sigmoid":
        scores = logits.to(wide).sigmoid()
        if expert_bias is None:
            weights, topk_idx = select(scores, top_k, *groups)
        else:
            _, topk_idx = select(scores.detach() + expert_bias, top_k, *groups)
            weights = scores.gather(1, topk_idx)
        if top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif router.pre_softmax:
        weights, topk_idx = select(logits.softmax(-1, dtype=wide), top_k, *groups)
    else:
        chosen_logits, topk_idx = select(logits, top_k, *groups)
        weights = chosen_logits.softmax(-1, dtype=wide)
    if router.routed_scaling_factor != 1.0:
        weights = weights * router.routed_scaling_factor
    return topk_idx, weights.to(logits.dtype)
