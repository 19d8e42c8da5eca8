"""The activations' CUDA kernels against the eager path in fp64, and the choice between the two paths."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ep_moe import native
from ep_moe.experts import activation_kernels, apply_activation, fc1_width
from ep_moe.experts.activation import activate, activation_backward
from ep_moe.native import NativeLibraryError, library_path, load_library

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "squared_relu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows and vectors of 16 bytes per output row: below, at and above a warp and the width from which a block shares a
# row; uneven ends; more rows than the grid takes in one go.
SHAPES = [
    (0, 4),
    (1, 1),
    (7, 3),
    (1001, 1),
    (257, 8),
    (63, 32),
    (129, 33),
    (40001, 17),
    (301, 256),
    (65, 512),
    (5003, 513),
]
SHAPES += [(3, 2050)]


@pytest.fixture(autouse=True)
def _fresh_inputs() -> None:
    torch.seed()


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill fresh memory with NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def width_of(vectors: int, dtype: torch.dtype) -> int:
    return vectors * 16 // dtype.itemsize


def make_inputs(
    rows: int, ffn: int, activation: str, dtype: torch.dtype, weight_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, row weights and the gradient of the result."""
    x = (2 * torch.randn(rows, fc1_width(activation, ffn), device="cuda")).to(dtype)
    return x, torch.rand(rows, device="cuda").to(weight_dtype), torch.randn(rows, ffn, device="cuda").to(dtype)


def run(
    x: Tensor, weights: Tensor | None, grad: Tensor, activation: str, row_count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result and the gradients of x and of the weights."""
    x = x.detach().requires_grad_()
    weights = None if weights is None else weights.detach().requires_grad_()
    out = apply_activation(x, activation, weights, row_count)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad, None if weights is None else weights.grad


def check_against_oracle(
    x: Tensor, weights: Tensor | None, grad: Tensor, activation: str, row_count: Tensor | None = None
) -> None:
    count = len(x) if row_count is None else int(row_count)
    actual = run(x, weights, grad, activation, row_count)
    wide = None if weights is None else weights[:count].double()
    expected = run(x[:count].double(), wide, grad[:count].double(), activation)
    # Half a unit of the one rounding, and fp32 arithmetic before it, which cancels where GELU is near 0.
    relative = torch.finfo(x.dtype).eps / 2 + 4e-6
    for result, oracle in zip(actual[:2], expected[:2], strict=True):
        assert result.dtype == x.dtype and result.is_contiguous()
        torch.testing.assert_close(result[:count].double(), oracle, rtol=relative, atol=2e-5)
    if weights is not None:
        assert actual[2] is not None and expected[2] is not None and actual[2].dtype == weights.dtype
        terms = (grad[:count].double() * apply_activation(x[:count].double(), activation)).abs().sum(-1)
        bound = 2e-6 * terms + 1e-6
        if weights.dtype != torch.float32:
            bound += torch.finfo(weights.dtype).eps / 2 * expected[2].abs()
        assert ((actual[2][:count].double() - expected[2]).abs() <= bound).all()


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Entry points that were launched, as they are."""
    launched: list[str] = []
    launch = activation_kernels._launch

    def record(entry: str, *args: object) -> None:
        launched.append(entry)
        launch(entry, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(activation_kernels, "_launch", record)
    return launched


BOTH = ["activation_forward", "activation_backward"]


def test_every_launch_names_an_entry_point_that_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: set[str] = set()
    launched: set[str] = set()

    def load(entries: dict[str, object]) -> object:
        declared.update(entries)
        return object()

    monkeypatch.setattr(native, "load_entry_points", load)
    monkeypatch.setattr(activation_kernels, "find_library", activation_kernels.find_library.__wrapped__)
    monkeypatch.setattr(activation_kernels, "launch", lambda library, name, *_: launched.add(name))
    x, grad, counts = torch.zeros(2, 3, 32), torch.zeros(2, 3, 16), torch.zeros(2, dtype=torch.int32)
    activation_kernels.forward_packed(x, "swiglu", counts, 16)
    assert launched == {"activation_forward"}
    activation_kernels.forward(x, "swiglu", None, None, 16)
    activation_kernels.backward(grad, x, "swiglu", None, None, need_x=True, need_weights=False)
    assert launched == declared


def test_rows_that_fit() -> None:
    fit = activation_kernels.rows_fit
    assert fit(torch.bfloat16, 8) and fit(torch.float16, 1408) and fit(torch.float32, 4)
    assert not fit(torch.bfloat16, 4) and not fit(torch.float16, 12) and not fit(torch.float32, 6)
    assert not fit(torch.float64, 8) and not fit(torch.bfloat16, 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_rows_take_the_eager_path(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_kernels, "find_library", lambda: pytest.fail("CPU rows need no library"))
    x = torch.randn(5, 16, requires_grad=True)
    weights = torch.rand(5, requires_grad=True)
    assert not activation_kernels.usable(x, 8)
    count = torch.tensor([5], dtype=torch.int32)
    out = apply_activation(x, activation, weights, count)
    assert torch.equal(out, apply_activation(x, activation, weights))
    out.sum().backward()
    assert x.grad is not None and weights.grad is not None


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 8), ("relu", 16)])
def test_usable_rows_take_the_kernels(activation: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    weights = torch.rand(3, requires_grad=True)
    count = torch.tensor([2], dtype=torch.int32)
    asked = []

    def usable(rows: Tensor, out_width: int) -> bool:
        asked.append((rows.shape, out_width))
        return True

    def forward(
        rows: Tensor, name: str, row_weights: Tensor, row_count: Tensor, out_width: int, **whole: None
    ) -> Tensor:
        assert not any(whole.values())
        assert name == activation and row_weights is weights and row_count is count and out_width == width
        return torch.full((3, width), 1.0)

    def backward(
        grad: Tensor,
        rows: Tensor,
        name: str,
        row_weights: Tensor,
        row_count: Tensor,
        *,
        need_x: bool,
        need_weights: bool,
        **whole: None,
    ) -> tuple[Tensor, Tensor]:
        assert not any(whole.values())
        assert grad.shape == (3, width) and name == activation and row_count is count and need_x and need_weights
        return torch.full_like(rows, 2.0), torch.full_like(row_weights, 3.0)

    monkeypatch.setattr(activation_kernels, "usable", usable)
    monkeypatch.setattr(activation_kernels, "forward", forward)
    monkeypatch.setattr(activation_kernels, "backward", backward)
    out = apply_activation(x, activation, weights, count)
    out.backward(torch.ones_like(out))
    assert x.grad is not None and weights.grad is not None
    assert bool((out == 1).all()) and bool((x.grad == 2).all()) and bool((weights.grad == 3).all())
    assert asked == [(x.shape, width)] * 2


def test_missing_library_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(entries: object) -> ctypes.CDLL:
        raise NativeLibraryError("not built")

    monkeypatch.setattr(native, "load_entry_points", missing)
    find = activation_kernels.find_library.__wrapped__
    monkeypatch.setattr(native, "library_path", lambda: tmp_path / "absent.so")
    assert find() is None
    monkeypatch.setattr(native, "library_path", lambda: tmp_path)
    with pytest.warns(UserWarning, match="without their CUDA kernels: not built"):
        assert find() is None


def test_arguments_have_the_library_s_size() -> None:
    if not library_path().exists():
        pytest.skip("the CUDA library was not built here")
    load_library()
    assert activation_kernels.find_library() is not None


def check_activation_made_again(x: Tensor, weights: Tensor, grad: Tensor, activation: str) -> None:
    """Raise unless backward makes it in the memory of the gradient, and the gradients are those without."""
    count = torch.tensor([max(x.shape[0] - 3, 0)], dtype=torch.int32, device=x.device)

    def gradients(grad: Tensor, activated: Tensor | None) -> tuple[Tensor | None, ...]:
        return activation_backward(
            grad, x, activation, weights, count, need_x=True, need_weights=True, activated=activated
        )

    wanted, made = gradients(grad, None), grad.clone()
    found = gradients(made, made)
    real = int(count)
    for one, other in zip((*found, made), (*wanted, activate(x, activation, weights, count)), strict=True):
        assert one is not None and other is not None and torch.equal(one[:real], other[:real])
    assert torch.equal(made[real:], grad[real:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_makes_the_activation_again(activation: str) -> None:
    x = torch.randn(9, fc1_width(activation, 24)).bfloat16()
    check_activation_made_again(x, torch.rand(9), torch.randn(9, 24).bfloat16(), activation)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_make_the_activation_again(activation: str, dtype: torch.dtype) -> None:
    for rows, vectors in SHAPES:
        x, weights, grad = make_inputs(rows, width_of(vectors, dtype), activation, dtype)
        check_activation_made_again(x, weights, grad, activation)


@pytest.mark.parametrize(
    "count", [torch.tensor([1]), torch.tensor([1, 1], dtype=torch.int32), torch.empty(0, dtype=torch.int32)]
)
def test_row_count_is_checked(count: Tensor) -> None:
    with pytest.raises(ValueError, match="row_count: expected one int32"):
        apply_activation(torch.randn(2, 4), "swiglu", None, count)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_match_the_oracle(
    activation: str, dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = count_launches(monkeypatch)
    for rows, vectors in SHAPES:
        x, weights, grad = make_inputs(rows, width_of(vectors, dtype), activation, dtype)
        check_against_oracle(x, weights if weighted else None, grad, activation)
    assert launched == BOTH * len(SHAPES)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("rows", "vectors"), [(513, 5), (1000, 256), (5003, 513)])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_only_counted_rows_are_computed(activation: str, rows: int, vectors: int) -> None:
    ends = torch.zeros(4, dtype=torch.int32, device="cuda")
    for count in (0, 1, rows // 3, rows - 1, rows, rows + 5):
        ends[-1] = count
        real = min(count, rows)
        x, weights, grad = make_inputs(rows, width_of(vectors, torch.bfloat16), activation, torch.bfloat16)
        x[real:] = weights[real:] = grad[real:] = torch.nan
        check_against_oracle(x[:real], weights[:real], grad[:real], activation)
        results = run(x, weights, grad, activation, ends[-1:])
        exact = run(x[:real], weights[:real], grad[:real], activation)
        for result, expected in zip(results, exact, strict=True):
            assert result is not None and expected is not None
            assert torch.equal(result[:real], expected)
            assert result[real:].isnan().all()  # as allocated


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes(weight_dtype: torch.dtype) -> None:
    x, weights, grad = make_inputs(77, 64, "swiglu", torch.bfloat16, weight_dtype)
    check_against_oracle(x, weights, grad, "swiglu")
    strided = torch.rand(77, 3, device="cuda").to(weight_dtype)[:, 1]
    check_against_oracle(x, strided, grad, "swiglu")


@pytest.mark.gpu
@pytest.mark.parametrize("vectors", [3, 256, 600])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bitwise_equal_from_run_to_run(activation: str, vectors: int) -> None:
    inputs = make_inputs(3001, width_of(vectors, torch.bfloat16), activation, torch.bfloat16)
    first = run(*inputs, activation)
    for _ in range(3):
        for result, expected in zip(run(*inputs, activation), first, strict=True):
            assert result is not None and expected is not None and torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
def test_millions_of_rows() -> None:
    x, weights, grad = make_inputs(3_000_001, 8, "swiglu", torch.bfloat16)
    check_against_oracle(x, weights, grad, "swiglu")


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numerical_gradients(activation: str) -> None:
    """Central differences of the kernels themselves, in fp32."""
    x, weights, grad = make_inputs(9, 12, activation, torch.float32)
    x = torch.where(x.abs() < 0.1, 0.5, x)  # away from the kink of relu
    _, grad_x, grad_weights = run(x, weights, grad, activation)
    direction_x, direction_weights = torch.randn_like(x), torch.randn_like(weights)
    step = 1e-2

    def loss(sign: int) -> Tensor:
        moved = apply_activation(
            x + sign * step * direction_x.clamp(-3, 3), activation, weights + sign * step * direction_weights
        )
        return (moved.double() * grad.double()).sum()

    assert grad_weights is not None
    slope = (loss(1) - loss(-1)) / (2 * step)
    expected = (grad_x * direction_x.clamp(-3, 3)).double().sum() + (grad_weights * direction_weights).double().sum()
    torch.testing.assert_close(slope, expected, rtol=1e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_as_eager(activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = torch.finfo(dtype).max
    values = [
        torch.nan,
        torch.inf,
        -torch.inf,
        0.0,
        -0.0,
        1.0,
        90.0,
        -90.0,
        200.0,
        -200.0,
        6e4,
        -6e4,
        largest,
        -largest,
    ]
    x = torch.tensor(values, device="cuda").to(dtype)[:, None].expand(-1, fc1_width(activation, 8)).contiguous()
    # Positive, because whether a sum of huge terms of both signs overflows depends on its order.
    weights, grad = torch.rand(len(values), device="cuda"), 1 + torch.rand(len(values), 8, device="cuda").to(dtype)
    results = run(x, weights, grad, activation)
    monkeypatch.setattr(activation_kernels, "usable", lambda *_: False)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for result, expected in zip(results, run(x, weights, grad, activation), strict=True):
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
def test_gradients_that_are_not_needed_or_not_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_launches(monkeypatch)
    x, weights, grad = make_inputs(33, 64, "swiglu", torch.bfloat16)
    _, grad_x, grad_weights = run(x, weights, grad, "swiglu")
    only_x = x.clone().requires_grad_()
    apply_activation(only_x, "swiglu", weights).backward(grad)
    only_weights = weights.clone().requires_grad_()
    apply_activation(x, "swiglu", only_weights).backward(grad)
    assert only_x.grad is not None and only_weights.grad is not None and grad_weights is not None
    assert torch.equal(only_x.grad, grad_x) and torch.equal(only_weights.grad, grad_weights)

    misaligned = torch.empty(grad.numel() + 1, dtype=grad.dtype, device="cuda")[1:].view_as(grad).copy_(grad)
    transposed = grad.t().contiguous().t()
    for other in (misaligned, transposed):
        assert torch.equal(run(x, weights, other, "swiglu")[1], grad_x)
    expanded = torch.ones((), dtype=grad.dtype, device="cuda").expand_as(grad)
    assert torch.equal(run(x, weights, expanded, "swiglu")[1], run(x, weights, torch.ones_like(grad), "swiglu")[1])
    assert launched == BOTH * 7


@pytest.mark.gpu
def test_leading_dimensions() -> None:
    x, weights, grad = make_inputs(24, 64, "geglu", torch.bfloat16)
    flat = run(x, weights, grad, "geglu")
    shaped = run(x.view(2, 3, 4, -1), weights.view(2, 3, 4), grad.view(2, 3, 4, -1), "geglu")
    for result, expected in zip(shaped, flat, strict=True):
        assert result is not None and expected is not None and torch.equal(result.flatten(), expected.flatten())
    single = run(x[0], weights[0], grad[0], "geglu")
    assert torch.equal(single[0], flat[0][0]) and torch.equal(single[1], flat[1][0])


@pytest.mark.gpu
def test_path_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = count_launches(monkeypatch)
    x = torch.randn(6, 64, device="cuda")
    flat = torch.randn(6 * 64 + 1, device="cuda")
    eager = [x.double(), x[:, :24].bfloat16(), x[:, :32], x.t().contiguous().t(), flat[1:].view(6, 64), x[:, :0]]
    for rows in eager:
        apply_activation(rows.detach().requires_grad_(), "swiglu").sum().backward()
    apply_activation(x.requires_grad_(), "swiglu", torch.rand(6, device="cuda").double()).sum().backward()
    assert launched == BOTH
    monkeypatch.setattr(activation_kernels, "find_library", lambda: None)
    apply_activation(x, "swiglu").sum().backward()
    assert launched == BOTH


@pytest.mark.gpu
def test_graph_replays_with_another_row_count() -> None:
    x, weights, grad = make_inputs(600, 512, "swiglu", torch.bfloat16)
    expected = run(x, weights, grad, "swiglu")
    count = torch.full((1,), 600, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = activation_kernels.forward(x, "swiglu", weights, count, 512)
        grads = activation_kernels.backward(grad, x, "swiglu", weights, count, need_x=True, need_weights=True)
    for real in (600, 17, 0):
        count.fill_(real)
        for result in (out, *grads):
            assert result is not None
            result.fill_(torch.nan)
        graph.replay()
        for result, oracle in zip((out, *grads), expected, strict=True):
            assert result is not None and oracle is not None
            assert torch.equal(result[:real], oracle[:real]) and bool(result[real:].isnan().all())
