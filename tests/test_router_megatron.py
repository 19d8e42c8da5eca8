"""The router against Megatron-Core's routing functions: choice, weights, gradients, dropping and losses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("megatron.core")

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    get_capacity,
    router_gating_linear,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
    z_loss_func,
)
from torch import Tensor

from ep_moe.config import MoEConfig, RouterConfig
from ep_moe.router import AuxLoss, TopKRouter, attach_loss
from ep_moe.router.capacity import drop_beyond_capacity, expert_capacity
from ep_moe.router.counts import count_assignments
from ep_moe.router.gating import gating_logits
from ep_moe.router.losses import z_loss
from ep_moe.router.scoring import route, score_distribution

EXPERTS, TOKENS, HIDDEN = 16, 64, 12
SCORING: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre-softmax": {"pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid-bias": {"score_function": "sigmoid", "expert_bias": True},
}
# Tolerances (relative, absolute): Megatron's softmax and sigmoid are fp32 even for fp64 logits.
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-5, 1e-6), torch.bfloat16: (2e-2, 1e-2)}


def densify(topk_idx: Tensor, topk_weights: Tensor, num_experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    """Megatron's ``[tokens, experts]`` probabilities and bool map of our sparse routing; -1 goes nowhere."""
    columns = torch.where(topk_idx < 0, num_experts, topk_idx)
    empty = torch.zeros(len(topk_idx), num_experts + 1, dtype=topk_weights.dtype)
    chosen = empty.detach().scatter(1, columns, 1.0).bool()
    return empty.scatter(1, columns, topk_weights)[:, :num_experts], chosen[:, :num_experts]


def megatron_topk(logits: Tensor, top_k: int, router: RouterConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Megatron's routing with the options of our section ``router``."""
    # Older releases round scores to bf16 and then choose, newer ones choose from fp32 scores, as ours does. With fp32
    # logits, to which the rounding of the result is left, all do. Logits that are chosen from are never rounded.
    of_logits = router.score_function == "softmax" and not router.pre_softmax
    probs, chosen = topk_routing_with_score_function(
        logits if of_logits or logits.dtype != torch.bfloat16 else logits.float(),
        top_k,
        use_pre_softmax=router.pre_softmax,
        num_groups=router.num_groups,
        group_topk=router.group_topk,
        scaling_factor=router.routed_scaling_factor,
        score_function=router.score_function,
        expert_bias=bias,
    )
    return probs.type_as(logits), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("grouped", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("scoring", list(SCORING))
def test_routing_and_gradient(scoring: str, grouped: bool, factor: float, top_k: int, dtype: torch.dtype) -> None:
    groups = {"num_groups": 4, "group_topk": min(2, top_k)} if grouped else {}
    router = RouterConfig(routed_scaling_factor=factor, **groups, **SCORING[scoring])
    bias = torch.randn(EXPERTS) * 0.3 if router.expert_bias else None
    ours = torch.randn(TOKENS, EXPERTS, dtype=torch.float64).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    upstream = torch.randn(TOKENS, EXPERTS, dtype=dtype)

    topk_idx, topk_weights = route(ours, top_k, router, bias)
    probs, chosen = densify(topk_idx, topk_weights)
    (probs * upstream).sum().backward()
    want_probs, want_chosen = megatron_topk(theirs, top_k, router, bias)
    (want_probs * upstream).sum().backward()

    rtol, atol = TOLERANCE[dtype]
    assert topk_idx.dtype == torch.int64 and topk_weights.dtype == dtype
    assert torch.equal(chosen, want_chosen)
    torch.testing.assert_close(probs, want_probs, rtol=rtol, atol=atol)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gating_product_and_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Megatron 0.16 looks the name up even where TransformerEngine is missing; with it, its product needs a GPU.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    operands = [torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(EXPERTS, HIDDEN).bfloat16()]
    upstream = torch.randn(TOKENS, EXPERTS, dtype=dtype)
    results = []
    for product in (gating_logits, lambda x, weight, dtype: router_gating_linear(x, weight, None, dtype)):
        x, weight = (operand.clone().requires_grad_() for operand in operands)
        logits = product(x, weight, dtype)
        logits.backward(upstream)
        results.append((logits.detach(), x.grad, weight.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_scores_and_counts_for_losses(top_k: int, dtype: torch.dtype, score_function: Any) -> None:
    logits = torch.randn(TOKENS, EXPERTS, dtype=dtype)
    padding = torch.rand(TOKENS) < 0.3
    chosen, want = compute_routing_scores_for_aux_loss(logits, top_k, score_function, padding_mask=padding)
    scores = score_distribution(logits, score_function)
    torch.testing.assert_close(scores * ~padding.unsqueeze(1), want, check_dtype=False, rtol=1e-5, atol=1e-7)
    counts = count_assignments(scores.topk(top_k).indices, EXPERTS, ~padding)
    assert torch.equal(counts[0], chosen.sum(0))


def test_capacity() -> None:
    for tokens in (0, 1, 7, 64, 1000):
        for top_k in (1, 2, 8):
            for factor in (0.1, 0.5, 1.0, 1.25, 3.0):
                want = get_capacity(num_tokens=tokens * top_k, num_experts=EXPERTS, capacity_factor=factor)
                assert expert_capacity(tokens, top_k, EXPERTS, factor) == want


# Not softmax after top-1: every weight is then 1, and which of the tied tokens Megatron keeps is undefined.
@pytest.mark.parametrize(
    ("scoring", "top_k"),
    [
        (scoring, k)
        for scoring in ("softmax", "pre-softmax", "sigmoid")
        for k in (1, 2, 8)
        if (scoring, k) != ("softmax", 1)
    ],
)
@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.5, 100.0])
def test_dropping_by_weight(factor: float, scoring: str, top_k: int) -> None:
    ours = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    router = RouterConfig(**SCORING[scoring])
    topk_idx, topk_weights = route(ours, top_k, router)
    before, before_map = densify(topk_idx, topk_weights)
    got, got_map = densify(*drop_beyond_capacity(topk_idx, topk_weights, EXPERTS, factor, "probs"))
    want, want_map = apply_router_token_dropping(before, before_map, top_k, factor, drop_policy="probs")
    assert torch.equal(got_map, want_map) and torch.equal(got, want)
    if factor != 1.5:  # there it depends on the logits
        assert bool((got_map != before_map).any()) is (factor <= 1.0)
    upstream = torch.randn_like(got)
    (got_grad,) = torch.autograd.grad(got, ours, upstream, retain_graph=True)
    (want_grad,) = torch.autograd.grad(want, ours, upstream)
    torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 100.0])
def test_dropping_by_position(factor: float, top_k: int) -> None:
    topk_idx, topk_weights = route(torch.randn(TOKENS, EXPERTS), top_k, RouterConfig())
    before, before_map = densify(topk_idx, topk_weights)
    _, got_map = densify(*drop_beyond_capacity(topk_idx, topk_weights, EXPERTS, factor, "position"))
    _, want_map = apply_router_token_dropping(before, before_map, top_k, factor, drop_policy="position")
    # Megatron takes the top-k of a 0/1 map: how many it keeps is defined, which ones is not. Ours: the earliest.
    assert torch.equal(got_map.sum(0), want_map.sum(0))
    capacity = expert_capacity(TOKENS, top_k, EXPERTS, factor)
    assert torch.equal(got_map, before_map & (before_map.cumsum(0) <= capacity))


def test_z_loss() -> None:
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64)
    padding = torch.rand(TOKENS) < 0.3
    torch.testing.assert_close(z_loss(logits), z_loss_func(logits, 1.0))
    torch.testing.assert_close(z_loss(logits, ~padding), z_loss_func(logits, 1.0, padding_mask=padding))


def megatron_losses(
    logits: Tensor, sequences: int, top_k: int, router: RouterConfig, padding: Tensor | None
) -> dict[str, Tensor]:
    """The losses of one micro-batch as Megatron's router puts them together, on one rank."""
    chosen, scores = compute_routing_scores_for_aux_loss(logits, top_k, router.score_function, padding_mask=padding)
    length = len(logits) // sequences
    tokens = float(len(logits)) if padding is None else float(chosen.sum()) / top_k

    def switch(scores: Tensor, chosen: Tensor, tokens: float, coefficient: float) -> Tensor:
        return switch_load_balancing_loss_func(scores, chosen.sum(0), tokens, top_k, EXPERTS, coefficient)  # type: ignore[arg-type]

    by_sequence = switch(
        scores.reshape(length, -1), chosen.reshape(length, -1), tokens / sequences, router.seq_aux_loss_coeff
    )
    return {
        "z_loss": z_loss_func(logits, router.z_loss_coeff, padding_mask=padding),
        "load_balancing_loss": switch(scores, chosen, tokens, router.aux_loss_coeff),
        "seq_load_balancing_loss": by_sequence / sequences,
        "global_load_balancing_loss": switch(scores, chosen, tokens, router.global_aux_loss_coeff),
    }


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_module_losses(score_function: Any, top_k: int, padded: bool) -> None:
    sequence, batch = 9, 4
    config = RouterConfig(
        score_function=score_function,
        pre_softmax=True,
        aux_loss_coeff=0.02,
        seq_aux_loss_coeff=0.03,
        global_aux_loss_coeff=0.05,
        z_loss_coeff=0.001,
        dtype="fp64",
    )
    captured: dict[str, AuxLoss] = {}

    def attach(activation: Tensor, loss: AuxLoss) -> Tensor:
        captured[loss.name] = loss
        return attach_loss(activation, loss)

    moe = MoEConfig(num_experts=EXPERTS, top_k=top_k, router=config)
    router = TopKRouter(
        HIDDEN, moe, attach_loss=attach, dtype=torch.float64, init_method=lambda w: torch.nn.init.normal_(w, std=0.5)
    )
    x = torch.randn(sequence, batch, HIDDEN, dtype=torch.float64)
    mask = torch.rand(sequence, batch) < 0.3 if padded else None
    (router(x, mask).topk_weights * 0.0).sum().backward()

    weight = router.weight.detach().clone().requires_grad_()
    flat_mask = None if mask is None else mask.reshape(-1)
    want = megatron_losses(x.view(-1, HIDDEN) @ weight.T, batch, top_k, config, flat_mask)
    assert list(captured) == list(want)
    coefficients = (0.001, 0.02, 0.03, 0.05)
    for (name, loss), coefficient in zip(captured.items(), coefficients, strict=True):
        torch.testing.assert_close(loss.value, want[name], rtol=1e-6, atol=1e-9, check_dtype=False)
        assert loss.coefficient == coefficient and loss.group is None
        assert int(loss.valid_tokens) == sequence * batch - (0 if mask is None else int(mask.sum()))
    sum(want.values()).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-5, atol=1e-8)
