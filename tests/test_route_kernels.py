"""The routing kernels against PyTorch operations in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ep_moe.config import RouterConfig
from ep_moe.router import route_kernels
from ep_moe.router.scoring import route

pytestmark = pytest.mark.gpu

SCORING: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre-softmax": {"pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid"},
    "bias": {"score_function": "sigmoid", "expert_bias": True},
}
# experts, top_k, groups, groups to choose from
SHAPES = [
    (1, 1, None, None),
    (8, 2, None, None),
    (33, 5, None, None),
    (60, 4, 4, 2),
    (128, 8, None, None),
    (256, 8, 8, 4),
    (256, 9, 16, 3),
    (320, 32, 32, 32),
    (1024, 32, 2, 1),
]


def spread_logits(tokens: int, experts: int) -> Tensor:
    """fp32 logits in random order that no rounding of scores makes equal."""
    order = torch.rand(tokens, experts, device="cuda").argsort(1)
    return (order * (8.0 / experts) - 4.0).float()


def group_margin(logits: Tensor, best: int, groups: int, group_topk: int, scoring: str, bias: Tensor | None) -> Tensor:
    """By how much the last chosen group of each token is better than the next, relative to it, ``[tokens]``."""
    exact = logits.double()
    scores = {"softmax": exact, "pre-softmax": exact.softmax(1)}.get(scoring, exact.sigmoid())
    choice = scores if bias is None else scores + bias
    sums = choice.view(len(logits), groups, -1).topk(best).values.sum(2).sort(descending=True).values
    if group_topk == groups:
        return torch.full_like(sums[:, 0], torch.inf)
    return (sums[:, group_topk - 1] - sums[:, group_topk]) / sums.abs().sum(1)


@pytest.mark.parametrize("scoring", list(SCORING))
@pytest.mark.parametrize(("experts", "top_k", "groups", "group_topk"), SHAPES)
def test_matches_fp64(scoring: str, experts: int, top_k: int, groups: int | None, group_topk: int | None) -> None:
    config = RouterConfig(num_groups=groups, group_topk=group_topk, routed_scaling_factor=2.5, **SCORING[scoring])
    # Whole numbers, so that scores which differ still do when they are added.
    bias = torch.randint(3, (experts,), device="cuda").float() if scoring == "bias" else None
    logits = spread_logits(257, experts)
    if groups is not None and group_topk is not None:
        logits = logits[group_margin(logits, top_k // group_topk, groups, group_topk, scoring, bias) > 1e-5]
        assert len(logits) > 200
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    assert route_kernels.usable(logits, top_k, config) and not route_kernels.usable(exact, top_k, config)
    topk_idx, weights = route(logits, top_k, config, bias)
    want_idx, want = route(exact, top_k, config, bias)
    assert torch.equal(topk_idx, want_idx)
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(weights)
    weights.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]

    again = logits.detach().clone().requires_grad_()
    repeated = route(again, top_k, config, bias)[1]
    repeated.backward(grad)
    assert torch.equal(repeated, weights) and torch.equal(again.grad, logits.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("scoring", list(SCORING))
def test_of_equal_experts_the_first_are_chosen(scoring: str) -> None:
    logits = torch.zeros(5, 100, device="cuda")
    bias = torch.zeros(100, device="cuda") if scoring == "bias" else None
    config = RouterConfig(num_groups=10, group_topk=2, **SCORING[scoring])
    topk_idx, weights = route(logits, 16, config, bias)
    assert topk_idx.tolist() == [list(range(16))] * 5
    torch.testing.assert_close(weights, torch.full_like(weights, 0.01 if scoring == "pre-softmax" else 1 / 16))


def test_extreme_logits() -> None:
    infinite = float("inf")
    logits = torch.tensor([[-infinite, 3.0, -infinite, 1.0], [float("nan"), 1.0, 2.0, 3.0]], device="cuda")
    topk_idx, weights = route(logits, 2, RouterConfig())
    assert topk_idx.tolist() == [[1, 3], [0, 3]]
    torch.testing.assert_close(weights[0], torch.tensor([3.0, 1.0], device="cuda").softmax(0))
    assert weights[1].isnan().all()


def test_no_tokens() -> None:
    logits = torch.empty(0, 8, device="cuda", requires_grad=True)
    topk_idx, weights = route(logits, 2, RouterConfig())
    assert topk_idx.shape == weights.shape == (0, 2)
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 8)


def test_any_strides() -> None:
    logits = spread_logits(16, 64).t().contiguous().t().requires_grad_()
    topk_idx, weights = route(logits, 4, RouterConfig())
    assert torch.equal(topk_idx, logits.topk(4).indices)
    weights[:, 0].sum().backward()  # an expanded, strided gradient
    assert logits.grad is not None and (logits.grad != 0).sum() == 64
