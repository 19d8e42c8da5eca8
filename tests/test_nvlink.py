"""The CUDA communicator against the portable one, and what happens when a rank does not come."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from communicators import make_communicator, rank_device
from gpu_ranks import gpu_ranks, gpu_ranks_and_counts
from ranks import run_ranks
from routing_cases import PATTERNS, Case, make_inputs

from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_faults import PeerTimeoutError

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
        once, wanted_once = (c.dispatch(x, idx, weights, layout="rows", **kwargs) for c in (ours, oracle))
        z = torch.randn(once.rows.shape, device=on).to(case.dtype)
        y = torch.randn(got.segments.num_rows, case.hidden, device=on).to(case.dtype)
        values = torch.randn(got.segments.num_rows, device=on)
        sums = torch.randn(once.rows.shape[0], case.top_k, device=on)
        summed, expected, repeated = (
            communicator.combine(y, arrived.handle)
            for communicator, arrived in ((ours, got), (oracle, want), (ours, again))
        )
        exact = oracle.combine(y.double(), want.handle)
        # Half a unit for a rank's sum, half for the final one; fp32 sums are not exact either.
        allowed = torch.finfo(case.dtype).eps * oracle.combine(y.double().abs(), want.handle) + 1e-30
        allowed *= case.top_k + world if case.dtype == torch.float32 else 1
        checks = {
            "sizes": got.segments.sizes == want.segments.sizes,
            "counts": torch.equal(got.segments.counts, want.segments.counts),
            "ends": torch.equal(got.segments.ends, want.segments.ends),
            "rows": torch.equal(got.rows.view(torch.uint8), want.rows.view(torch.uint8)),
            "scales": not fp8 or torch.equal(got.scales, want.scales),  # type: ignore[arg-type]
            "weights": torch.equal(got.weights, want.weights),  # type: ignore[arg-type]
            "dispatch again": torch.equal(got.rows.view(torch.uint8), again.rows.view(torch.uint8)),
            "row_of_slot": torch.equal(got.row_of_slot, want.row_of_slot),
            "received": torch.equal(once.rows.view(torch.uint8), wanted_once.rows.view(torch.uint8)),
            "received scales": not fp8 or torch.equal(once.scales, wanted_once.scales),  # type: ignore[arg-type]
            "received routing": all(
                torch.equal(a, b)
                for a, b in zip(vars(once.routing).values(), vars(wanted_once.routing).values(), strict=True)
            ),
            "received cached": torch.equal(
                ours.dispatch_cached(x, got.handle, "rows"), oracle.dispatch_cached(x, want.handle, "rows")
            ),
            "received combined": torch.equal(
                ours.combine(z, once.handle, "rows"), oracle.combine(z, wanted_once.handle, "rows")
            ),
            "received sums": torch.equal(
                ours.combine_received(sums, once.handle), oracle.combine_received(sums, wanted_once.handle)
            ),
            "combine": torch.equal(summed, expected),
            "combine rounds": bool(((summed.double() - exact).abs() <= allowed).all()),
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
    return problems


@pytest.mark.parametrize(("ranks", "count"), gpu_ranks_and_counts({1: 250, 2: 400, 4: 250, 8: 100}, 1000))
def test_random_cases_equal_the_portable_communicator(ranks: int, count: int) -> None:
    for start in range(0, count, 50):
        for problems in run_ranks(ranks, _compare, 1000 * ranks + start, 50):
            assert not problems, "\n".join(problems[:5])


def _absent_rank(rank: int, world: int) -> tuple[str, float, float]:
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=32, timeout_s=2.0)
    case = Case(tokens=(8,) * world, num_experts=2 * world, top_k=2, hidden=64)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    communicator.dispatch(x, idx, weights, num_experts=case.num_experts)
    start, message = time.monotonic(), ""
    if rank < world - 1:
        try:
            communicator.dispatch(x, idx, weights, num_experts=case.num_experts)
        except PeerTimeoutError as error:
            message = str(error)
    waited = time.monotonic() - start
    dist.barrier()
    return message, waited, float(torch.ones(10, device=on).sum())


@pytest.mark.parametrize("ranks", gpu_ranks(2))
def test_a_rank_that_never_arrives_is_named(ranks: int) -> None:
    *others, _ = run_ranks(ranks, _absent_rank)
    for rank, (message, waited, alive) in enumerate(others):
        assert f"rank {rank} waited 2 s for rank {ranks - 1}" in message and "step: routing" in message
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
        lambda: communicator.combine(torch.zeros(3, 8, device=on), handle),
        lambda: communicator.combine(torch.zeros(8, 16, device=on).to(torch.float8_e4m3fn), handle),
    ]
    handle = communicator.dispatch(torch.zeros(4, 8, device=on), idx, None, num_experts=4).handle
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_bad_arguments_are_named() -> None:
    row, dtype, device, experts, rows, summed = run_ranks(1, _errors)[0]
    assert "rows of a multiple of 16 bytes, got 28" in row
    assert "expected one of" in dtype and "torch.float64" in dtype
    assert "expected a CUDA tensor" in device
    assert "num_experts: expected at most 1024, got 2048" in experts
    assert "rows: expected [8, hidden] as dispatched, got [3, 8]" in rows
    assert "expected one of torch.float32, torch.bfloat16, torch.float16, got torch.float8_e4m3fn" in summed


def _growth(rank: int, world: int) -> list[bool]:
    on = rank_device("cuda", rank)
    communicator, oracle = NvlinkCommunicator(dist.group.WORLD, on), make_communicator("portable", dist.group.WORLD)
    right, old = [], None
    # Only one rank brings more than before, now this one, now that one; rows get wider, then more are chosen.
    for tokens, top_k, hidden in [((3, 5), 2, 64), ((40, 2), 2, 64), ((1, 70), 2, 128), ((200, 300), 4, 128)]:
        case = Case(tokens=tokens, num_experts=4, top_k=top_k, hidden=hidden)
        x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
        got, want = (c.dispatch(x, idx, weights, num_experts=4) for c in (communicator, oracle))
        right.append(torch.equal(got.rows, want.rows))
        if old is not None:  # handles of before the growth stay valid
            right.append(torch.equal(communicator.dispatch_cached(old[0], old[1].handle), old[1].rows))
            right.append(
                torch.equal(
                    communicator.combine(old[1].rows, old[1].handle), oracle.combine(old[2].rows, old[2].handle)
                )
            )
            right.append(
                torch.equal(
                    communicator.combine_weights(old[1].weights, old[1].handle),
                    oracle.combine_weights(old[2].weights, old[2].handle),
                )
            )
        old = x, got, want
    return right


def test_buffers_grow_when_any_rank_brings_more() -> None:
    for right in run_ranks(2, _growth):
        assert all(right), right


def _too_many_tokens(rank: int, world: int) -> tuple[str, bool]:
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=32)
    case = Case(tokens=(8, 50), num_experts=4, top_k=2, hidden=64)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    communicator.dispatch(x[:8], idx[:8], weights[:8], num_experts=4, max_rows=400)
    communicator.dispatch(x, idx, weights, num_experts=4, max_rows=400)
    torch.cuda.synchronize()
    message = ""
    try:
        communicator.check()
    except ValueError as error:
        message = str(error)
    arrived = communicator.dispatch(x, idx, weights, num_experts=4)
    return message, torch.equal(communicator.combine(arrived.rows, arrived.handle), x * 2)


def test_with_a_capacity_too_many_tokens_are_an_error_on_all_ranks() -> None:
    for message, works in run_ranks(2, _too_many_tokens):
        assert "50 tokens, but buffers were made for 32 a rank" in message and "max_tokens_per_rank" in message
        assert works


def _replay(rank: int, world: int, replays: int) -> list[int]:
    """Replays of captured exchanges, with other routing each time, that differ from eager ones."""
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=64)
    case = Case(tokens=(48,) * world, num_experts=2 * world, top_k=3, hidden=256, dtype=torch.bfloat16)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    room = 48 * world * 3

    def exchange() -> list[torch.Tensor]:
        arrived = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, max_rows=room)
        real = torch.arange(room, device=on) < arrived.segments.ends[-1]
        values = torch.where(real, arrived.weights, 0)  # type: ignore[arg-type]
        once = communicator.dispatch_cached(x, arrived.handle, "rows")
        return [
            arrived.segments.ends,
            values,
            communicator.combine(arrived.rows, arrived.handle),
            communicator.combine(once, arrived.handle, "rows"),
            communicator.combine_weights(values, arrived.handle),
        ]

    exchange()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = exchange()
    wrong = []
    for replay in range(replays):
        for tensor, new in zip((x, idx, weights), make_inputs(replace(case, seed=replay), rank), strict=True):
            tensor.copy_(new)
        graph.replay()
        replayed = [t.clone() for t in captured]
        if not all(torch.equal(a, b) for a, b in zip(replayed, exchange(), strict=True)):
            wrong.append(replay)
    return wrong


@pytest.mark.parametrize(("ranks", "replays"), gpu_ranks_and_counts({1: 50, 2: 50, 4: 50}, 1000))
def test_captured_exchanges_equal_eager_ones(ranks: int, replays: int) -> None:
    for wrong in run_ranks(ranks, _replay, replays):
        assert wrong == []


def _capture_without_capacity(rank: int, world: int) -> list[str]:
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=64)
    x, idx = torch.zeros(4, 64, device=on), torch.zeros(4, 1, dtype=torch.int64, device=on)
    messages = []
    communicator.dispatch(x, idx, None, num_experts=1)
    for hidden, rows in ((64, None), (128, 4)):
        wide = torch.zeros(4, hidden, device=on)
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                communicator.dispatch(wide, idx, None, num_experts=1, max_rows=rows)
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_captured_is_refused() -> None:
    without, growing = run_ranks(1, _capture_without_capacity)[0]
    assert "max_rows: must be given while a CUDA graph is captured" in without
    assert "cannot grow while CUDA graphs hold its address" in growing
