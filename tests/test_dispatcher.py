"""Dispatchers: autograd through dispatch and combine, handles, and modes that cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from communicators import COMMUNICATORS, make_communicator, rank_device
from ranks import run_ranks
from routing_cases import PATTERNS, Case, make_inputs
from torch import Tensor

from ep_moe.dispatcher import NormalDispatcher

CASE = Case(tokens=(6, 0, 5, 9), num_experts=8, top_k=3, hidden=128, dtype=torch.float64)


def expert_scale(experts: Tensor) -> Tensor:
    """A stand-in for an expert: it multiplies its rows by a number of its own."""
    return 0.5 + experts.to(torch.float32)


def dense(x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
    """What route, dispatch, scaling experts and combine must compute, without any communication."""
    per_token = (weights * torch.where(idx < 0, 0, expert_scale(idx))).sum(1, keepdim=True)
    return x * per_token


def _round_trip(rank: int, world: int, kind: str, device: str, case: Case, cached: bool) -> tuple[Tensor, ...]:
    on = rank_device(device, rank)
    dispatcher = NormalDispatcher(make_communicator(kind, dist.group.WORLD), case.num_experts, alignment=4)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    arrived = dispatcher.dispatch(x, idx, weights)
    x.requires_grad_(), weights.requires_grad_()
    if cached:
        arrived = dispatcher.dispatch(x, torch.empty(0), weights, arrived.handle)
    else:
        arrived = dispatcher.dispatch(x, idx, weights)
    experts = torch.arange(case.local_experts, device=on) + rank * case.local_experts
    sizes = torch.tensor(arrived.segments.sizes, device=on)
    scale = expert_scale(experts.repeat_interleave(sizes))
    out = dispatcher.combine(arrived.rows * (scale * arrived.weights)[:, None], arrived.handle)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(rank)).to(on)
    out.backward(upstream)
    return tuple(t.detach().cpu() for t in (out, x.grad, weights.grad, upstream))


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_output_and_gradients_match_dense(kind: str, device: str, pattern: str, cached: bool, ranks: int) -> None:
    # Kernels move 16-bit and 32-bit rows; only portable communicators take fp64.
    dtype, tolerance = (torch.float32, 1e-5) if kind in ("nvlink", "loopback") else (torch.float64, 1e-12)
    case = replace(CASE, pattern=pattern, tokens=CASE.tokens[-ranks:], dtype=dtype)
    for rank, result in enumerate(run_ranks(ranks, _round_trip, kind, device, case, cached)):
        out, grad_x, grad_weights, upstream = result
        x, idx, weights = make_inputs(case, rank)
        x.requires_grad_(), weights.requires_grad_()
        expected = dense(x, idx, weights)
        expected.backward(upstream)
        assert x.grad is not None and weights.grad is not None
        for got, want in ((out, expected), (grad_x, x.grad), (grad_weights, weights.grad)):
            torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def _gradcheck(rank: int, world: int) -> bool:
    # One rank per group: gradcheck perturbs one rank's input, the others would have to run along.
    dispatcher = NormalDispatcher(make_communicator("portable", dist.group.WORLD), 4)
    x, idx, weights = make_inputs(Case((3,), 4, 2, 5, "some_unrouted", torch.float64), 0)

    def function(x: Tensor, weights: Tensor) -> Tensor:
        arrived = dispatcher.dispatch(x, idx, weights)
        return dispatcher.combine(arrived.rows.sin() * arrived.weights[:, None] ** 2, arrived.handle)

    return torch.autograd.gradcheck(function, (x.requires_grad_(), weights.requires_grad_()))


def test_gradcheck() -> None:
    assert run_ranks(1, _gradcheck) == [True]


def _fp8_round_trip(rank: int, world: int) -> tuple[float, float, bool]:
    case = replace(CASE, tokens=(40, 30), hidden=256, dtype=torch.bfloat16)
    dispatcher = NormalDispatcher(make_communicator("portable", dist.group.WORLD), 8, fp8=True)
    x, idx, weights = make_inputs(case, rank)
    x.requires_grad_()
    arrived = dispatcher.dispatch(x, idx, weights)
    out = dispatcher.combine(arrived.rows * arrived.weights[:, None].to(x.dtype), arrived.handle)
    out.backward(torch.ones_like(out))
    want = x.detach().double() * weights.sum(1, keepdim=True)
    error = float((out.detach().double() - want).norm() / want.norm())
    want_grad = weights.sum(1, keepdim=True).expand_as(x)
    grad_error = float((x.grad.double() - want_grad).norm() / want_grad.norm())  # type: ignore[union-attr]
    return error, grad_error, arrived.rows.dtype == torch.bfloat16


def test_fp8_dispatch_rounds_forward_only() -> None:
    for error, grad_error, dtype_kept in run_ranks(2, _fp8_round_trip):
        assert 1e-3 < error < 0.04  # e4m3 keeps 3 mantissa bits: rounding it away would be a sign of not quantising
        assert grad_error < 0.01
        assert dtype_kept


def _two_exchanges(rank: int, world: int) -> bool:
    dispatcher = NormalDispatcher(make_communicator("portable", dist.group.WORLD), 8)
    cases = [replace(CASE, seed=seed) for seed in (1, 2)]
    inputs = [make_inputs(case, rank) for case in cases]
    arrived = [dispatcher.dispatch(*each) for each in inputs]
    # Combined in the other order: each handle carries its own routes.
    outs = [dispatcher.combine(each.rows, each.handle) for each in reversed(arrived)][::-1]
    return all(
        torch.allclose(out, x * (idx >= 0).sum(1, keepdim=True)) for out, (x, idx, _) in zip(outs, inputs, strict=True)
    )


def test_two_live_handles() -> None:
    assert all(run_ranks(4, _two_exchanges))
