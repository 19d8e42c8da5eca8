"""Activations computed again in backward: the same bits, and what training keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from expert_cases import normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ep_moe.comm import ExpertSegments
from ep_moe.config import ExpertsConfig
from ep_moe.experts import GroupedExperts

HIDDEN, FFN, ROWS = 256, 384, (3, 0, 7)  # widths that FP8 takes


def experts(recompute: bool, activation: str = "swiglu", device: str = "cpu", **changes: Any) -> GroupedExperts:
    torch.manual_seed(3)
    config = ExpertsConfig(
        ffn_hidden_size=FFN,
        activation=activation,  # type: ignore[arg-type]
        recompute_activation=recompute,
        **changes,
    )
    return GroupedExperts(
        HIDDEN,
        len(ROWS),
        config,
        init_method=normal,
        output_init_method=normal,
        dtype=torch.bfloat16,
        device=device,
    )


def inputs(device: str = "cpu", capacity: int | None = None) -> tuple[Tensor, Tensor, ExpertSegments]:
    """Rows, routing weights and segments; with a capacity, rows of garbage behind the real ones."""
    torch.manual_seed(4)
    ends = torch.tensor(ROWS).cumsum(0)
    segments = ExpertSegments(torch.tensor(ROWS, device=device), ends.int().to(device), ROWS)
    if capacity is not None:
        segments = dataclasses.replace(segments, sizes=None, capacity=capacity)
    rows = torch.randn(segments.num_rows, HIDDEN).to(device, torch.bfloat16)
    return rows.requires_grad_(), torch.rand(segments.num_rows).to(device).requires_grad_(), segments


def gradients(module: GroupedExperts, rows: Tensor, weights: Tensor, segments: ExpertSegments) -> list[Tensor]:
    """Of real rows, their weights and the parameters."""
    real = sum(ROWS)
    out = module(rows, weights, segments)
    found = torch.autograd.grad(out[:real].square().sum(), [rows, weights, *module.parameters()])
    return [found[0][:real], found[1][:real], *found[2:]]


def kept_shapes(module: GroupedExperts, *arguments: Any) -> list[list[int]]:
    """Of all tensors that the forward pass keeps for backward, each storage once."""
    seen: dict[int, list[int]] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: seen.setdefault(x.untyped_storage().data_ptr(), list(x.shape)) and x, lambda x: x
    ):
        module(*arguments)
    return list(seen.values())


SETTINGS = [
    pytest.param({"backend": "loop"}, id="loop"),
    pytest.param({"backend": "grouped_mm"}, id="grouped_mm"),
    pytest.param({"backend": "loop", "precision": "fp8"}, id="fp8"),
]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("changes", SETTINGS)
def test_gradients_have_the_same_bits(changes: dict[str, Any], activation: str) -> None:
    kept, again = (gradients(experts(recompute, activation, **changes), *inputs()) for recompute in (False, True))
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("changes", SETTINGS)
def test_activations_are_not_kept(changes: dict[str, Any]) -> None:
    activations = [sum(ROWS), FFN]
    assert activations in kept_shapes(experts(False, **changes), *inputs())
    shapes = kept_shapes(experts(True, **changes), *inputs())
    assert activations not in shapes and [sum(ROWS), 2 * FFN] in shapes


def test_activations_are_kept_where_pre_activations_are_not() -> None:
    module = experts(True, backend="loop")
    module.fc1_weight.requires_grad_(False)
    rows, weights, segments = inputs()
    shapes = kept_shapes(module, rows.detach(), weights.detach(), segments)
    assert [sum(ROWS), FFN] in shapes and [sum(ROWS), 2 * FFN] not in shapes


def test_under_a_checkpoint_of_the_whole() -> None:
    rows, weights, segments = inputs()
    module = experts(True, backend="loop")
    expected = gradients(module, rows, weights, segments)
    out = checkpoint(module, rows, weights, segments, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), [rows, weights, *module.parameters()])
    assert all(map(torch.equal, found, expected))


def test_deferred_gradients() -> None:
    rows, weights, segments = inputs()
    module = experts(True, backend="loop")
    expected = gradients(module, rows, weights, segments)
    deferred = module.defer_gradients()
    out = module(rows, weights, segments, deferred)
    found = torch.autograd.grad(out.square().sum(), [rows, weights])
    with torch.no_grad():
        late = deferred.compute()
    assert all(map(torch.equal, [*found, *late], expected))  # type: ignore[list-item]


def test_rows_behind_a_capacity_reach_nothing() -> None:
    expected = gradients(experts(True, backend="loop"), *inputs())
    rows, weights, segments = inputs(capacity=16)
    exact = inputs()
    with torch.no_grad():
        for whole, real in ((rows, exact[0]), (weights, exact[1])):
            whole.fill_(float("nan"))
            whole[: sum(ROWS)] = real
    found = gradients(experts(True, backend="loop"), rows, weights, segments)
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("precision", ["input", "fp8"])
@pytest.mark.parametrize("capacity", [None, 16])
def test_gradients_have_the_same_bits_on_a_gpu(activation: str, precision: str, capacity: int | None) -> None:
    kept, again = (
        gradients(experts(recompute, activation, "cuda", precision=precision), *inputs("cuda", capacity))
        for recompute in (False, True)
    )
    assert all(map(torch.equal, kept, again))
