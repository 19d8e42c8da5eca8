"""Back ends of the grouped GEMMs one by one: what each computes, and what it refuses."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_cases import (
    ACTIVATIONS,
    FFN,
    HIDDEN,
    TOLERANCE,
    assert_close,
    check_against_oracle,
    make_experts,
    make_segments,
    normal,
)
from torch import Tensor

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError, ExpertsConfig
from ep_moe.experts import GroupedExperts, backends
from ep_moe.experts.gemm import GroupedGemm
from ep_moe.experts.te import TE


def test_grouped_mm_refuses_what_it_cannot_do() -> None:
    segments = make_segments([1, 1])
    with pytest.raises(ConfigError, match=r"moe.experts.backend = grouped_mm: .*float64"):
        make_experts(2, backend="grouped_mm", dtype=torch.float64)(torch.randn(2, HIDDEN).double(), None, segments)
    for hidden, ffn, path in ((12, 16, "model.hidden_size = 12"), (16, 12, "moe.experts.ffn_hidden_size = 12")):
        for backend in ("grouped_mm", "auto"):
            config = ExpertsConfig(ffn_hidden_size=ffn, backend=backend)  # type: ignore[arg-type]
            kwargs: dict[str, Any] = {"init_method": normal, "output_init_method": normal, "dtype": torch.bfloat16}
            experts = GroupedExperts(hidden, 2, config, **kwargs)
            rows = torch.randn(2, hidden).bfloat16()
            if backend == "auto":
                assert experts(rows, None, segments).shape == rows.shape
            else:
                with pytest.raises(ValueError, match=f"{path}: must be a multiple of 8"):
                    experts(rows, None, segments)


HAS_TE = importlib.util.find_spec("transformer_engine") is not None


@pytest.mark.skipif(HAS_TE, reason="TransformerEngine is installed")
def test_missing_te_is_a_one_line_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"moe.experts.backend = te: .*transformer-engine\[pytorch\]") as error:
        make_experts(2, backend="te")
    assert "\n" not in str(error.value)


def stand_in_grouped_gemm(
    a: list[Tensor],
    b: list[Tensor],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    grad: bool = False,
    accumulate: bool = False,
    single_output: bool = False,
) -> None:
    """Has the signature of TransformerEngine's function, as far as we use it, and a plain loop inside."""
    assert m_splits is not None and quantization_params == [None] * len(a) and out_dtype == out[0].dtype
    assert grad == (layout != "TN")
    product = {"TN": lambda x, y: y @ x.T, "NN": lambda x, y: y @ x, "NT": lambda x, y: y.T @ x}[layout]
    results = [product(x, y) for x, y in zip(a, b, strict=True)]
    outputs = out[0].split(m_splits) if single_output else out
    for output, result in zip(outputs, results, strict=True):
        output.copy_(output + result if accumulate else result)


@pytest.fixture
def stand_in_te(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("transformer_engine.pytorch.cpp_extensions")
    module.general_grouped_gemm = stand_in_grouped_gemm  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0]])
def test_te_receives_our_tensors(stand_in_te: None, counts: list[int]) -> None:
    """Our half of the binding only: what TransformerEngine is given, and where results go."""
    check_gemm(TE, torch.float32, counts, "cpu")


def test_another_te_is_a_configuration_error(stand_in_te: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    monkeypatch.setattr(module, "general_grouped_gemm", lambda a, b, out, out_dtype, workspaces: None)
    with pytest.raises(ConfigError, match=r"moe.experts.backend = te: .*has another general_grouped_gemm"):
        make_experts(2, backend="te")


def check_gemm(gemm: GroupedGemm, dtype: torch.dtype, counts: Sequence[int], device: str, capacity: int = 0) -> None:
    """The three functions of a back end against sums over rows in fp64; a weight gradient in every way to store it."""
    segments = make_segments(counts, device=device)
    if capacity:
        segments = ExpertSegments(segments.counts, segments.ends, None, capacity)
    total, experts = sum(counts), len(counts)
    rows, grad = (torch.randn(segments.num_rows, width, device=device, dtype=dtype) for width in (HIDDEN, FFN))
    rows[total:], grad[total:] = math.nan, math.nan
    weight = torch.randn(experts, FFN, HIDDEN, device=device, dtype=dtype)
    expert_of = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts)).to(device)
    wide_rows, wide_grad, wide_weight = rows[:total].double(), grad[:total].double(), weight.double()

    out = gemm.forward(rows, weight, segments)
    assert out.shape == (segments.num_rows, FFN) and out.dtype == dtype
    expected = torch.einsum("rh,rfh->rf", wide_rows, wide_weight[expert_of])
    assert_close("forward", out[:total], expected.cpu(), TOLERANCE[dtype])
    grad_rows = gemm.dgrad(grad, weight, segments)
    assert grad_rows.shape == rows.shape and grad_rows.dtype == dtype
    expected = torch.einsum("rf,rfh->rh", wide_grad, wide_weight[expert_of])
    assert_close("dgrad", grad_rows[:total], expected.cpu(), TOLERANCE[dtype])

    member = F.one_hot(expert_of, experts).double()
    expected = torch.einsum("re,rf,rh->efh", member, wide_grad, wide_rows)
    grad_weight = gemm.wgrad(grad, rows, segments)
    assert grad_weight.dtype == dtype
    assert_close("wgrad", grad_weight, expected.cpu(), TOLERANCE[dtype])
    assert not grad_weight[torch.tensor(counts) == 0].any()
    for out_dtype in {dtype, torch.promote_types(dtype, torch.float32)}:
        start = torch.randn(weight.shape, device=device, dtype=out_dtype)
        for accumulate in (False, True):
            buffer = start.clone()
            assert gemm.wgrad(grad, rows, segments, out=buffer, accumulate=accumulate) is buffer
            total_gradient = expected + start.double() * accumulate
            assert_close(f"wgrad, accumulate {accumulate}", buffer, total_gradient.cpu(), TOLERANCE[dtype])


GEMMS = [
    pytest.param(backends.LOOP, torch.float64, id="loop-fp64"),
    pytest.param(backends.LOOP, torch.bfloat16, id="loop-bf16"),
    pytest.param(backends.GROUPED_MM, torch.float32, id="grouped_mm-fp32"),
    pytest.param(backends.GROUPED_MM, torch.bfloat16, id="grouped_mm-bf16"),
]


@pytest.mark.parametrize(("gemm", "dtype"), GEMMS)
@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0], [5]])
def test_gemms(gemm: GroupedGemm, dtype: torch.dtype, counts: list[int]) -> None:
    check_gemm(gemm, dtype, counts, "cpu")
    check_gemm(gemm, dtype, counts, "cpu", capacity=16)


@pytest.mark.gpu
@pytest.mark.parametrize("gemm", [backends.LOOP, backends.GROUPED_MM], ids=["loop", "grouped_mm"])
@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0], [130, 0, 5]])
def test_gpu_gemms(gemm: GroupedGemm, counts: list[int]) -> None:
    check_gemm(gemm, torch.bfloat16, counts, "cuda")
    check_gemm(gemm, torch.bfloat16, counts, "cuda", capacity=160)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed")
def test_te_gemms() -> None:
    check_gemm(TE, torch.bfloat16, [16, 0, 48, 8], "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_TE, reason="TransformerEngine is not installed")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_te_matches_oracle(activation: str) -> None:
    check_against_oracle("te", activation, torch.bfloat16, [16, 0, 48, 8], device="cuda")
