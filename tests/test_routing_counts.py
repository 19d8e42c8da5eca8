"""Counts of a routing for the DeepEP interface: the kernel beside PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ep_moe.compat.deep_ep.routing_counts import count

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SHAPES = [
    (0, 8, 2, 16),
    (1, 1, 1, 1),
    (300, 8, 2, 256),
    (4096, 8, 8, 256),
    (9001, 3, 3, 21),
    (700, 32, 64, 1024),
    (257, 6, 65, 130),
    (500, 16, 144, 288),
]


def routing(tokens: int, top_k: int, num_experts: int, seed: int) -> Tensor:
    """Random experts; some entries are none, and some of these lie outside the range."""
    generator = torch.Generator().manual_seed(seed)
    topk_idx = torch.randint(num_experts, (tokens, top_k), generator=generator)
    none = torch.rand(tokens, top_k, generator=generator) < 0.2
    return topk_idx.masked_fill(none, -1)


def counted_by_loops(topk_idx: Tensor, num_experts: int, ranks: int) -> tuple[list[int], list[int], list[list[bool]]]:
    """The definition."""
    per_expert, in_rank = [0] * num_experts, []
    for entries in topk_idx.tolist():
        for expert in entries:
            if expert >= 0:
                per_expert[expert] += 1
        owners = {expert // (num_experts // ranks) for expert in entries if expert >= 0}
        in_rank.append([rank in owners for rank in range(ranks)])
    return [sum(column) for column in zip(*in_rank, strict=True)] or [0] * ranks, per_expert, in_rank


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("tokens", "top_k", "ranks", "num_experts"), SHAPES)
def test_counts(device: str, tokens: int, top_k: int, ranks: int, num_experts: int) -> None:
    topk_idx = routing(tokens, top_k, num_experts, tokens + ranks)
    for _ in range(2):  # the second time in memory that has been used
        per_rank, per_expert, in_rank = count(topk_idx.to(device), num_experts, ranks)
        assert per_rank.dtype == per_expert.dtype == torch.int32 and in_rank.dtype == torch.bool
        got = per_rank.tolist(), per_expert.tolist(), in_rank.tolist()
        assert got == counted_by_loops(topk_idx, num_experts, ranks)
        in_rank.fill_(True)
        per_rank.fill_(-1)
