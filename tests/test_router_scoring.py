"""Choice, weights, losses and dropping against Megatron-Core's own routing functions."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)
from torch import Tensor

from ep_moe.config import MoEConfig, RouterConfig
from ep_moe.router import AuxLoss, TopKRouter
from ep_moe.router.capacity import drop_beyond_capacity, expert_capacity
from ep_moe.router.losses import balance_loss, z_loss
from ep_moe.router.scoring import route

EXPERTS = 16
OPTIONS: list[dict[str, Any]] = [
    {},
    {"pre_softmax": True},
    {"pre_softmax": True, "routed_scaling_factor": 2.5},
    {"num_groups": 4, "group_topk": 2},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "expert_bias": True},
    {"score_function": "sigmoid", "expert_bias": True, "num_groups": 4, "group_topk": 2, "routed_scaling_factor": 2.5},
]


def dense(topk_idx: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sparse routing as Megatron's ``[tokens, experts]`` probabilities and map."""
    probs = torch.zeros(len(topk_idx), EXPERTS + 1, dtype=weights.dtype)
    index = torch.where(topk_idx < 0, EXPERTS, topk_idx)
    return probs.scatter(1, index, weights)[:, :EXPERTS], (
        torch.zeros(len(topk_idx), EXPERTS + 1).scatter(1, index, 1.0)[:, :EXPERTS].bool()
    )


def megatron_options(router: RouterConfig, bias: Tensor | None) -> dict[str, Any]:
    return {
        "use_pre_softmax": router.pre_softmax,
        "num_groups": router.num_groups,
        "group_topk": router.group_topk,
        "scaling_factor": router.routed_scaling_factor if router.routed_scaling_factor != 1.0 else None,
        "score_function": router.score_function,
        "expert_bias": bias,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "softmax")
def test_choice_weights_and_gradients_equal_megatrons(options: dict[str, Any], top_k: int, dtype: torch.dtype) -> None:
    router = RouterConfig(**options)
    bias = torch.randn(EXPERTS) * 0.3 if router.expert_bias else None
    logits = torch.randn(50, EXPERTS, dtype=dtype, requires_grad=True)
    theirs = logits.detach().clone().requires_grad_()
    upstream = torch.randn(50, EXPERTS, dtype=dtype)
    probs, chosen = dense(*route(logits, top_k, router, bias))
    (probs * upstream).sum().backward()
    want, want_map = topk_routing_with_score_function(theirs, top_k, **megatron_options(router, bias))
    (want * upstream).sum().backward()
    assert torch.equal(chosen, want_map)
    torch.testing.assert_close(probs, want)
    torch.testing.assert_close(logits.grad, theirs.grad)


def test_one_expert_per_token() -> None:
    logits = torch.randn(20, EXPERTS)
    for options in ({"pre_softmax": True}, {"score_function": "sigmoid"}):
        router = RouterConfig(**options)  # type: ignore[arg-type]
        probs, chosen = dense(*route(logits, 1, router))
        want, want_map = topk_routing_with_score_function(logits, 1, **megatron_options(router, None))
        assert torch.equal(chosen, want_map)
        torch.testing.assert_close(probs, want)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 5),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.3, 4.0]),
    policy=st.sampled_from(["probs", "position"]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_capacity_keeps_the_right_tokens(
    tokens: int, top_k: int, factor: float, policy: Any, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    idx = torch.rand(tokens, 6, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    if ties:
        weights = (weights * 3).ceil() / 3
    kept_idx, kept_weights = drop_beyond_capacity(idx, weights, 6, factor, policy)
    capacity = expert_capacity(tokens, top_k, 6, factor)
    expected = idx.clone()
    for expert in range(6):
        rows = [(t, k) for t in range(tokens) for k in range(top_k) if idx[t, k] == expert]
        if policy == "probs":
            rows.sort(key=lambda row: -float(weights[row]))  # stable: the earlier token wins a tie
        for row in rows[capacity:] if capacity <= tokens else []:
            expected[row] = -1
    assert torch.equal(kept_idx, expected)
    assert torch.equal(kept_weights, torch.where(expected < 0, 0.0, weights))


def test_dropping_by_weight_equals_megatrons() -> None:
    idx, weights = route(torch.randn(64, EXPERTS), 4, RouterConfig())
    got = dense(*drop_beyond_capacity(idx, weights, EXPERTS, 0.7, "probs"))
    want = apply_router_token_dropping(*dense(idx, weights), router_topk=4, capacity_factor=0.7, drop_policy="probs")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert int((~got[1] & dense(idx, weights)[1]).sum()) > 0


class Captured:
    """Records the losses that a router attaches."""

    def __init__(self) -> None:
        self.losses: dict[str, AuxLoss] = {}

    def __call__(self, activation: Tensor, loss: AuxLoss) -> Tensor:
        self.losses[loss.name] = loss
        return activation


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_equal_megatrons_formulas(score_function: Any, padded: bool) -> None:
    sequence, batch, top_k = 12, 3, 2
    captured = Captured()
    config = RouterConfig(
        score_function=score_function,
        aux_loss_coeff=0.02,
        seq_aux_loss_coeff=0.03,
        global_aux_loss_coeff=0.05,
        z_loss_coeff=0.001,
        dtype="fp64",
    )
    router = TopKRouter(8, MoEConfig(num_experts=EXPERTS, top_k=top_k, router=config), attach_loss=captured)
    x = torch.randn(sequence, batch, 8, dtype=torch.float64)
    mask = torch.rand(sequence, batch) < 0.3 if padded else None
    router(x, mask)
    logits = (x.view(-1, 8) @ router.weight.double().T).detach()
    flat_mask = None if mask is None else mask.reshape(-1)
    chosen, scores = compute_routing_scores_for_aux_loss(logits, top_k, score_function, padding_mask=flat_mask)
    counts, valid = chosen.sum(0), float(chosen.sum()) / top_k

    def switch(scores: Tensor, counts: Tensor, tokens: float, coefficient: float) -> Tensor:
        return switch_load_balancing_loss_func(scores, counts, tokens, top_k, EXPERTS, coefficient)

    per_sequence = (
        switch(scores.reshape(sequence, -1), chosen.reshape(sequence, -1).sum(0), valid / batch, 0.03) / batch
    )
    want = {
        "load_balancing_loss": switch(scores, counts, valid, 0.02),
        "seq_load_balancing_loss": per_sequence,
        "global_load_balancing_loss": switch(scores, counts, valid, 0.05),
        "z_loss": z_loss_func(logits, 0.001, padding_mask=flat_mask),
    }
    assert captured.losses.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(captured.losses[name].value.double(), value.double(), rtol=1e-6, atol=1e-12)


def test_loss_gradients() -> None:
    scores = torch.rand(5, EXPERTS, dtype=torch.float64, requires_grad=True)
    counts, tokens = torch.randint(0, 9, (5, EXPERTS)), torch.tensor(30)
    assert torch.autograd.gradcheck(lambda s: balance_loss(s, counts, tokens, 2), scores)
    logits = torch.randn(6, EXPERTS, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, True])
    assert torch.autograd.gradcheck(lambda t: z_loss(t, valid), logits)
    assert float(balance_loss(torch.full((8,), 1.25), torch.full((8,), 5.0), torch.tensor(10), 4)) == pytest.approx(1.0)
