"""Activations that leave in FP8: the bits of the activation with quantisation behind it, and when each is computed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from expert_cases import ACTIVATIONS
from test_fp8_experts import make_experts, segments_of
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.experts import is_gated
from ep_moe.experts.activation import activation_backward, apply_activation
from ep_moe.experts.fp8 import Fp8Rows
from ep_moe.experts.fp8_emulated import EMULATED
from ep_moe.experts.native_fp8 import NATIVE


class Counting:
    """A back end that counts what it is asked for."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        functions = {field.name: getattr(EMULATED, field.name) for field in dataclasses.fields(EMULATED)}
        self.gemm = type(EMULATED)(**{name: self._counted(name, function) for name, function in functions.items()})

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr("ep_moe.experts.grouped.select_fp8_backend", lambda *_, **__: counting.gemm)
    return counting


def arguments(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, ExpertSegments]:
    counts = [3, 0, 5, 8]
    rows = torch.randn(16, 128, device=device, dtype=dtype).requires_grad_()
    return rows, torch.rand(16, device=device).requires_grad_(), segments_of(counts, device)


def test_a_step_quantises_each_tensor_once(counting: Counting) -> None:
    experts, (rows, weights, segments) = make_experts("fp8"), arguments()
    experts(rows, weights, segments).sum().backward()
    # Of rows: those that come, and the gradient of those that go.
    expected = {"quantize_rows": 2, "quantize_weight": 2, "multiply": 4, "activate": 1, "activation_gradients": 1}
    assert counting.calls == expected


def test_all_passes_give_the_same_bits() -> None:
    experts, (rows, weights, segments) = make_experts("fp8"), arguments()
    expected = experts(rows, weights, segments).detach()
    with torch.no_grad():
        assert torch.equal(experts(rows, weights, segments), expected)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
        assert torch.equal(experts(rows, weights, segments).detach(), expected)
    # Nothing before the activation needs a gradient: it is kept.
    out = experts(rows.detach(), weights, segments)
    assert torch.equal(out.detach(), expected)
    out.sum().backward()
    assert weights.grad is not None and weights.grad.abs().sum() > 0


def test_gradients_alone_and_twice() -> None:
    experts, (rows, weights, segments) = make_experts("fp8"), arguments()
    leaves = [rows, weights, *experts.parameters()]
    out = experts(rows, weights, segments).square().sum()
    expected = torch.autograd.grad(out, leaves, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out, leaves, retain_graph=True), expected))
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(torch.autograd.grad(out, [leaf], retain_graph=True)[0], gradient)


def poison_allocator(device: str = "cuda") -> None:
    """What is allocated next holds NaN, in every dtype."""
    torch.full((1 << 26,), 255, dtype=torch.uint8, device=device)


def check(actual: Fp8Rows, expected: Fp8Rows, real: int) -> None:
    """The same bits in real rows; a NaN is as good as another."""
    for found, right in ((actual.values, expected.values), (actual.scales.t(), expected.scales.t())):
        torch.testing.assert_close(found[:real].float(), right[:real].float(), rtol=0, atol=0, equal_nan=True)


def check_kernels(activation: str, width: int, counts: list[int], extra: int, weighted: bool, odd: bool) -> None:
    """Both kernels against the two passes each that they replace, with poison behind the last segment."""
    segments, real = segments_of(counts, "cuda", extra), sum(counts)
    x = torch.randn(segments.num_rows, width * (2 if is_gated(activation) else 1), device="cuda").bfloat16()
    grad = torch.randn(segments.num_rows, width, device="cuda").bfloat16()
    if odd and real:
        x *= torch.logspace(-8, 8, len(x), device="cuda").bfloat16()[:, None]
        x[0, 3], grad[real // 2, width - 1], x[real - 1, 64:] = torch.nan, torch.inf, 0
    row_weights = torch.rand(segments.num_rows, device="cuda") if weighted else None
    for tensor in (x, grad, row_weights):
        if tensor is not None:
            tensor[real:] = torch.nan
    with torch.no_grad():
        inner = apply_activation(x, activation, row_weights, segments.row_count)
    grad_x, grad_weights = activation_backward(
        grad, x, activation, row_weights, segments.row_count, need_x=True, need_weights=True
    )
    assert grad_x is not None and grad_weights is not None
    poison_allocator()
    check(NATIVE.activate(x, activation, row_weights, segments), NATIVE.quantize_rows(inner, segments), real)
    poison_allocator()
    found = NATIVE.activation_gradients(
        grad, x, activation, row_weights, segments, need_weights=True, need_activated=True
    )
    check(found.quantized, NATIVE.quantize_rows(grad_x, segments), real)
    assert found.activated is not None and found.row_weights is not None
    for actual, right in ((found.x, grad_x), (found.activated, inner), (found.row_weights, grad_weights)):
        # The weights' gradient of wider rows is summed in another order.
        exact = right is not grad_weights or width <= 4096
        tolerance = 0.0 if exact else 1e-2
        torch.testing.assert_close(actual[:real], right[:real], rtol=tolerance, atol=tolerance, equal_nan=True)
    alone = NATIVE.activation_gradients(
        grad, x, activation, row_weights, segments, need_weights=False, need_activated=False
    )
    assert alone.activated is None and alone.row_weights is None
    check(alone.quantized, found.quantized, real)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [128, 384, 2048, 8192])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernels(activation: str, width: int, weighted: bool) -> None:
    for odd in (False, True):
        check_kernels(activation, width, [5, 0, 70, 1], 9, weighted, odd)
    check_kernels(activation, width, [0, 0], 3, weighted, False)
    check_kernels(activation, width, [0, 0], 0, weighted, False)


@pytest.mark.gpu
def test_kernels_on_random_shapes() -> None:
    for _ in range(100):
        counts = [random.choice([0, random.randint(0, 9), random.randint(0, 700)]) for _ in range(random.randint(1, 9))]
        width, extra = 128 * random.randint(1, 20), random.choice([0, 1, 100])
        check_kernels(random.choice(ACTIVATIONS), width, counts, extra, random.random() < 0.5, random.random() < 0.5)


@pytest.mark.gpu
def test_network_gives_the_bits_of_separate_passes() -> None:
    experts, (rows, weights, segments) = make_experts("fp8", "cuda", torch.bfloat16), arguments("cuda", torch.bfloat16)
    kept = make_experts("fp8", "cuda", torch.bfloat16)
    kept.config = dataclasses.replace(kept.config, recompute_activation=False)
    results = []
    for module in (experts, kept):
        out = module(rows, weights, segments)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [rows, weights, *module.parameters()])])
    for fused, separate in zip(*results, strict=True):
        assert torch.equal(fused, separate)
