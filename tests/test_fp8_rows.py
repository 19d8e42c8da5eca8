"""Rows that travel in FP8 and reach the experts as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import make_communicator, rank_device
from ranks import run_ranks
from routing_cases import Case, make_inputs
from test_fp8_experts import make_experts, segments_of
from torch import Tensor

from ep_moe import EPMoELayer
from ep_moe.comm.fp8 import dequantize_e4m3, quantize_e4m3
from ep_moe.comm.fp8_rows import QuantizedRows, dequantize_rows
from ep_moe.config import Config, ExpertsConfig, ModelConfig, MoEConfig, PhaseConfig, PhasesConfig
from ep_moe.dispatcher import NormalDispatcher
from ep_moe.experts.grouped import GroupedExperts

COUNTS = [3, 0, 5, 8]


def quantized(x: Tensor) -> QuantizedRows:
    """``x`` as it would arrive; its stand-in asks for a gradient."""
    return QuantizedRows(*quantize_e4m3(x), x.new_empty(()).expand(x.shape).requires_grad_())


def poison(values: Tensor, scales: Tensor, count: int) -> None:
    """Make rows from ``count`` on NaN."""
    values.view(torch.uint8)[count:], scales[count:] = 0x7F, torch.nan


def gradients(experts: GroupedExperts, rows: Tensor | QuantizedRows, extra: int) -> list[Tensor]:
    """The output, and gradients of rows, routing weights and parameters; without what lies behind the segments."""
    like = rows.stand_in if isinstance(rows, QuantizedRows) else rows
    torch.manual_seed(5)
    weights = torch.rand(len(like), device=like.device).requires_grad_()
    out = experts(rows, weights, segments_of(COUNTS, str(like.device), extra))[: sum(COUNTS)]
    grad_rows, grad_weights, *others = torch.autograd.grad(
        out, [like, weights, *experts.parameters()], torch.randn_like(out)
    )
    return [out.detach(), grad_rows[: sum(COUNTS)], grad_weights[: sum(COUNTS)], *others]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("extra", [0, 3])
def test_experts_compute_as_on_dequantised_rows(recompute: bool, extra: int) -> None:
    experts = make_experts("fp8")
    experts.config = replace(experts.config, recompute_activation=recompute)
    arrived = quantized(torch.randn(sum(COUNTS) + extra, 128))
    poison(arrived.values, arrived.scales, sum(COUNTS))
    # In fp32 the round trip changes nothing but the last bits of scales.
    rows = dequantize_e4m3(arrived.values, arrived.scales, torch.float32).requires_grad_()
    expected, found = (gradients(experts, x, extra) for x in (rows, arrived))
    for name, right, actual in zip(["out", "rows", "weights", "fc1", "fc2"], expected, found, strict=True):
        assert float((actual - right).norm() / right.norm()) < 1e-2, name
    assert found[1].stride() == (128, 1)


def test_other_experts_refuse_them() -> None:
    with pytest.raises(ValueError, match=r"rows: expected torch.float32, got FP8: moe.experts.precision = input does"):
        make_experts("input")(quantized(torch.randn(sum(COUNTS), 128)), None, segments_of(COUNTS, "cpu"))


def _dispatched(rank: int, world: int, keeps: bool) -> tuple[Tensor, Tensor, Tensor, bool]:
    case = Case(tokens=(40, 30), num_experts=8, top_k=3, hidden=256, dtype=torch.bfloat16)
    dispatcher = NormalDispatcher(
        make_communicator("portable", dist.group.WORLD), 8, fp8=True, takes_fp8_rows=lambda dtype, device: keeps
    )
    x, idx, weights = make_inputs(case, rank)
    arrived = dispatcher.dispatch(x.requires_grad_(), idx, weights)
    rows = arrived.rows
    if isinstance(rows, QuantizedRows):
        differentiated, values = rows.stand_in, dequantize_e4m3(rows.values, rows.scales, x.dtype)
    else:
        differentiated, values = rows, rows.detach()
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(rank)).to(x.dtype)
    differentiated.backward(grad)
    assert x.grad is not None and differentiated.dtype == x.dtype
    return values, x.grad, x.detach(), isinstance(rows, QuantizedRows)


def test_dispatch_hands_on_what_travelled_and_its_gradient() -> None:
    for keeps, without in zip(run_ranks(2, _dispatched, True), run_ranks(2, _dispatched, False), strict=True):
        assert keeps[3] and not without[3]
        assert all(map(torch.equal, keeps[:3], without[:3]))


def layer_config(precision: str, travelling: str, overlap: tuple[Any, ...] = ()) -> Config:
    phase = PhaseConfig(dispatch_dtype=travelling)  # type: ignore[arg-type]
    experts = ExpertsConfig(ffn_hidden_size=256, precision=precision)  # type: ignore[arg-type]
    return Config(
        model=ModelConfig(hidden_size=128, init_std=0.1),
        moe=MoEConfig(num_experts=8, top_k=3, experts=experts),
        phases=PhasesConfig(train=replace(phase, overlap=overlap), prefill=phase),
    )


def _trained(
    rank: int, world: int, config: Config, device: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of a layer in training; its output in evaluation, whole and in steps."""
    on = rank_device(device, rank)
    torch.manual_seed(7)
    layer = EPMoELayer(config, dist.group.WORLD, dtype=dtype).to(on)
    x = torch.randn(30 + rank, 128, generator=torch.Generator().manual_seed(rank)).to(on, dtype).requires_grad_()
    out = layer(x)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(out, leaves, torch.full_like(out, 0.5))
    layer.eval()
    with torch.no_grad():
        whole, steps = layer(x), layer.forward_steps(x)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            in_steps = end.value
    return [t.detach().cpu() for t in (out, *found)], [t.cpu() for t in (whole, in_steps)]


@pytest.mark.parametrize(
    ("device", "dtype", "ranks", "overlap"),
    [
        ("cpu", torch.float32, 2, ()),
        ("cpu", torch.float32, 1, ("wgrad",)),
        pytest.param("cuda", torch.bfloat16, 1, (), marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 1, ("wgrad",), marks=pytest.mark.gpu),
    ],
)
def test_layer(device: str, dtype: torch.dtype, ranks: int, overlap: tuple[str, ...]) -> None:
    exact = run_ranks(ranks, _trained, layer_config("input", "input"), device, dtype)
    rounded = run_ranks(ranks, _trained, layer_config("fp8", "fp8", overlap), device, dtype)
    for (right, _), (found, inference) in zip(exact, rounded, strict=True):
        for expected, actual in zip(right, found, strict=True):
            assert float((actual.double() - expected.double()).norm() / expected.double().norm()) < 0.15
        assert torch.equal(inference[0], inference[1])
        torch.testing.assert_close(inference[0], found[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37, 5000])
def test_kernel(dtype: torch.dtype, rows: int) -> None:
    x = torch.randn(rows, 640, device="cuda") * torch.logspace(-6, 6, rows, device="cuda")[:, None]
    for columns_first in (False, True):
        values, scales = quantize_e4m3(x)
        layout = scales.t().contiguous().t() if columns_first else scales
        expected = dequantize_e4m3(values, scales, dtype)
        torch.testing.assert_close(dequantize_rows(values, layout, dtype), expected, rtol=0, atol=0, equal_nan=True)
        count = rows // 2
        poison(values, layout, count)
        found = dequantize_rows(values, layout, dtype, torch.tensor([count], dtype=torch.int32, device="cuda"))
        torch.testing.assert_close(found[:count], expected[:count], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_native_experts_take_them() -> None:
    experts = make_experts("fp8", "cuda", torch.bfloat16)
    for extra in (0, 9):
        arrived = quantized(torch.randn(sum(COUNTS) + extra, 128, device="cuda").bfloat16())
        poison(arrived.values, arrived.scales, sum(COUNTS))
        rows = dequantize_e4m3(arrived.values, arrived.scales, torch.bfloat16).requires_grad_()
        expected, found = (gradients(experts, x, extra) for x in (rows, arrived))
        for right, actual in zip(expected, found, strict=True):
            assert float((actual.double() - right.double()).norm() / right.double().norm()) < 0.02
