"""The first projection with SwiGLU in one call of a back end: results, gradients, and what it keeps for them."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from expert_cases import HIDDEN, check_against_oracle, make_experts, make_segments
from gemm_doubles import fused_swiglu
from torch import Tensor

from ep_moe.experts import backends, grouped
from ep_moe.experts.deferred import DeferredGradients
from ep_moe.experts.swiglu import activated, swiglu_linear


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let experts run on a back end that fuses SwiGLU; returns whether each call kept pre-activations."""
    calls: list[bool] = []

    def swiglu(*args: Any, keep: bool, **outputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        calls.append(keep)
        return fused_swiglu(*args, keep=keep, **outputs)

    gemm = dataclasses.replace(backends.LOOP, swiglu=swiglu)
    monkeypatch.setattr(grouped, "select_backend", lambda *args, **kwargs: gemm)
    return calls


@pytest.mark.parametrize("weighted", [True, False])
def test_fused_activation_matches_oracle(weighted: bool, kept: list[bool]) -> None:
    check_against_oracle("loop", "swiglu", torch.float64, [3, 0, 7, 1, 0], weighted=weighted)
    check_against_oracle("loop", "swiglu", torch.float64, [0, 5, 9], alignment=4, weighted=weighted)
    assert kept == [True, True]
    check_against_oracle("loop", "geglu", torch.float64, [2, 4], weighted=weighted)
    assert len(kept) == 2


def test_fused_activation_lets_go_of_pre_activations_before_the_last_gradients(kept: list[bool]) -> None:
    gemm = grouped.select_backend("auto")  # type: ignore[call-arg]
    held: list[weakref.ref[Tensor]] = []

    def swiglu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, pre_activation = gemm.swiglu(*args, **kwargs)
        assert pre_activation is not None
        held.append(weakref.ref(pre_activation))
        return out, pre_activation

    def dgrad(*args: Any) -> Tensor:
        assert held[0]() is None
        return gemm.dgrad(*args)

    watched = dataclasses.replace(gemm, swiglu=swiglu, dgrad=dgrad)
    rows, weight = torch.randn(5, 4, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    segments = make_segments([2, 3])
    pre_activation, inner = swiglu_linear(rows, weight, None, segments, watched)
    assert pre_activation is not None
    out = activated(pre_activation, None, segments, inner)
    del pre_activation, inner
    assert held[0]() is not None
    out.sum().backward()
    assert rows.grad is not None and weight.grad is not None and len(held) == 1


def test_fused_activation_gives_the_gradients_that_are_asked_for(kept: list[bool]) -> None:
    experts = make_experts(2, dtype=torch.float64)
    segments = make_segments([2, 3])
    rows = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    leaves = (rows, weights, experts.fc1_weight, experts.fc2_weight)
    expected = torch.autograd.grad(experts(rows, weights, segments).sum(), leaves)
    for leaf, gradient in zip(leaves, expected, strict=True):
        for each in leaves:
            each.requires_grad_(each is leaf)
        assert torch.equal(torch.autograd.grad(experts(rows, weights, segments).sum(), leaf)[0], gradient)
    # The second projection alone wants one above: what is before it keeps nothing.
    assert kept == [True, True, True, True, False]

    for each in leaves:
        each.requires_grad_()
    later = experts.defer_gradients()
    both = DeferredGradients(experts.fc1_weight, experts.fc2_weight)
    for deferred, now in ((later, [*leaves[:2], leaves[3]]), (both, leaves[:2])):
        found = torch.autograd.grad(experts(rows, weights, segments, deferred).sum(), now)
        wanted = [gradient for leaf, gradient in zip(leaves, expected, strict=True) if any(leaf is one for one in now)]
        assert all(map(torch.equal, found, wanted))
        with torch.no_grad():
            for late, gradient in zip(deferred.compute(), expected[2:], strict=False):
                assert late is not None and torch.equal(late, gradient)
    with torch.no_grad():
        experts(rows, weights, segments)
    assert kept[-2:] == [True, False]
