"""Exchanges in steps, a group of local experts each: the bits of whole ones, and what is there after every step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import COMMUNICATORS, make_communicator, rank_device
from gpu_ranks import gpu_ranks_and_counts
from ranks import RankError, run_ranks
from routing_cases import PATTERNS, Case, make_inputs
from torch import Tensor

from ep_moe.comm import Communicator, Dispatched
from ep_moe.comm.expert_groups import expert_groups
from ep_moe.comm.nvlink import NvlinkCommunicator


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the allocator hands out next for such a tensor."""
    torch.full_like(like, float("nan"))


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def check_groups(
    communicator: Communicator, case: Case, rank: int, on: torch.device, groups: int, **options: Any
) -> list[str]:
    """What differs from the whole exchange."""
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    whole = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, **options)
    ends = whole.segments.ends.tolist()
    bounds = [ends[end - 1] for _, end in expert_groups(case.local_experts, groups)]
    found = {}

    def arrives(name: str, want: Tensor, got: Tensor, steps: Iterator[None]) -> None:
        for group, end in enumerate(bounds):
            if group > 0:
                next(steps)
            found[f"{name} {group}"] = same(got[:end], want[:end])
        found[f"{name} ends"] = next(steps, "end") == "end"

    if not options.get("fp8"):
        poison(whole.rows)
    got, steps = communicator.dispatch_in_groups(
        x, idx, weights, groups=groups, num_experts=case.num_experts, **options
    )
    arrives("dispatch", whole.rows, got.rows, steps)
    found |= {
        "scales": whole.scales is None
        or (got.scales is not None and torch.equal(whole.scales[: bounds[-1]], got.scales[: bounds[-1]])),
        "weights": torch.equal(got.weights[: bounds[-1]], whole.weights[: bounds[-1]]),  # type: ignore[index]
        "ends": torch.equal(got.segments.ends, whole.segments.ends) and got.segments.sizes == whole.segments.sizes,
    }
    want = communicator.dispatch_cached(x, whole.handle)
    poison(want)
    arrives("cached", want, *communicator.dispatch_cached_in_groups(x, got.handle, groups))
    found |= check_combine(communicator, case, whole, got, bounds, on)
    return [f"{case}, {groups} groups, {options}: {name}" for name, right in found.items() if not right]


def check_combine(
    communicator: Communicator, case: Case, whole: Dispatched, got: Dispatched, bounds: list[int], on: torch.device
) -> dict[str, bool]:
    """A combine whose rows come group by group."""
    y = torch.randn(whole.segments.num_rows, case.hidden, device=on).to(case.dtype)
    want = communicator.combine(y, whole.handle)
    poison(want)
    late = torch.full_like(y, float("nan"))
    out, steps = communicator.combine_in_groups(late, got.handle, len(bounds))
    for start, end in zip([0, *bounds], bounds, strict=False):
        late[start:end] = y[start:end]
        next(steps)
    return {"combine": torch.equal(out, want), "combine ends": next(steps, "end") == "end"}


def _contract(rank: int, world: int, kind: str, device: str, case: Case) -> list[str]:
    on = rank_device(device, rank)
    communicator = make_communicator(kind, dist.group.WORLD)
    problems = []
    for groups in range(1, case.local_experts + 1):
        problems += check_groups(communicator, case, rank, on, groups, alignment=4)
        problems += check_groups(communicator, case, rank, on, groups, max_rows=200)
        problems += check_groups(communicator, replace(case, hidden=128), rank, on, groups, fp8=True)
    return problems


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_steps_add_up_to_the_whole(kind: str, device: str, pattern: str) -> None:
    case = Case(tokens=(5, 0, 9, 1), num_experts=12, top_k=4, hidden=16, pattern=pattern, dtype=torch.bfloat16)
    for problems in run_ranks(4, _contract, kind, device, case):
        assert not problems, "\n".join(problems[:5])


def _too_many(rank: int, world: int, kind: str) -> None:
    communicator = make_communicator(kind, dist.group.WORLD)
    x, idx = torch.zeros(3, 16), torch.zeros(3, 1, dtype=torch.int64)
    communicator.dispatch_in_groups(x, idx, None, groups=3, num_experts=4)


@pytest.mark.parametrize("kind", ["portable", "two_hop"])
def test_groups_without_experts_are_refused(kind: str) -> None:
    with pytest.raises(RankError, match=r"groups: expected 1 to 2 \(the local experts\), got 3"):
        run_ranks(2, _too_many, kind)


def test_groups_are_consecutive_and_even() -> None:
    assert expert_groups(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert expert_groups(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def _random(rank: int, world: int, first_seed: int, count: int) -> list[str]:
    on = rank_device("cuda", rank)
    communicator = make_communicator("nvlink", dist.group.WORLD)
    problems = []
    for seed in range(first_seed, first_seed + count):
        choose = random.Random(seed)
        local_experts, fp8 = choose.choice([1, 2, 5, 16, 32]), choose.random() < 0.3
        case = Case(
            tokens=tuple(choose.choice([0, 1, choose.randint(0, 64), 64]) for _ in range(world)),
            num_experts=world * local_experts,
            top_k=choose.choice([1, 2, 8, choose.randint(1, 32)]),
            hidden=128 * choose.randint(1, 6) if fp8 else 8 * choose.choice([1, 3, 96, choose.randint(1, 1100)]),
            pattern=choose.choice(PATTERNS),
            dtype=choose.choice([torch.float32, torch.bfloat16, torch.float16]),
            seed=seed,
        )
        room = choose.choice([None, 64 * world * case.top_k + 3])
        options = {"fp8": fp8, "max_rows": room, "num_sms": choose.choice([None, 1, 16])}
        groups = choose.randint(1, min(local_experts, 6))
        problems += check_groups(communicator, case, rank, on, groups, **options)
    return problems


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "count"), gpu_ranks_and_counts({1: 100, 2: 200, 4: 100}, 1000))
def test_random_cases_in_launches_equal_single_ones(ranks: int, count: int) -> None:
    for start in range(0, count, 20):
        for problems in run_ranks(ranks, _random, 1000 * ranks + start, 20):
            assert not problems, "\n".join(problems[:5])


def _replay(rank: int, world: int, replays: int) -> list[int]:
    """Replays of captured exchanges in steps, on two streams, that differ from eager whole ones."""
    on = rank_device("cuda", rank)
    communicator = NvlinkCommunicator(dist.group.WORLD, on, max_tokens=64)
    case = Case(tokens=(48,) * world, num_experts=5 * world, top_k=3, hidden=256, dtype=torch.bfloat16)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    room, side = 48 * world * 3, torch.cuda.Stream(on)
    options = {"num_experts": case.num_experts, "max_rows": room}

    def in_steps() -> list[Tensor]:
        arrived, more = communicator.dispatch_in_groups(x, idx, weights, groups=3, **options)
        side.wait_stream(torch.cuda.current_stream(on))
        with torch.cuda.stream(side):
            for _ in more:
                pass
        torch.cuda.current_stream(on).wait_stream(side)
        out, steps = communicator.combine_in_groups(arrived.rows, arrived.handle, 3)
        for _ in steps:
            pass
        again, more = communicator.dispatch_cached_in_groups(out, arrived.handle, 3)
        for _ in more:
            pass
        return [out, communicator.combine(again, arrived.handle)]

    def whole() -> list[Tensor]:
        arrived = communicator.dispatch(x, idx, weights, **options)
        out = communicator.combine(arrived.rows, arrived.handle)
        return [out, communicator.combine(communicator.dispatch_cached(out, arrived.handle), arrived.handle)]

    in_steps()
    torch.cuda.synchronize(on)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = in_steps()
    wrong = []
    for replay in range(replays):
        for tensor, new in zip((x, idx, weights), make_inputs(replace(case, seed=replay), rank), strict=True):
            tensor.copy_(new)
        graph.replay()
        replayed = [t.clone() for t in captured]
        if not all(torch.equal(a, b) for a, b in zip(replayed, whole(), strict=True)):
            wrong.append(replay)
    return wrong


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "replays"), gpu_ranks_and_counts({1: 30, 2: 30, 4: 30}, 500))
def test_captured_steps_equal_whole_exchanges(ranks: int, replays: int) -> None:
    for wrong in run_ranks(ranks, _replay, replays):
        assert wrong == []
