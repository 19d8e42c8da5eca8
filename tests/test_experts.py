"""Experts against a dense fp64 oracle: every back end and activation, forward and all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_cases import (
    ACTIVATIONS,
    CASES,
    FFN,
    HIDDEN,
    TOLERANCE,
    assert_close,
    check_against_oracle,
    make_experts,
    make_segments,
    normal,
    oracle,
    plain_activation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_moe.config import SharedExpertsConfig
from ep_moe.experts import (
    GroupedExperts,
    SharedExperts,
    apply_activation,
    fc1_width,
    initialize_experts,
)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_oracle(backend: str, dtype: torch.dtype, activation: str) -> None:
    check_against_oracle(backend, activation, dtype, [3, 0, 7, 1, 0])
    check_against_oracle(backend, activation, dtype, [0, 5, 9], alignment=4)
    check_against_oracle(backend, activation, dtype, [2, 4], weighted=False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    alignment=st.sampled_from([1, 2, 8]),
    backend=st.sampled_from(["loop", "grouped_mm"]),
    weighted=st.booleans(),
)
def test_any_segments(counts: list[int], alignment: int, backend: str, weighted: bool) -> None:
    check_against_oracle(backend, "swiglu", torch.float32, counts, alignment, weighted and sum(counts) > 0)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_no_rows_at_all(backend: str, dtype: torch.dtype) -> None:
    experts = make_experts(3, backend=backend, dtype=dtype)
    rows = torch.zeros(0, HIDDEN, dtype=dtype, requires_grad=True)
    weights = torch.zeros(0, requires_grad=True)
    out = experts(rows, weights, make_segments([0, 0, 0]))
    assert out.shape == (0, HIDDEN) and out.dtype == dtype
    out.sum().backward()
    assert rows.grad is not None and rows.grad.shape == rows.shape
    for parameter in experts.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_broadcast_gradient(backend: str) -> None:
    """sum().backward() hands over an expanded scalar, which grouped_mm itself rejects."""
    segments = make_segments([2, 0, 3])
    rows = torch.randn(5, HIDDEN)
    grads = []
    for reduce in (Tensor.sum, lambda y: (y * torch.ones_like(y)).sum()):
        torch.manual_seed(1)
        experts = make_experts(3, backend=backend)
        reduce(experts(rows, None, segments)).backward()
        grads.append(experts.fc2_weight.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize(
    "rows", [torch.ones(HIDDEN, 5).t(), torch.ones(HIDDEN, 1).t(), torch.ones(1, HIDDEN + 1)[:, 1:]]
)
def test_rows_in_any_layout(rows: Tensor) -> None:
    segments = make_segments([0, len(rows)])
    experts = make_experts(2, backend="grouped_mm")
    dense = torch.ones(len(rows), HIDDEN)
    torch.testing.assert_close(experts(rows, None, segments), experts(dense, None, segments))


def test_frozen_weights_get_no_gradient() -> None:
    experts = make_experts(2, backend="grouped_mm").requires_grad_(False)
    rows = torch.randn(5, HIDDEN, requires_grad=True)
    experts(rows, None, make_segments([2, 3])).sum().backward()
    assert rows.grad is not None and experts.fc1_weight.grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weighted", [True, False])
def test_activation_gradcheck(activation: str, weighted: bool) -> None:
    x = torch.randn(5, fc1_width(activation, 4), dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True) if weighted else None
    torch.testing.assert_close(
        apply_activation(x, activation, weights),
        plain_activation(x, activation) * (1 if weights is None else weights[:, None]),
    )
    assert torch.autograd.gradcheck(lambda *args: apply_activation(args[0], activation, *args[1:]), (x, weights))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_rounds_once(activation: str) -> None:
    x = torch.randn(64, fc1_width(activation, 8)).bfloat16()
    weights = torch.rand(64)
    expected = (plain_activation(x.double(), activation) * weights[:, None].double()).bfloat16()
    actual = apply_activation(x, activation, weights)
    # fp32 against fp64 arithmetic may fall on either side of a rounding boundary, rarely
    assert (actual != expected).float().mean() < 0.01
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)


def test_activation_keeps_only_its_inputs() -> None:
    saved: list[Tensor] = []
    x = torch.randn(6, 16).bfloat16().requires_grad_()
    weights = torch.rand(6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_activation(x, "swiglu", weights)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), weights.data_ptr()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_zero_row_with_zero_weight_is_inert(activation: str) -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    weights = torch.zeros(2, requires_grad=True)
    out = apply_activation(x, activation, weights)
    out.backward(torch.full_like(out, 1e30))
    assert x.grad is not None and weights.grad is not None
    assert not out.any() and not x.grad.any() and not weights.grad.any()


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "auto"])
def test_autocast(backend: str) -> None:
    segments = make_segments([3, 0, 4])
    experts = make_experts(3, backend=backend)
    rows = torch.randn(7, HIDDEN, requires_grad=True)
    weights = torch.rand(7, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(rows, weights, segments)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for tensor in (rows, weights, experts.fc1_weight, experts.fc2_weight):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32
    expected = oracle(rows, weights, experts.fc1_weight, experts.fc2_weight, segments, "swiglu")
    assert_close("out", out, expected.double(), TOLERANCE[torch.bfloat16])


def test_initial_weights_do_not_depend_on_the_spread() -> None:
    def build(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(7)
        experts = make_experts(count, first_expert=first)
        return experts.fc1_weight.detach(), experts.fc2_weight.detach(), torch.rand(3)

    whole = build(0, 8)
    for ranks in (2, 4, 8):
        parts = [build(rank * 8 // ranks, 8 // ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
        assert all(torch.equal(part[2], whole[2]) for part in parts), "random streams of the ranks went apart"
    flat = whole[0].flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.25
    assert abs(whole[0].std().item() - 0.3) < 0.02


def test_initialisation_advances_with_the_default_generator() -> None:
    first, second = torch.empty(2, 4, 4), torch.empty(2, 4, 4)
    initialize_experts(first, normal, 0)
    initialize_experts(second, normal, 0)
    assert not torch.equal(first, second)


def test_meta_device_is_left_alone() -> None:
    state = torch.get_rng_state()
    experts = make_experts(2, device="meta")
    shared = SharedExperts(
        HIDDEN,
        SharedExpertsConfig(8, gate=True),
        "swiglu",
        init_method=normal,
        output_init_method=normal,
        device="meta",
    )
    assert all(p.is_meta for module in (experts, shared) for p in module.parameters())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shared_experts(activation: str, gate: bool) -> None:
    shared = SharedExperts(
        HIDDEN,
        SharedExpertsConfig(FFN, gate=gate),
        activation,
        init_method=normal,
        output_init_method=normal,
        dtype=torch.float64,
    )
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *shared.parameters()]
    expected = plain_activation(x @ shared.fc1_weight.T, activation) @ shared.fc2_weight.T
    assert (shared.gate_weight is not None) == gate
    if shared.gate_weight is not None:
        expected = expected / (1 + torch.exp(-x @ shared.gate_weight.T))
    out = shared(x)
    grad = torch.randn_like(out)
    actual_grads = torch.autograd.grad(out, inputs, grad)
    assert_close("out", out, expected, 1e-12)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert_close("gradient", actual, wanted, 1e-12)


def test_shared_experts_autocast() -> None:
    config = SharedExpertsConfig(FFN, gate=True)
    shared = SharedExperts(HIDDEN, config, "swiglu", init_method=normal, output_init_method=normal)
    x = torch.randn(4, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shared(x)
    assert out.dtype == torch.bfloat16
    assert_close("out", out, shared(x).double(), TOLERANCE[torch.bfloat16])


def test_segment_starts_are_not_padded() -> None:
    assert make_experts(2).alignment == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e(torch.randn(4, HIDDEN), None, make_segments([2, 3])), r"rows: expected \[5, 16\]"),
        (lambda e: e(torch.randn(5, 8), None, make_segments([2, 3])), r"rows: expected \[5, 16\].*hidden_size"),
        (lambda e: e(torch.randn(5, HIDDEN), None, make_segments([2, 2, 1])), "segments: expected 2 local experts"),
        (lambda e: e(torch.randn(5, HIDDEN).double(), None, make_segments([2, 3])), "rows: expected torch.float32"),
        (lambda e: e(torch.randn(5, HIDDEN), torch.ones(4), make_segments([2, 3])), r"row_weights: .* \[5\]"),
        (lambda e: e(torch.randn(5, HIDDEN), torch.ones(5).int(), make_segments([2, 3])), "row_weights: expected fl"),
        (lambda _: apply_activation(torch.randn(2, 3), "swiglu"), "even width"),
        (lambda _: apply_activation(torch.randn(2, 4), "tanh"), "activation: expected one of swiglu"),
        (lambda _: make_experts(0), "num_local_experts"),
        (lambda _: make_experts(1, backend="x")(torch.randn(1, HIDDEN), None, make_segments([1])), "must be one of"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Callable[[GroupedExperts], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_experts(2))


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("grouped_mm", torch.bfloat16), ("auto", torch.bfloat16), ("auto", torch.float32), ("auto", torch.float64)],
)
def test_gpu_matches_oracle(backend: str, dtype: torch.dtype, activation: str) -> None:
    for counts, alignment in (([3, 0, 7, 1, 0], 1), ([0, 5, 130], 4), ([0, 0, 0, 33], 1), ([17] * 9, 1)):
        check_against_oracle(backend, activation, dtype, counts, alignment, device="cuda")


@pytest.mark.gpu
def test_gpu_empty_experts_get_zero_gradients_in_recycled_memory() -> None:
    experts = make_experts(4, backend="grouped_mm", dtype=torch.bfloat16, device="cuda")
    for counts in ([0, 5, 0, 11], [0, 0, 0, 0], [1, 0, 0, 0]):
        experts.zero_grad()
        poison = [torch.full_like(p, math.nan) for p in experts.parameters()]
        del poison  # the allocator hands these blocks to the gradients
        rows = torch.randn(sum(counts), HIDDEN, device="cuda", dtype=torch.bfloat16)
        experts(rows, None, make_segments(counts, device="cuda")).sum().backward()
        for parameter in experts.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            for expert, count in enumerate(counts):
                assert count or not parameter.grad[expert].any()


@pytest.mark.gpu
def test_gpu_grouped_mm_does_not_wait_for_the_device() -> None:
    experts = make_experts(3, backend="grouped_mm", dtype=torch.bfloat16, device="cuda")
    segments = make_segments([3, 0, 8], device="cuda")
    rows = torch.randn(11, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(11, device="cuda", requires_grad=True)
    experts(rows, weights, segments).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(rows, weights, segments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_initialisation_leaves_the_generators_alone() -> None:
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    whole = make_experts(4, device="cuda").fc1_weight.detach()
    torch.manual_seed(3)
    half = make_experts(2, first_expert=2, device="cuda").fc1_weight.detach()
    assert torch.equal(whole[2:], half)
    assert torch.equal(state, torch.cuda.get_rng_state())
