"""Experts of any kind, their segments, and the dense fp64 oracle that they are held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments
from ep_moe.config import ExpertsConfig
from ep_moe.experts import GroupedExperts

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "squared_relu")
HIDDEN, FFN = 16, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
CASES = [
    ("loop", torch.float64),
    ("loop", torch.float32),
    ("loop", torch.bfloat16),
    ("grouped_mm", torch.float32),
    ("grouped_mm", torch.bfloat16),
    ("auto", torch.float64),
    ("auto", torch.float32),
]


def normal(tensor: Tensor) -> Tensor:
    return nn.init.normal_(tensor, std=0.3)


def make_segments(counts: Sequence[int], alignment: int = 1, device: str = "cpu") -> ExpertSegments:
    sizes = tuple(-(-count // alignment) * alignment for count in counts)
    return ExpertSegments(
        counts=torch.tensor(counts, dtype=torch.int64, device=device),
        ends=torch.tensor(sizes, device=device).cumsum(0).to(torch.int32),
        sizes=sizes,
    )


def real_rows(segments: ExpertSegments) -> Tensor:
    """Which rows are not padding."""
    return torch.cat(
        [torch.arange(size) < count for size, count in zip(segments.sizes, segments.counts.tolist(), strict=True)]
    )


def make_experts(
    num_experts: int,
    activation: str = "swiglu",
    backend: str = "loop",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> GroupedExperts:
    kwargs = {"init_method": normal, "output_init_method": normal, **kwargs}
    config = ExpertsConfig(ffn_hidden_size=FFN, activation=activation, backend=backend)  # type: ignore[arg-type]
    return GroupedExperts(HIDDEN, num_experts, config, dtype=dtype, **kwargs)


def plain_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_activation(x: Tensor, activation: str) -> Tensor:
    half = x.shape[-1] // 2
    if activation == "swiglu":
        return x[..., :half] / (1 + torch.exp(-x[..., :half])) * x[..., half:]
    if activation == "geglu":
        return plain_gelu(x[..., :half]) * x[..., half:]
    if activation == "gelu":
        return plain_gelu(x)
    return torch.clamp(x, min=0) ** (1 if activation == "relu" else 2)


def oracle(
    rows: Tensor, weights: Tensor | None, fc1: Tensor, fc2: Tensor, segments: ExpertSegments, activation: str
) -> Tensor:
    """The weight applied to the output, experts one by one, everything in the dtype given."""
    out, start = [], 0
    for expert, size in enumerate(segments.sizes):
        y = plain_activation(rows[start : start + size] @ fc1[expert].T, activation) @ fc2[expert].T
        out.append(y if weights is None else y * weights[start : start + size, None])
        start += size
    return torch.cat(out)


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Relative to the largest expected value: cancellation makes element-wise relative errors meaningless."""
    assert actual is not None and expected is not None, name
    assert actual.shape == expected.shape, name
    error = (actual.detach().cpu().double() - expected.detach()).abs()
    scale = max(expected.detach().abs().max().item(), 1e-3) if expected.numel() else 1.0
    assert not error.numel() or error.max().item() <= tolerance * scale, f"{name}: {error.max().item() / scale}"


def check_against_oracle(
    backend: str,
    activation: str,
    dtype: torch.dtype,
    counts: Sequence[int],
    alignment: int = 1,
    weighted: bool = True,
    device: str = "cpu",
) -> None:
    segments = make_segments(counts, alignment, device)
    experts = make_experts(len(counts), activation, backend, dtype, device=device)
    real = real_rows(segments)
    rows = (torch.randn(segments.num_rows, HIDDEN) * real[:, None]).to(device, dtype).requires_grad_()
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = (torch.rand(segments.num_rows) * real).to(device, weight_dtype).requires_grad_() if weighted else None
    # Padding rows receive garbage: it must reach no gradient.
    grad = torch.where(real[:, None], torch.randn(segments.num_rows, HIDDEN), 1e4).to(device, dtype)
    out = experts(rows, weights, segments)
    out.backward(grad)

    def wide(x: Tensor) -> Tensor:
        return x.detach().cpu().double().requires_grad_()

    wide_rows, fc1, fc2 = wide(rows), wide(experts.fc1_weight), wide(experts.fc2_weight)
    wide_weights = None if weights is None else wide(weights)
    expected = oracle(wide_rows, wide_weights, fc1, fc2, segments, activation)
    expected.backward(grad.cpu().double() * real[:, None])

    tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype and out.is_contiguous()
    assert_close("out", out, expected, tolerance)
    assert_close("fc1", experts.fc1_weight.grad, fc1.grad, tolerance)
    assert_close("fc2", experts.fc2_weight.grad, fc2.grad, tolerance)
    assert rows.grad is not None and wide_rows.grad is not None
    assert_close("rows", rows.grad[real.to(device)], wide_rows.grad[real], tolerance)
    if weights is not None and wide_weights is not None:
        assert_close("row_weights", weights.grad, wide_weights.grad, tolerance)
        assert weights.grad is not None and weights.grad.dtype == weight_dtype
        for tensor in (out, rows.grad, weights.grad):
            assert not tensor[~real.to(device)].any()
    for parameter in experts.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == dtype
        for expert, count in enumerate(counts):
            assert count or not parameter.grad[expert].any()
