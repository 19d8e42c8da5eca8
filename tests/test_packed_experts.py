"""Experts on packed rows: each one's first rows are real, and what lies behind them is poison."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import make_low_latency_communicator
from ranks import run_ranks
from test_native_gemm import assert_close, needs_hopper
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments, PackedSegments
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.fp8_rows import QuantizedRows
from ep_moe.config import ExpertsConfig
from ep_moe.dispatcher.low_latency import LowLatencyDispatcher
from ep_moe.experts import GroupedExperts
from ep_moe.experts.activation import apply_activation, apply_packed_activation
from ep_moe.experts.native_gemm import NATIVE

_RANDOM = random.Random(0)
_SHAPES = {
    "one row": ([1], 1, 64, 64),
    "few rows": ([3, 0, 8, 1], 16, 128, 64),
    "full": ([40, 40], 40, 192, 320),
    "several tiles": ([170, 0, 321, 5], 400, 256, 448),
    "many experts": ([_RANDOM.choice([0, 0, 1, 2, 9, 33]) for _ in range(160)], 33, 320, 128),
    "none": ([0, 0], 24, 64, 64),
    "room of no multiple": ([7, 13, 0, 12], 13, 64, 192),
}


def packed_rows(counts: list[int], room: int, width: int, seed: int = 0) -> Tensor:
    """bf16 ``[experts, room, width]``, NaN behind the counts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(len(counts), room, width, device="cuda", generator=generator).bfloat16()
    for expert, count in enumerate(counts):
        rows[expert, count:] = math.nan
    return rows


def check_product(counts: list[int], room: int, in_features: int, out_features: int, seed: int = 0) -> None:
    """Raise unless real rows are right, and nothing else has been written."""
    rows, untouched = packed_rows(counts, room, in_features, seed), 7.0
    weight = torch.randn(len(counts), out_features, in_features, device="cuda").bfloat16()
    out = torch.full((len(counts), room, out_features), untouched, device="cuda", dtype=torch.bfloat16)
    assert NATIVE.forward_packed is not None
    NATIVE.forward_packed(rows, weight, torch.tensor(counts, dtype=torch.int32, device="cuda"), out=out)
    for expert, count in enumerate(counts):
        assert_close(out[expert, :count], rows[expert, :count].float() @ weight[expert].float().T)
        assert (out[expert, count:] == untouched).all()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", _SHAPES)
def test_product(name: str) -> None:
    check_product(*_SHAPES[name])


@needs_hopper
@pytest.mark.gpu
def test_products_of_random_shapes() -> None:
    for seed in range(200):
        choose = random.Random(seed)
        room = choose.choice([1, 5, 24, 128, 500])
        counts = [choose.choice([0, choose.randint(0, room), room]) for _ in range(choose.randint(1, 30))]
        check_product(counts, room, 64 * choose.randint(1, 8), 64 * choose.randint(1, 8), seed)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
def test_activation(activation: str) -> None:
    counts, room = [0, 3, 17, 1, 0, 9], 17
    rows = packed_rows(counts, room, 512)
    out = apply_packed_activation(rows, activation, torch.tensor(counts, dtype=torch.int32, device="cuda"))
    for expert, count in enumerate(counts):
        assert torch.equal(out[expert, :count], apply_activation(rows[expert, :count].contiguous(), activation))


def build_experts(
    num_experts: int, hidden: int, device: str, dtype: torch.dtype, backend: Any, **changes: Any
) -> GroupedExperts:
    return GroupedExperts(
        hidden,
        num_experts,
        ExpertsConfig(**{"ffn_hidden_size": 192, "backend": backend, **changes}),
        init_method=lambda w: nn.init.normal_(w, std=0.1),
        output_init_method=lambda w: nn.init.normal_(w, std=0.1),
        device=device,
        dtype=dtype,
    )


@needs_hopper
@pytest.mark.gpu
def test_experts_give_the_same_bits_as_on_gathered_rows() -> None:
    counts, room, hidden = [5, 0, 130, 64, 1], 130, 256
    experts = build_experts(len(counts), hidden, "cuda", torch.bfloat16, "native")
    rows = packed_rows(counts, room, hidden)
    on_gpu = torch.tensor(counts, dtype=torch.int32, device="cuda")
    packed = PackedSegments(on_gpu, torch.full_like(rows, math.nan))
    gathered = torch.cat([rows[expert, :count] for expert, count in enumerate(counts)])
    with torch.no_grad():
        out = experts(rows, None, packed)
        expected = experts(gathered, None, ExpertSegments(on_gpu.long(), on_gpu.cumsum(0).int(), tuple(counts)))
    assert out is packed.out
    assert torch.equal(torch.cat([out[expert, :count] for expert, count in enumerate(counts)]), expected)
    with pytest.raises(RuntimeError, match="packed rows have no gradients"):
        experts(rows, None, packed)
    with pytest.raises(ValueError, match=r"rows: expected torch.bfloat16 \[5, 130, 256\]"), torch.no_grad():
        experts(rows[:4], None, packed)


def check_fp8(counts: list[int], room: int, hidden: int, ffn: int, activation: str, device: str) -> None:
    """Raise unless packed rows give the bits of gathered ones, in bf16 and as they arrive in FP8."""
    backend = "native" if device == "cuda" else "loop"
    changes = {"precision": "fp8", "ffn_hidden_size": ffn, "activation": activation}
    experts = build_experts(len(counts), hidden, device, torch.bfloat16, backend, **changes)
    rows = torch.randn(len(counts), room, hidden, device=device).bfloat16()
    values, scales = (x.unflatten(0, (len(counts), room)) for x in quantize_e4m3(rows.flatten(0, 1)))
    for expert, count in enumerate(counts):
        rows[expert, count:] = scales[expert, count:] = math.nan
        values.view(torch.uint8)[expert, count:] = 0x7F  # NaN
    on_device = torch.tensor(counts, dtype=torch.int32, device=device)
    gathered = [
        torch.cat([x[e, :count] for e, count in enumerate(counts)]) for x in (rows, values.view(torch.uint8), scales)
    ]
    segments = ExpertSegments(on_device.long(), on_device.cumsum(0).int(), tuple(counts))
    pairs = (
        (rows, gathered[0]),
        (
            QuantizedRows(values, scales, rows.new_empty(()).expand(rows.shape)),
            QuantizedRows(gathered[1].view(values.dtype), gathered[2], rows.new_empty(()).expand(gathered[0].shape)),
        ),
    )
    for packed_rows, same_rows in pairs:
        packed, untouched = PackedSegments(on_device, torch.full_like(rows, 7.0)), 7.0
        with torch.no_grad():
            out, expected = experts(packed_rows, None, packed), experts(same_rows, None, segments)
        assert out is packed.out
        assert torch.equal(torch.cat([out[e, :count] for e, count in enumerate(counts)]), expected)
        for expert, count in enumerate(counts):
            assert (out[expert, count:] == untouched).all()
    with pytest.raises(RuntimeError, match="packed rows have no gradients"):
        experts(rows, None, packed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_hopper])])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    ("counts", "room"),
    [([1], 1), ([3, 0, 8, 1], 16), ([13, 7, 0], 13), ([0, 0], 24), ([70, 0, 321, 5], 400)],
    ids=["one row", "few rows", "room of no multiple", "none", "several tiles"],
)
def test_fp8_experts_give_the_same_bits_as_on_gathered_rows(
    counts: list[int], room: int, activation: str, device: str
) -> None:
    check_fp8(counts, room, 128, 256, activation, device)


@needs_hopper
@pytest.mark.gpu
def test_fp8_experts_of_random_shapes() -> None:
    for seed in range(100):
        choose = random.Random(seed)
        room = choose.choice([1, 5, 24, 128, 500])
        counts = [choose.choice([0, choose.randint(0, room), room]) for _ in range(choose.randint(1, 30))]
        check_fp8(counts, room, 128 * choose.randint(1, 4), 128 * choose.randint(1, 4), "swiglu", "cuda")


def test_back_ends_without_packed_rows_say_so() -> None:
    experts = build_experts(2, 128, "cpu", torch.bfloat16, "grouped_mm")
    assert not experts.takes_packed_rows(torch.bfloat16, torch.device("cpu"))
    rows = torch.zeros(2, 4, 128, dtype=torch.bfloat16)
    packed = PackedSegments(torch.zeros(2, dtype=torch.int32), torch.empty_like(rows))
    with pytest.raises(ValueError, match="grouped_mm takes no packed rows"), torch.no_grad():
        experts(rows, None, packed)


def _both_ways(rank: int, world: int) -> list[bool]:
    """Experts that double their rows, over packed and over gathered rows; also begun and finished apart."""
    communicator = make_low_latency_communicator("portable", dist.group.WORLD, 6, 128, 2 * world)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(6 - rank, 128, generator=generator).bfloat16()
    weights, idx = torch.rand(len(x), 2 * world, generator=generator).topk(2)
    results = []
    for takes_packed in (False, True):
        dispatcher = LowLatencyDispatcher(communicator, takes_packed_rows=lambda dtype, device, it=takes_packed: it)
        for apart in (False, True):
            with torch.no_grad():
                arrived = (
                    dispatcher.start_dispatch(x, idx, weights)() if apart else dispatcher.dispatch(x, idx, weights)
                )
                out = _double(arrived.rows, arrived.segments)
                combine = dispatcher.start_combine(out, arrived.handle) if apart else None
                results.append(combine() if combine is not None else dispatcher.combine(out, arrived.handle))
    return [torch.equal(result, results[0]) for result in results] + [bool(results[0].abs().sum() > 0)]


def _double(rows: Tensor, segments: ExpertSegments | PackedSegments) -> Tensor:
    if isinstance(segments, ExpertSegments):
        return rows * 2
    segments.out.fill_(math.nan)
    for expert, count in enumerate(segments.counts.tolist()):
        segments.out[expert, :count] = rows[expert, :count] * 2
    return segments.out


def test_dispatcher_gives_the_same_either_way() -> None:
    for answers in run_ranks(2, _both_ways):
        assert all(answers), answers
