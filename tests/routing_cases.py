"""Random inputs of an exchange, built the same on every process from a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("random", "one_expert", "unrouted", "some_unrouted", "repeated", "one_rank")


@dataclass(frozen=True)
class Case:
    """Shapes and routing pattern of one exchange; ``tokens`` has an entry per rank."""

    tokens: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden: int
    pattern: str = "random"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks


def make_inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``x [tokens, hidden]``, ``topk_idx``, ``topk_weights [tokens, top_k]`` of one rank."""
    generator = torch.Generator().manual_seed(case.seed * 1000 + rank)
    tokens, k, experts = case.tokens[rank], case.top_k, case.num_experts
    x = torch.randn(tokens, case.hidden, generator=generator, dtype=torch.float64).to(case.dtype)
    idx = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k]
    if idx.shape[1] < k or case.pattern == "repeated":
        idx = torch.randint(experts, (tokens, k), generator=generator)
    if case.pattern == "one_expert":
        idx = torch.full((tokens, k), experts - 1)
        idx[:, 1:] = -1
    elif case.pattern == "unrouted":
        idx = torch.full((tokens, k), -1)
    elif case.pattern == "some_unrouted":
        idx = torch.where(torch.rand(tokens, k, generator=generator) < 0.5, -1, idx)
    elif case.pattern == "one_rank":
        idx = idx % case.local_experts
    weight_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    weights = torch.rand(tokens, k, generator=generator, dtype=weight_dtype)
    return x, idx.to(torch.int64), torch.where(idx < 0, 0, weights)
