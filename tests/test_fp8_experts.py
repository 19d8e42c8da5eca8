"""Experts in FP8: the kernels against exact products of their operands, and the emulation against both."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.config import ConfigError, ExpertsConfig, MoEConfig
from ep_moe.config_loading import config_from_dict
from ep_moe.experts import GroupedExperts
from ep_moe.experts.backends import select_fp8_backend
from ep_moe.experts.fp8 import Fp8Gemm, Fp8Rows, Fp8Weight
from ep_moe.experts.fp8_emulated import EMULATED
from ep_moe.experts.native_fp8 import NATIVE

BACKENDS = [
    pytest.param(EMULATED, "cpu", id="emulated"),
    pytest.param(NATIVE, "cuda", id="native", marks=pytest.mark.gpu),
]
# Of e4m3 rounding (2^-4 of each factor at most, and they average out) in the products of normally distributed factors.
RELATIVE_ERROR = 0.06


def segments_of(counts: list[int], device: str, extra: int = 0) -> ExpertSegments:
    """Segments of these sizes, with ``extra`` rows behind them if any."""
    counted = torch.tensor(counts, device=device)
    ends = counted.cumsum(0).int()
    if extra:
        return ExpertSegments(counted, ends, None, sum(counts) + extra)
    return ExpertSegments(counted, ends, tuple(counts))


def exact_rows(rows: Fp8Rows) -> Tensor:
    """The values that quantised rows stand for, fp64."""
    return rows.values.double() * rows.scales.t().double().repeat_interleave(128, dim=1)


def exact_weight(weight: Fp8Weight) -> Tensor:
    """The values that a quantised weight stands for, fp64."""
    return weight.values.double() * weight.scales.double().repeat_interleave(128, 1).repeat_interleave(128, 2)


def product_of(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Each expert's rows times its transposed weight, in the dtype of both."""
    parts = rows[: sum(counts)].split(counts)
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])


def check_multiply(gemm: Fp8Gemm, device: str, counts: list[int], columns: int, reduction: int, extra: int) -> None:
    """One product against fp64, with garbage behind the last segment."""
    segments = segments_of(counts, device, extra)
    rows = torch.randn(segments.num_rows, reduction, device=device).bfloat16()
    weight = torch.randn(len(counts), columns, reduction, device=device).bfloat16()
    exact = product_of(rows.double(), weight.double(), counts)
    rows[sum(counts) :] = torch.nan
    fp8_rows, pair = gemm.quantize_rows(rows, segments), gemm.quantize_weight(weight, False)
    assert pair.transposed is None
    out = gemm.multiply(fp8_rows, pair.weight, segments, torch.bfloat16)[: sum(counts)].double()
    of_rounded = product_of(exact_rows(fp8_rows), exact_weight(pair.weight), counts)
    if sum(counts):
        largest = float(of_rounded.abs().max())
        # One rounding to bf16, and sums of 128 products that the multiply keeps with 14 bits.
        assert float((out - of_rounded).abs().max()) <= largest * (2**-8 + 2**-11)
        assert float((out - exact).norm() / exact.norm()) <= RELATIVE_ERROR


@pytest.mark.parametrize(("gemm", "device"), BACKENDS)
@pytest.mark.parametrize(
    "counts",
    [[5], [0, 3, 0], [1, 64, 65, 0, 130, 257, 2], [0, 0], [300, 7]],
    ids=lambda counts: "-".join(map(str, counts)),
)
@pytest.mark.parametrize("extra", [0, 3])
def test_products(gemm: Fp8Gemm, device: str, counts: list[int], extra: int) -> None:
    check_multiply(gemm, device, counts, 256, 384, extra)


@pytest.mark.gpu
def test_random_counts() -> None:
    for _ in range(200):
        experts = random.choice([1, 2, 5, 33, 128])
        counts = [random.choice([0, 1, random.randint(0, 90), random.randint(0, 600)]) for _ in range(experts)]
        columns, reduction = (128 * random.randint(1, 5) for _ in range(2))
        check_multiply(NATIVE, "cuda", counts, columns, reduction, random.choice([0, 1, 200]))


@pytest.mark.parametrize(("gemm", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantisation(gemm: Fp8Gemm, device: str, dtype: torch.dtype) -> None:
    segments = segments_of([40, 29], device)
    rows = (torch.randn(69, 384, device=device) * torch.logspace(-8, 8, 69, device=device)[:, None]).to(dtype)
    rows[3, 5], rows[4, 128], rows[6] = torch.nan, torch.inf, 0
    values, scales = quantize_e4m3(rows)
    quantized = gemm.quantize_rows(rows, segments)
    assert torch.equal(quantized.values.view(torch.uint8), values.view(torch.uint8))
    torch.testing.assert_close(quantized.scales, scales.t(), rtol=0, atol=0, equal_nan=True)

    weight = torch.randn(3, 256, 384, device=device).to(dtype)
    weight[1] *= 1e-6
    pair = gemm.quantize_weight(weight, True)
    exact, blocks = exact_weight(pair.weight), weight.double().view(3, 2, 128, 3, 128)
    error = (exact - weight.double()).view(3, 2, 128, 3, 128).abs().amax((2, 4))
    # Half of the last of four bits of the largest.
    assert (error <= torch.maximum(blocks.abs().amax((2, 4)), torch.tensor(1e-4, device=device)) * 2**-4).all()
    assert pair.transposed is not None
    assert torch.equal(exact_weight(pair.transposed), exact.transpose(1, 2))


def make_experts(precision: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GroupedExperts:
    """Four experts of widths 128 and 256, the same for every precision."""
    torch.manual_seed(0)
    config = ExpertsConfig(ffn_hidden_size=256, precision=precision)  # type: ignore[arg-type]
    init = {"init_method": nn.init.xavier_normal_, "output_init_method": nn.init.xavier_normal_}
    return GroupedExperts(128, 4, config, device=device, dtype=dtype, **init)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["cpu", "gpu"],
)
def test_network_and_gradients_are_near_those_without_rounding(device: str, dtype: torch.dtype) -> None:
    counts = [9, 0, 70, 200]
    segments = segments_of(counts, device)
    rows, grad = (torch.randn(sum(counts), 128, device=device, dtype=dtype) for _ in range(2))
    row_weights = torch.rand(sum(counts), device=device)
    results = []
    for precision in ("input", "fp8"):
        experts = make_experts(precision, device, dtype)
        x, weights = rows.clone().requires_grad_(), row_weights.clone().requires_grad_()
        out = experts(x, weights, segments)
        out.backward(grad)
        assert x.grad is not None and weights.grad is not None
        parameters = [parameter.grad for parameter in experts.parameters()]
        results.append([out.detach(), x.grad, weights.grad, *parameters])
    for exact, rounded in zip(*results, strict=True):
        assert exact is not None and rounded is not None and exact.dtype == rounded.dtype
        difference = float((rounded.double() - exact.double()).norm() / exact.double().norm())
        assert 0 < difference < 2 * RELATIVE_ERROR


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"moe.experts.precision = fp8: needs moe.experts.ffn_hidden_size"):
        ExpertsConfig(ffn_hidden_size=64, precision="fp8")
    with pytest.raises(ConfigError, match=r"needs moe.experts.backend auto, native or loop, which is te"):
        ExpertsConfig(backend="te", precision="fp8")
    with pytest.raises(ConfigError, match=r"moe.experts.precision = fp8: needs model.hidden_size"):
        config_from_dict({"model": {"hidden_size": 64}, "moe": {"experts": {"precision": "fp8"}}})
    with pytest.raises(ConfigError, match=r"moe.experts.precision = fp8: needs hidden_size \(64\)"):
        GroupedExperts(
            64, 1, ExpertsConfig(precision="fp8"), init_method=torch.Tensor.zero_, output_init_method=torch.Tensor.zero_
        )
    assert MoEConfig().experts.precision == "input"
    sizes = {"num_local_experts": 2, "hidden_size": 128, "ffn_hidden_size": 128}
    with pytest.raises(ConfigError, match=r"moe.experts.precision = fp8: .*needs bf16 on a CUDA GPU, got .* on cpu"):
        select_fp8_backend("native", dtype=torch.bfloat16, device=torch.device("cpu"), **sizes)
