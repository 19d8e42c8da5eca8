"""Routers, inputs and oracles that the router tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ep_moe.config import MoEConfig, RouterConfig
from ep_moe.router import (
    AuxLoss,
    LossAttacher,
    TopKRouter,
    attach_loss,
)

HIDDEN, EXPERTS, TOP_K = 12, 8, 2
BIASED: dict[str, Any] = {"score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.25}
LOSSES: dict[str, Any] = {
    "aux_loss_coeff": 0.02,
    "seq_aux_loss_coeff": 0.03,
    "global_aux_loss_coeff": 0.05,
    "z_loss_coeff": 0.07,
}
SCORING: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre-softmax": {"pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid"},
    "groups": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
}
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def make_router(
    *,
    top_k: int = TOP_K,
    attach: LossAttacher = attach_loss,
    micro_batch_group: dist.ProcessGroup | None = None,
    global_batch_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> TopKRouter:
    """An fp64 router with the given options of the section ``router``."""
    moe = MoEConfig(num_experts=EXPERTS, top_k=top_k, router=RouterConfig(**{"dtype": "fp64", **options}))
    return TopKRouter(
        HIDDEN,
        moe,
        init_method=lambda w: nn.init.normal_(w, std=0.5),
        micro_batch_group=micro_batch_group,
        global_batch_group=global_batch_group,
        attach_loss=attach,
        dtype=torch.float64,
    )


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Captured:
    """Keeps the losses a router attaches, by name, and attaches them."""

    def __init__(self) -> None:
        self.losses: list[AuxLoss] = []

    def __call__(self, activation: Tensor, loss: AuxLoss) -> Tensor:
        self.losses.append(loss)
        return attach_loss(activation, loss)

    def take(self) -> dict[str, float]:
        """The values since the last call."""
        values = {loss.name: float(loss.value.detach()) for loss in self.losses}
        assert len(values) == len(self.losses)
        self.losses.clear()
        return values


def counts_of(topk_idx: Tensor) -> Tensor:
    return torch.bincount(topk_idx[topk_idx >= 0], minlength=EXPERTS).double()


def balance_oracle(scores: Tensor, counts: Tensor, total: int, top_k: int = TOP_K) -> Tensor:
    """``E * sum_e f_e * P_e``."""
    return EXPERTS * sum(counts[e] / (top_k * total) * scores[:, e].sum() / total for e in range(EXPERTS))


def select_oracle(scores: list[float], top_k: int, num_groups: int, group_topk: int) -> list[int]:
    """Experts of one token in plain Python, best first."""
    per_group = len(scores) // num_groups
    groups = [list(range(g * per_group, (g + 1) * per_group)) for g in range(num_groups)]

    def group_score(group: list[int]) -> float:
        return sum(sorted((scores[e] for e in group), reverse=True)[: top_k // group_topk])

    allowed = [e for group in sorted(groups, key=group_score, reverse=True)[:group_topk] for e in group]
    return sorted(allowed, key=lambda e: scores[e], reverse=True)[:top_k]
