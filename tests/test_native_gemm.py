"""The grouped GEMMs of the CUDA library beside fp32 products of each expert's rows."""

from __future__ import annotations

import math
import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ep_moe.comm import ExpertSegments
from ep_moe.config import ConfigError, ExpertsConfig
from ep_moe.experts import GroupedExperts, apply_activation, native_gemm
from ep_moe.experts.backends import GROUPED_MM, LOOP, select_backend
from ep_moe.experts.native_gemm import NATIVE

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

_RANDOM = random.Random(0)
_CASES = {
    "one tile": ([64], 64, 64, 0),
    "few rows": ([8, 3], 64, 64, 5),
    "two tiles an expert": ([257, 0, 1, 130], 256, 128, 3),
    "edges": ([0, 1, 16, 17, 64, 65, 160, 161, 0], 320, 192, 9),
    "uneven": ([_RANDOM.choice([0, 1, 7, 90, 144, 150, 200, 321, 600]) for _ in range(24)], 704, 448, 100),
    "one expert": ([700], 512, 1024, 1),
    "all rows in one of many": ([0] * 7 + [1500] + [0] * 8, 128, 256, 0),
    "1024 experts": ([_RANDOM.randrange(3) for _ in range(1024)], 64, 128, 7),
    "every width": ([*range(1, 161)], 576, 320, 0),
    "no rows": ([0, 0, 0], 64, 64, 4),
}


class Case:
    """Inputs of random values; NaN beyond the last segment."""

    def __init__(self, counts: list[int], out_features: int, in_features: int, extra: int, seed: int = 0) -> None:
        self.generator = torch.Generator("cuda").manual_seed(seed)
        real = sum(counts)
        self.ranges = [slice(end - n, end) for end, n in zip(accumulate(counts), counts, strict=True)]
        self.rows, self.grad = self.normal(real + extra, in_features), self.normal(real + extra, out_features)
        self.rows[real:] = math.nan
        self.grad[real:] = math.nan
        self.weight = self.normal(len(counts), out_features, in_features)
        as_tensor = torch.tensor(counts, device="cuda")
        self.segments = ExpertSegments(as_tensor, as_tensor.cumsum(0).int(), None, real + extra)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=self.generator).bfloat16()

    def check(self, out: Tensor | None, grad_rows: Tensor | None, grad_weight: Tensor | None) -> None:
        """Raise unless the results given are each expert's products."""
        for expert, place in enumerate(self.ranges):
            x, g, w = self.rows[place].float(), self.grad[place].float(), self.weight[expert].float()
            if out is not None:
                assert_close(out[place], x @ w.T)
            if grad_rows is not None:
                assert_close(grad_rows[place], g @ w)
            if grad_weight is not None:
                assert_close(grad_weight[expert], g.T @ x)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Apart by the rounding of the result and of fp32 sums."""
    if expected.numel():
        tolerance = 1e-3 * float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(actual.float(), expected, rtol=2**-7, atol=tolerance)


def products(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return (
        NATIVE.forward(case.rows, case.weight, case.segments),
        NATIVE.dgrad(case.grad, case.weight, case.segments),
        NATIVE.wgrad(case.grad, case.rows, case.segments),
    )


@pytest.fixture(autouse=True)
def _exact_oracle() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", _CASES)
def test_products(name: str) -> None:
    case = Case(*_CASES[name])
    case.check(*products(case))


@needs_hopper
@pytest.mark.gpu
def test_random_counts() -> None:
    for seed in range(500):
        choose = random.Random(seed)
        experts = choose.randrange(1, 40)
        typical = choose.choice([1, 8, 40, 160, 300])
        counts = [choose.choice([0, choose.randrange(typical + 1), typical, 2 * typical]) for _ in range(experts)]
        widths = [64 * choose.randrange(1, 12) for _ in range(2)]
        case = Case(counts, *widths, extra=choose.choice([0, 1, 33]), seed=seed)
        case.check(*products(case))


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("poisoned", range(4))
def test_an_experts_rows_reach_no_other(poisoned: int) -> None:
    case = Case([37, 161, 5, 66], 192, 320, 9)
    case.rows[case.ranges[poisoned]] = math.nan
    case.grad[case.ranges[poisoned]] = math.nan
    out, grad_rows, grad_weight = products(case)
    for expert, place in enumerate(case.ranges):
        for result in (out[place], grad_rows[place], grad_weight[expert]):
            assert result.isnan().all() if expert == poisoned else result.isfinite().all()


@needs_hopper
@pytest.mark.gpu
def test_rows_beyond_the_last_segment_are_not_written() -> None:
    case = Case([3, 170], 64, 64, 30)
    recycled = torch.full((203, 64), 7.0, device="cuda", dtype=torch.bfloat16)
    for product in (NATIVE.forward, NATIVE.dgrad):
        address = recycled.data_ptr()
        del recycled  # the allocator hands this block to the result
        recycled = product(case.rows, case.weight, case.segments)
        assert recycled.data_ptr() == address
        assert (recycled[173:] == 7).all()


@needs_hopper
@pytest.mark.gpu
def test_weight_gradients_into_memory_that_is_there() -> None:
    case = Case([5, 0, 300, 64], 128, 192, 3)
    fresh = NATIVE.wgrad(case.grad, case.rows, case.segments)
    poison = torch.full_like(fresh, math.nan)
    assert NATIVE.wgrad(case.grad, case.rows, case.segments, out=poison) is poison
    assert torch.equal(poison, fresh)

    before = torch.randn(fresh.shape, device="cuda")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2**-7)):
        total = before.to(dtype, copy=True)
        start = total.float().clone()
        for _ in range(2):
            NATIVE.wgrad(case.grad, case.rows, case.segments, out=total, accumulate=True)
        for expert, place in enumerate(case.ranges):
            added = 2 * case.grad[place].float().T @ case.rows[place].float()
            torch.testing.assert_close(
                total[expert].float(), start[expert] + added, rtol=2 * tolerance, atol=tolerance * 40
            )
    overwritten = torch.full(fresh.shape, math.nan, device="cuda")
    NATIVE.wgrad(case.grad, case.rows, case.segments, out=overwritten)
    case.check(None, None, overwritten)
    assert not overwritten[1].any()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "out_features", "in_features"),
    [
        ([5, 0, 300, 64], 192, 448),
        ([1], 64, 64),
        ([700] * 9, 576, 704),
        ([0, 1700, 3], 320, 192),
        ([1000] * 3, 512, 64),
    ],
)
def test_fp32_gradients_are_added_in_one_rounding(counts: list[int], out_features: int, in_features: int) -> None:
    case = Case(counts, out_features, in_features, 3)
    shape = (len(counts), out_features, in_features)
    gradient = NATIVE.wgrad(case.grad, case.rows, case.segments, out=torch.zeros(shape, device="cuda"))
    case.check(None, None, gradient)
    before = 100 * torch.randn(shape, device="cuda")
    total = NATIVE.wgrad(case.grad, case.rows, case.segments, out=before.clone(), accumulate=True)
    assert torch.equal(total, before + gradient)


def check_swiglu(case: Case, weighted: bool) -> None:
    """Raise unless the fused forward has the bits of a GEMM and the activation's kernel, one after the other."""
    assert NATIVE.swiglu is not None
    real = case.ranges[-1].stop
    weights = torch.rand(len(case.rows), device="cuda", generator=case.generator) if weighted else None
    pre_activation = NATIVE.forward(case.rows, case.weight, case.segments)
    expected = apply_activation(pre_activation, "swiglu", weights, case.segments.row_count)
    for keep in (True, False):
        out, kept = NATIVE.swiglu(case.rows, case.weight, case.segments, weights, keep=keep)
        assert torch.equal(out[:real], expected[:real])
        assert (kept is not None) == keep
        assert kept is None or torch.equal(kept[:real], pre_activation[:real])


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", _CASES)
def test_swiglu(name: str) -> None:
    counts, width, in_features, extra = _CASES[name]
    check_swiglu(Case(counts, 2 * width, in_features, extra), weighted=True)


@needs_hopper
@pytest.mark.gpu
def test_swiglu_of_random_counts() -> None:
    for seed in range(100):
        choose = random.Random(seed)
        typical = choose.choice([1, 8, 40, 160, 300])
        counts = [choose.randrange(2 * typical + 1) for _ in range(choose.randrange(1, 40))]
        widths = [128 * choose.randrange(1, 8), 64 * choose.randrange(1, 12)]
        case = Case(counts, *widths, extra=choose.choice([0, 1, 33]), seed=seed)
        check_swiglu(case, weighted=choose.random() < 0.8)


@needs_hopper
@pytest.mark.gpu
def test_swiglu_writes_nothing_else() -> None:
    assert NATIVE.swiglu is not None
    case = Case([3, 170, 9], 128, 64, 30)
    case.rows[case.ranges[1]] = math.nan
    weights = torch.rand(len(case.rows), device="cuda")
    recycled = torch.full((len(case.rows), 64), 7.0, device="cuda", dtype=torch.bfloat16)
    address = recycled.data_ptr()
    del recycled  # the allocator hands this block to the result
    out, _ = NATIVE.swiglu(case.rows, case.weight, case.segments, weights, keep=False)
    assert out.data_ptr() == address
    assert (out[182:] == 7).all()
    assert out[:3].isfinite().all() and out[3:173].isnan().all() and out[173:182].isfinite().all()


@needs_hopper
@pytest.mark.gpu
def test_same_bits_every_time() -> None:
    case = Case([5, 0, 300, 64], 128, 192, 0)
    first = products(case)
    total = torch.randn(4, 128, 192, device="cuda")
    sums = [NATIVE.wgrad(case.grad, case.rows, case.segments, out=total.clone(), accumulate=True) for _ in range(3)]
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    for _ in range(3):
        for one, other in zip(first, products(case), strict=True):
            assert torch.equal(one, other)


@needs_hopper
@pytest.mark.gpu
def test_rows_that_start_anywhere() -> None:
    case = Case([9, 14], 64, 64, 0)
    case.rows = torch.cat([case.rows.new_zeros(1), case.rows.flatten()])[1:].view_as(case.rows)
    case.check(*products(case))


@needs_hopper
@pytest.mark.gpu
def test_captured_with_other_counts_on_replay() -> None:
    case = Case([100, 20, 8], 128, 64, 0)
    products(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = products(case)
    case.segments.ends.copy_(torch.tensor([1, 1, 128], dtype=torch.int32))
    case.ranges = [slice(0, 1), slice(1, 1), slice(1, 128)]
    for result in results:
        result.fill_(math.nan)
    graph.replay()
    case.check(*results)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu"])
def test_experts_equal_those_of_the_loop(activation: str) -> None:
    counts, hidden, ffn = [5, 0, 300, 64], 128, 192
    case = Case(counts, hidden, hidden, 0)
    weights = torch.rand(sum(counts), device="cuda")
    results = []
    for backend in ("native", "loop"):
        torch.manual_seed(0)
        init: dict[str, Any] = {"init_method": nn.init.normal_, "output_init_method": nn.init.normal_}
        config = ExpertsConfig(ffn_hidden_size=ffn, activation=activation, backend=backend)  # type: ignore[arg-type]
        dtype = torch.bfloat16 if backend == "native" else torch.float64
        experts = GroupedExperts(hidden, len(counts), config, dtype=torch.bfloat16, device="cuda", **init).to(dtype)
        leaves = [case.rows.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_(), *experts.parameters()]
        out = experts(*leaves[:2], case.segments)
        results.append([out, *torch.autograd.grad(out, leaves, case.grad.to(dtype))])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - expected).abs().max() <= 2e-2 * expected.abs().max()


@needs_hopper
@pytest.mark.gpu
def test_chosen_where_it_runs() -> None:
    sizes = {"num_local_experts": 4, "hidden_size": 128, "ffn_hidden_size": 64}
    bf16_on_gpu = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    assert select_backend("auto", **bf16_on_gpu, **sizes) is NATIVE
    assert select_backend("auto", **bf16_on_gpu, **{**sizes, "ffn_hidden_size": 72}) is GROUPED_MM
    with pytest.raises(ConfigError, match=r"moe.experts.ffn_hidden_size = 72: must be a multiple of 64"):
        select_backend("native", **bf16_on_gpu, **{**sizes, "ffn_hidden_size": 72})
    with pytest.raises(ConfigError, match="at most 1024 experts a rank, got 1025"):
        select_backend("native", **bf16_on_gpu, **{**sizes, "num_local_experts": 1025})
    assert select_backend("auto", dtype=torch.float32, device=torch.device("cuda"), **sizes) is LOOP


def test_refused_on_a_cpu() -> None:
    sizes = {"num_local_experts": 4, "hidden_size": 128, "ffn_hidden_size": 64}
    on_cpu = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    with pytest.raises(ConfigError, match=r"moe.experts.backend = native: needs bf16 on a CUDA GPU, got .* on cpu"):
        select_backend("native", **on_cpu, **sizes)
    assert select_backend("auto", **on_cpu, **sizes) is GROUPED_MM


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("turns", [1, 4])
def test_bits_do_not_depend_on_how_many_blocks_there_are(turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([90, 300, 0, 700, 41], 704, 448, 5)
    real, wanted = case.ranges[-1].stop, products(case)
    for blocks in (1, 2, 7, 131):
        monkeypatch.setattr(native_gemm, "multiprocessors", lambda device, blocks=blocks: blocks)
        found = (
            native_gemm.forward(case.rows, case.weight, case.segments, turns=turns)[:real],
            native_gemm.dgrad(case.grad, case.weight, case.segments, turns=turns)[:real],
            native_gemm.wgrad(case.grad, case.rows, case.segments, turns=turns),
        )
        assert all(map(torch.equal, found, (wanted[0][:real], wanted[1][:real], wanted[2])))
