"""The CUDA communicator against the portable one, and what happens when a rank does not come."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from communicators import make_communicator, rank_device
from ranks import run_ranks
from routing_cases import PATTERNS, Case, make_inputs

from ep_moe.comm.nvlink import NvlinkCommunicator, PeerTimeoutError

pytestmark = pytest.mark.gpu


def random_case(seed: int, ranks: int) -> tuple[Case, int, bool]:
    """A case with its alignment and whether rows travel as FP8."""
    choose = random.Random(seed)
    fp8 = choose.random() < 0.3
    dtype = choose.choice([torch.float32, torch.bfloat16, torch.float16])
    case = Case(
        tokens=tuple(choose.choice([0, 1, choose.randint(0, 64), 64]) for _ in range(ranks)),
        num_experts=ranks * choose.choice([1, 2, 5, 16, 32, 128]),
        top_k=choose.choice([1, 2, 8, choose.randint(1, 32)]),
        hidden=128 * choose.randint(1, 6) if fp8 else 8 * choose.choice([1, 3, 96, choose.randint(1, 1100)]),
        pattern=choose.choice(PATTERNS),
        dtype=dtype,
        seed=seed,
    )
    return case, choose.choice([1, 8, 128]), fp8


def _compare(rank: int, world: int, first_seed: int, count: int) -> list[str]:
    on = rank_device("cuda", rank)
    ours, oracle = (make_communicator(kind, dist.group.WORLD) for kind in ("nvlink", "portable"))
    problems = []
    for seed in range(first_seed, first_seed + count):
        case, alignment, fp8 = random_case(seed, world)
        x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
        kwargs = {"num_experts": case.num_experts, "alignment": alignment, "fp8": fp8}
        got, want = (communicator.dispatch(x, idx, weights, **kwargs) for communicator in (ours, oracle))
        again = ours.dispatch(x, idx, weights, **kwargs)
        y = torch.randn(got.segments.num_rows, case.hidden, device=on).to(case.dtype)
        values = torch.randn(got.segments.num_rows, device=on)
        summed, expected, repeated = (
            communicator.combine(y, arrived.handle)
            for communicator, arrived in ((ours, got), (oracle, want), (ours, again))
        )
        exact = oracle.combine(y.double(), want.handle)
        allowed = (world + 1) * torch.finfo(case.dtype).eps * oracle.combine(y.double().abs(), want.handle) + 1e-30
        checks = {
            "sizes": got.segments.sizes == want.segments.sizes,
            "counts": torch.equal(got.segments.counts, want.segments.counts),
            "ends": torch.equal(got.segments.ends, want.segments.ends),
            "rows": torch.equal(got.rows.view(torch.uint8), want.rows.view(torch.uint8)),
            "scales": not fp8 or torch.equal(got.scales, want.scales),  # type: ignore[arg-type]
            "weights": torch.equal(got.weights, want.weights),  # type: ignore[arg-type]
            "dispatch again": torch.equal(got.rows.view(torch.uint8), again.rows.view(torch.uint8)),
            "combine": bool(((summed.double() - exact).abs() <= allowed).all()),
            "combine again": torch.equal(summed, repeated),
            "cached": torch.equal(ours.dispatch_cached(x, got.handle), oracle.dispatch_cached(x, want.handle)),
            "cached weights": torch.equal(ours.dispatch_weights(weights, got.handle), want.weights),  # type: ignore[arg-type]
            "returned": torch.equal(
                ours.combine_weights(values, got.handle), oracle.combine_weights(values, want.handle)
            ),
        }
        problems += [
            f"seed {seed}, {case}, alignment {alignment}, fp8 {fp8}: {n}" for n, ok in checks.items() if not ok
        ]
        del expected
    return problems


@pytest.mark.parametrize(("ranks", "count"), [(1, 250), (2, 400), (4, 250), (8, 100)])
def test_random_cases_equal_the_portable_communicator(ranks: int, count: int) -> None:
    for start in range(0, count, 50):
        for problems in run_ranks(ranks, _compare, 1000 * ranks + start, 50):
            assert not problems, "\n".join(problems[:5])


def _absent_rank(rank: int, world: int) -> tuple[str, float, float]:
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=32, timeout_s=2.0)
    case = Case(tokens=(8, 8), num_experts=4, top_k=2, hidden=64)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    communicator.dispatch(x, idx, weights, num_experts=4)
    start, message = time.monotonic(), ""
    if rank == 0:
        try:
            communicator.dispatch(x, idx, weights, num_experts=4)
        except PeerTimeoutError as error:
            message = str(error)
    waited = time.monotonic() - start
    dist.barrier()
    return message, waited, float(torch.ones(10, device=on).sum())


def test_a_rank_that_never_arrives_is_named() -> None:
    (message, waited, alive), _ = run_ranks(2, _absent_rank)
    assert "rank 0 waited 2 s for rank 1" in message and "step: routing" in message
    assert waited < 10 and alive == 10


def _bad_expert(rank: int, world: int) -> tuple[str, bool]:
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=32)
    case = Case(tokens=(8, 8), num_experts=4, top_k=2, hidden=64)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    bad, message = idx.clone(), ""
    bad[3, 1] = 4
    try:
        communicator.dispatch(x, bad, weights, num_experts=4)
    except ValueError as error:
        message = str(error)
    arrived = communicator.dispatch(x, idx, weights, num_experts=4)
    out = communicator.combine(arrived.rows, arrived.handle)
    return message, torch.equal(out, x * 2)


def test_an_expert_out_of_range_is_an_error_and_the_next_dispatch_works() -> None:
    for message, works in run_ranks(2, _bad_expert):
        assert message == "topk_idx: expected experts in [0, 4) (moe.num_experts) or -1, got 4"
        assert works


def _errors(rank: int, world: int) -> list[str]:
    on = rank_device("cuda", rank)
    communicator = make_communicator("nvlink", dist.group.WORLD)
    idx = torch.zeros(4, 2, dtype=torch.int64, device=on)
    attempts = [
        lambda: communicator.dispatch(torch.zeros(4, 7, device=on), idx, None, num_experts=4),
        lambda: communicator.dispatch(torch.zeros(4, 8, dtype=torch.float64, device=on), idx, None, num_experts=4),
        lambda: communicator.dispatch(torch.zeros(4, 8), idx.cpu(), None, num_experts=4),
        lambda: communicator.dispatch(torch.zeros(4, 8, device=on), idx, None, num_experts=2048),
        lambda: communicator.dispatch(torch.zeros(100, 8, device=on), idx.repeat(25, 1), None, num_experts=4),
    ]
    communicator.dispatch(torch.zeros(4, 8, device=on), idx, None, num_experts=4)
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_bad_arguments_are_named() -> None:
    row, dtype, device, experts, tokens = run_ranks(1, _errors)[0]
    assert "rows of a multiple of 16 bytes, got 28" in row
    assert "expected one of" in dtype and "torch.float64" in dtype
    assert "expected a CUDA tensor" in device
    assert "num_experts: expected at most 1024, got 2048" in experts
    assert "100 tokens, but buffers were made for 64" in tokens and "max_tokens_per_rank" in tokens
