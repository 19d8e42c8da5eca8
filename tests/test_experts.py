"""Experts against a dense fp64 oracle: every back end and activation, forward and all gradients."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError, ExpertsConfig, SharedExpertsConfig
from ep_moe.experts import (
    GroupedExperts,
    SharedExperts,
    apply_activation,
    backends,
    fc1_width,
    initialize_experts,
)
from ep_moe.experts.gemm import GroupedGemm
from ep_moe.experts.te import TE

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
