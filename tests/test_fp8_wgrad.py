"""Gradients of weights in FP8: operands quantised along tokens, their product, and the experts around them.

Errors against exact products: e4m3 rounds a factor by 2^-4 of itself at most, 2.6% on average of normally distributed
ones, so two of them by 3.7%, whatever the number of tokens. The product of the rounded factors is nearly exact.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from test_fp8_activation import Counting, check, poison_allocator
from test_fp8_experts import BACKENDS, RELATIVE_ERROR, make_experts, segments_of
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.fp8_rows import QuantizedRows
from ep_moe.config import ConfigError, ExpertsConfig
from ep_moe.experts import GroupedExperts
from ep_moe.experts.deferred import DeferredGradients
from ep_moe.experts.fp8 import Fp8Columns, Fp8Gemm, Fp8Rows, by_blocks
from ep_moe.experts.fp8_emulated import EMULATED
from ep_moe.experts.native_fp8 import NATIVE
from ep_moe.experts.native_fp8_wgrad import most_blocks

COUNTS = {
    "one": [5],
    "edges of a block": [1, 0, 127, 128, 129, 255, 256, 257],
    "none": [0, 0, 0],
    "all in one of many": [0] * 7 + [1500] + [0] * 8,
    "uneven": [300, 7, 0, 0, 640, 2],
}


def blocks_of(counts: list[int]) -> int:
    return sum(-(-count // 128) for count in counts)


def exact_columns(columns: Fp8Columns, counts: list[int]) -> list[Tensor]:
    """The values that columns stand for, fp64 ``[count, width]`` an expert; raise unless what lies behind is zero."""
    experts, first = [], 0
    for expert, count in enumerate(counts):
        blocks = blocks_of([count])
        scales = columns.scales[expert : expert + 1] if columns.by_expert else columns.scales[first : first + blocks]
        values = columns.values[first : first + blocks].double() * scales.double().unsqueeze(2)
        tokens = values.transpose(1, 2).flatten(0, 1)
        assert not tokens[count:].any()
        experts.append(tokens[:count])
        first += blocks
    return experts


class Case:
    """Random rows and gradients; NaN behind the last segment."""

    def __init__(
        self, counts: list[int], device: str, out_features: int = 256, in_features: int = 384, extra: int = 3
    ) -> None:
        self.counts, self.real = counts, sum(counts)
        self.segments = segments_of(counts, device, extra)
        widths = out_features, in_features
        self.grad, self.rows = (
            torch.randn(self.segments.num_rows, width, device=device).bfloat16() for width in widths
        )
        self.shape = len(counts), *widths
        for x in (self.grad, self.rows):
            x[self.real :] = math.nan

    def columns(self, gemm: Fp8Gemm) -> tuple[Fp8Columns, Fp8Columns]:
        return gemm.quantize_columns(self.grad, self.segments, False), gemm.quantize_columns(
            self.rows, self.segments, True
        )

    def wgrad(self, gemm: Fp8Gemm, **kwargs: Any) -> Tensor:
        return gemm.wgrad(*self.columns(gemm), self.segments, torch.bfloat16, **kwargs)

    def products(self, grads: Any, rows: Any) -> Tensor:
        """``[experts, out_features, in_features]`` of each expert's tokens, fp64."""
        pairs = zip(grads, rows, strict=True)
        return torch.stack([grad.double().t() @ x.double() for grad, x in pairs])

    def check(self, gemm: Fp8Gemm, result: Tensor, rounding: float) -> None:
        """Raise unless it is the product of the quantised operands, apart by ``rounding`` of the largest element."""
        of_rounded = self.products(*(exact_columns(columns, self.counts) for columns in self.columns(gemm)))
        largest = float(of_rounded.abs().max())
        assert float((result.double() - of_rounded).abs().max()) <= largest * rounding
        for expert, count in enumerate(self.counts):
            assert count or not result[expert].any()
        if self.real:
            exact = self.products(*(x[: self.real].split(self.counts) for x in (self.grad, self.rows)))
            assert float((result.double() - exact).norm() / exact.norm()) <= RELATIVE_ERROR


# Of sums of 128 products, which the multiply keeps with 14 bits: a few thousandths of a product each, so 2^-10 where
# they meet worst. For results in bf16, the rounding of those besides.
OF_SUMS = 2**-9
OF_BF16 = 2**-8 + OF_SUMS


@pytest.mark.parametrize(("gemm", "device"), BACKENDS)
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("extra", [0, 3])
def test_products(gemm: Fp8Gemm, device: str, name: str, extra: int) -> None:
    case = Case(COUNTS[name], device, extra=extra)
    out = case.wgrad(gemm)
    assert out.dtype == torch.bfloat16 and out.shape == case.shape
    case.check(gemm, out, OF_BF16)
    into_fp32 = torch.full(case.shape, math.nan, device=device)
    assert case.wgrad(gemm, out=into_fp32) is into_fp32
    case.check(gemm, into_fp32, OF_SUMS)


@pytest.mark.parametrize(("gemm", "device"), BACKENDS)
@pytest.mark.parametrize("counts", [[5, 0, 300], [1700, 1600]], ids=str)
def test_into_memory_that_is_there(gemm: Fp8Gemm, device: str, counts: list[int]) -> None:
    case = Case(counts, device, 128)
    fresh = case.wgrad(gemm)
    poison = torch.full_like(fresh, math.nan)
    assert case.wgrad(gemm, out=poison) is poison
    assert torch.equal(poison, fresh)
    # In one rounding an element: at 384 rows of few tokens an expert and of many, which go out in two ways.
    in_fp32 = case.wgrad(gemm, out=torch.zeros(case.shape, device=device))
    before = 100 * torch.randn(case.shape, device=device)
    total = before.clone()
    assert case.wgrad(gemm, out=total, accumulate=True) is total
    assert torch.equal(total, before + in_fp32)
    of_bf16 = before.bfloat16()
    case.wgrad(gemm, out=of_bf16, accumulate=True)
    assert torch.equal(of_bf16, before.bfloat16() + fresh)


@pytest.mark.parametrize(("gemm", "device"), BACKENDS)
@pytest.mark.parametrize("by_expert", [False, True])
def test_scales_fit_their_channels(gemm: Fp8Gemm, device: str, by_expert: bool) -> None:
    case = Case([200, 100], device)
    magnitudes = torch.logspace(-3, 3, 384, device=device)
    rows = (case.rows.float() * magnitudes).bfloat16()
    first, second = exact_columns(gemm.quantize_columns(rows, case.segments, by_expert), case.counts)
    for found, expected in ((first, rows[:200]), (second, rows[200:300])):
        # Half of the last of four bits of the channel's largest.
        bound = expected.double().abs().amax(0).clamp(min=1e-4) * 2**-4
        assert ((found - expected.double()).abs() <= bound).all()


def test_room_for_blocks() -> None:
    for _ in range(500):
        counts = [random.choice([0, 1, 127, 128, 129, random.randrange(400)]) for _ in range(random.randint(1, 40))]
        assert blocks_of(counts) <= most_blocks(sum(counts), len(counts))
    assert [most_blocks(0, 4), most_blocks(1, 4), most_blocks(3, 1024), most_blocks(256, 2)] == [0, 1, 3, 3]


def check_columns(counts: list[int], width: int, extra: int, fp8: bool, odd: bool, by_expert: bool) -> None:
    """The kernel's bits against the emulation's, with poison behind the last segment and in the result's memory."""
    segments, real = segments_of(counts, "cuda", extra), sum(counts)
    x = torch.randn(segments.num_rows, width, device="cuda").bfloat16()
    if odd and real:
        x *= torch.logspace(-8, 8, width, device="cuda").bfloat16()
        x[0, 3], x[real // 2, width - 1], x[:, 5] = math.nan, math.inf, 0
    rows: Tensor | Fp8Rows = x
    if fp8:
        values, scales = quantize_e4m3(x)
        rows = Fp8Rows(values, random.choice([scales.t(), by_blocks(scales)]))
        values.view(torch.uint8)[real:] = 0x7F
        scales[real:] = math.nan
        rows.scales[:, real:] = math.nan
    else:
        x[real:] = math.nan
    expected = EMULATED.quantize_columns(rows, segments, by_expert)
    poison_allocator()
    found = NATIVE.quantize_columns(rows, segments, by_expert)
    blocks = blocks_of(counts)
    scaled = torch.tensor(counts, device="cuda") > 0 if by_expert else slice(blocks)
    assert len(found.values) == most_blocks(segments.num_rows, len(counts)) >= blocks == len(expected.values)
    theirs = expected.scales[scaled] if by_expert else expected.scales
    for one, other in ((found.values[:blocks].float(), expected.values.float()), (found.scales[scaled], theirs)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(rows, Tensor):
        poison_allocator()
        by_row, by_column = NATIVE.quantize_both(rows, segments, by_expert)
        check(by_row, NATIVE.quantize_rows(rows, segments), real)
        assert torch.equal(by_column.values[:blocks].view(torch.uint8), found.values[:blocks].view(torch.uint8))
        assert torch.equal(by_column.scales[scaled].view(torch.int32), found.scales[scaled].view(torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("by_expert", [False, True], ids=["by block", "by expert"])
def test_kernel_quantises_as_the_emulation(fp8: bool, by_expert: bool) -> None:
    for counts in COUNTS.values():
        for odd in (False, True):
            check_columns(counts, 384, 9, fp8, odd, by_expert)
    check_columns([3, 200], 7168, 0, fp8, False, by_expert)
    check_columns([random.randrange(3) for _ in range(1024)], 128, 7, fp8, False, by_expert)
    for _ in range(100):
        counts = [random.choice([0, random.randint(0, 9), random.randint(0, 700)]) for _ in range(random.randint(1, 9))]
        width, extra = 128 * random.randint(1, 20), random.choice([0, 1, 100])
        check_columns(counts, width, extra, fp8, random.random() < 0.5, by_expert)


@pytest.mark.gpu
def test_kernel_multiplies_as_the_emulation() -> None:
    for seed in range(100):
        choose = random.Random(seed)
        typical = choose.choice([3, 100, 300, 1000])
        counts = [choose.choice([0, 1, 128, choose.randrange(2 * typical)]) for _ in range(choose.randrange(1, 12))]
        case = Case(counts, "cuda", *(128 * choose.randint(1, 7) for _ in range(2)), extra=choose.choice([0, 1, 200]))
        columns = case.columns(NATIVE)
        expected = EMULATED.wgrad(*columns, case.segments, torch.float32)
        found = NATIVE.wgrad(*columns, case.segments, torch.bfloat16, out=torch.zeros_like(expected), accumulate=True)
        assert (found - expected).abs().max() <= OF_SUMS * expected.abs().max()


@pytest.mark.gpu
def test_kernel_takes_1024_experts_and_wide_matrices() -> None:
    for counts, widths in (([random.randrange(3) for _ in range(1024)], (128, 256)), ([130, 0, 260], (4096, 7168))):
        case = Case(counts, "cuda", *widths)
        case.check(NATIVE, case.wgrad(NATIVE), OF_BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("poisoned", range(4))
def test_an_experts_rows_reach_no_other(poisoned: int) -> None:
    case = Case([37, 161, 5, 128], "cuda")
    start = sum(case.counts[:poisoned])
    case.rows[start : start + case.counts[poisoned], 7] = math.nan
    for expert, result in enumerate(case.wgrad(NATIVE)):
        assert result[:, 7].isnan().all() if expert == poisoned else result.isfinite().all()
        assert result[:, :7].isfinite().all() and result[:, 8:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[5, 0, 300, 64], [2000, 1600]], ids=str)
def test_same_bits_every_time_and_in_turns(counts: list[int]) -> None:
    case = Case(counts, "cuda", 512, 640)
    total = torch.randn(case.shape, device="cuda")
    results = []
    for in_turns in (False, False, True, True):
        added = case.wgrad(NATIVE, out=total.clone(), accumulate=True, in_turns=in_turns)
        results.append((case.wgrad(NATIVE, in_turns=in_turns), added))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.gpu
def test_captured_with_other_counts_on_replay() -> None:
    case = Case([100, 20, 138], "cuda", 256, 128, 0)
    total = torch.zeros(case.shape, device="cuda")
    case.wgrad(NATIVE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = case.wgrad(NATIVE)
        case.wgrad(NATIVE, out=total, accumulate=True)
    for counts in ([1, 1, 256], [258, 0, 0], [129, 0, 129]):
        case.counts = counts
        case.segments.ends.copy_(torch.tensor(counts).cumsum(0).int())
        written.fill_(math.nan)
        total.zero_()
        graph.replay()
        case.check(NATIVE, written, OF_BF16)
        case.check(NATIVE, total, OF_SUMS)


def in_fp8(experts: GroupedExperts) -> GroupedExperts:
    """The same with gradients of weights in FP8."""
    experts.config = dataclasses.replace(experts.config, wgrad_precision="fp8")
    return experts


DEVICES = pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["cpu", "gpu"],
)


def step(
    experts: GroupedExperts, rows: Tensor | QuantizedRows, weights: Tensor, segments: ExpertSegments, grad: Tensor
) -> list[Tensor]:
    """Result and gradients: of rows, of their weights, of both projections."""
    leaf = rows.stand_in if isinstance(rows, QuantizedRows) else rows
    out = experts(rows, weights, segments)
    return [out.detach(), *torch.autograd.grad(out, [leaf, weights, *experts.parameters()], grad)]


@DEVICES
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("arrived", [False, True], ids=["rows as they are", "rows in FP8"])
def test_gradients_of_experts(device: str, dtype: torch.dtype, recompute: bool, arrived: bool) -> None:
    counts = [9, 0, 70, 200]
    segments = segments_of(counts, device)
    x, grad = (torch.randn(sum(counts), 128, device=device, dtype=dtype) for _ in range(2))
    weights = torch.rand(sum(counts), device=device).requires_grad_()
    rows: Tensor | QuantizedRows = x.requires_grad_()
    if arrived:
        values, scales = quantize_e4m3(x.detach())
        rows = QuantizedRows(values, scales, x.new_empty(()).expand(x.shape).requires_grad_())
    exact = step(make_experts("input", device, dtype), x, weights, segments, grad)
    fp8, both = make_experts("fp8", device, dtype), in_fp8(make_experts("fp8", device, dtype))
    for experts in (fp8, both):
        experts.config = dataclasses.replace(experts.config, recompute_activation=recompute)
    former, found = (step(experts, rows, weights, segments, grad) for experts in (fp8, both))
    assert all(map(torch.equal, found[:3], former[:3]))  # all but the gradients of weights
    for ours, theirs, right in zip(found[3:], former[3:], exact[3:], strict=True):
        assert ours.dtype == dtype and not torch.equal(ours, theirs)
        assert float((ours.double() - right.double()).norm() / right.double().norm()) < 2 * RELATIVE_ERROR


@DEVICES
def test_later_and_into_main_grad(device: str, dtype: torch.dtype) -> None:
    counts = [9, 0, 70, 200]
    segments = segments_of(counts, device)
    x, grad = (torch.randn(sum(counts), 128, device=device, dtype=dtype) for _ in range(2))
    weights = torch.rand(sum(counts), device=device).requires_grad_()
    experts = in_fp8(make_experts("fp8", device, dtype))
    expected = step(experts, x.requires_grad_(), weights, segments, grad)[3:]
    deferred = DeferredGradients(experts.fc1_weight, experts.fc2_weight)
    experts(x, weights, segments, deferred).backward(grad)
    with torch.no_grad():  # as those who defer do
        late = deferred.compute()
    for gradient, right in zip(late, expected, strict=True):
        assert gradient is not None and torch.equal(gradient, right)
    for parameter in experts.parameters():
        parameter.main_grad = torch.ones(parameter.shape, device=device)  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    step(experts, x, weights, segments, grad)
    for parameter, right in zip(experts.parameters(), expected, strict=True):
        assert parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(parameter.main_grad - 1, right.float(), rtol=2**-8, atol=1e-5)  # type: ignore[attr-defined]


def test_a_step_quantises_each_operand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr("ep_moe.experts.grouped.select_fp8_backend", lambda *_, **__: counting.gemm)
    counts = [3, 0, 5, 8]
    rows = torch.randn(16, 128).requires_grad_()
    in_fp8(make_experts("fp8"))(rows, torch.rand(16), segments_of(counts, "cpu")).sum().backward()
    assert counting.calls == {
        "quantize_weight": 2,
        "quantize_both": 2,  # rows that come, and the gradient of those that go
        "quantize_columns": 2,  # activations, and the gradient of what they are of
        "activate": 1,
        "activation_gradients": 1,
        "multiply": 4,
        "wgrad": 2,
    }


def test_refusal() -> None:
    with pytest.raises(ConfigError, match=r"wgrad_precision = fp8: needs moe.experts.precision fp8, which is input"):
        ExpertsConfig(wgrad_precision="fp8")
