"""The low-latency contract: what every implementation must do, against a plain oracle."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from communicators import LOW_LATENCY_COMMUNICATORS, make_low_latency_communicator, rank_device
from gpu_ranks import gpu_ranks_and_counts
from low_latency_cases import (
    LowLatencyCase,
    agree,
    expected_payload,
    expected_rows,
    expected_sums,
    make_inputs,
    random_case,
    same,
)
from ranks import run_ranks

from ep_moe.comm.low_latency import IN_FLIGHT, LowLatencyCommunicator, PackedRows
from ep_moe.comm.portable_low_latency import PortableLowLatencyCommunicator

BASE = LowLatencyCase(tokens=(5, 8), max_tokens=8, hidden=128, local_experts=2, top_k=2)


def build(kind: str, case: LowLatencyCase, rank: int) -> LowLatencyCommunicator:
    assert dist.group.WORLD is not None
    return make_low_latency_communicator(kind, dist.group.WORLD, case.max_tokens, case.hidden, case.num_experts)


def check_packed(case: LowLatencyCase, rank: int, packed: PackedRows) -> list[str]:
    """What is wrong with the rows that arrived."""
    expected = expected_rows(case, rank)
    numbers = [len(rows) for rows in expected]
    ranges = []
    for rows in expected:
        by_rank = [sum(source == other for source, _ in rows) for other in range(case.ranks)]
        ranges.append([sum(by_rank[:other]) << 32 | number for other, number in enumerate(by_rank)])
    if packed.counts.tolist() != numbers or packed.handle.ranges.tolist() != ranges:
        return ["counts"]

    def arrived(places: torch.Tensor) -> torch.Tensor:
        """What was written, moved at once: to wait for the part of each expert takes longer."""
        return torch.cat([part[:number].double() for part, number in zip(places.cpu(), numbers, strict=True)])

    rows = [row for of_expert in expected for row in of_expert]
    owner = [expert for expert, number in enumerate(numbers) for _ in range(number)]
    wrong = set()
    if arrived(packed.handle.source_token).tolist() != [token for _, token in rows]:
        wrong.add("tokens")
    parts = [packed.rows] if packed.scales is None else [packed.rows, packed.scales]
    for part, want in zip(parts, expected_payload(case, rows), strict=True):
        different = ~agree(arrived(part), want).all(1)
        wrong |= {f"rows or scales of expert {owner[row]}" for row in different.nonzero().flatten().tolist()}
    return sorted(wrong)


def run_cases(rank: int, world: int, kind: str, device: str, cases: list[LowLatencyCase]) -> list[str]:
    """Dispatch and combine each case whole, split in some order of the hooks, twice at once; what went wrong.

    Weights travel with the rows, or with each combine.
    """
    on, wrong = rank_device(device, rank), []
    for case in cases:
        communicator, mine = build(kind, case, rank), make_inputs(case, rank)
        x, idx, weights, out = (t.to(on) for t in (mine.x, mine.topk_idx, mine.topk_weights, mine.experts_out))
        received = torch.zeros(case.local_experts, dtype=torch.int32, device=on)
        wait_ns = torch.zeros(world, dtype=torch.int64, device=on)
        options = {"scale_format": case.scale_format, "received": received, "wait_ns": wait_ns}
        choose = random.Random(case.seed)
        early, late = (weights, None) if choose.random() < 0.5 else (None, weights)
        if choose.random() < 0.5:
            packed = [communicator.dispatch(x, idx, early, **options)]  # type: ignore[arg-type]
        else:
            pairs = [communicator.dispatch_send(x, idx, early, **options) for _ in range(2)]  # type: ignore[arg-type]
            for place in choose.choice([(0, 1), (1, 0)]):
                pairs[place][1]()
            packed = [pair[0] for pair in pairs]
        rows = torch.full_like(out, float("nan"))  # rows behind the counts are not read
        for expert, count in enumerate(packed[0].counts.tolist()):
            rows[expert, :count] = out[expert, :count]
        if choose.random() < 0.5:
            sums = [communicator.combine(rows, idx, late, packed[0].handle, wait_ns=wait_ns) for _ in range(2)]
        else:
            given = torch.full((case.tokens[rank], case.hidden), float("nan"), dtype=torch.bfloat16, device=on)
            buffer = communicator.combine_buffer(packed[0].handle).copy_(rows)
            halves = [
                communicator.combine_send(buffer, idx, late, packed[-1].handle, out=given),
                communicator.combine_send(rows, idx, late, packed[0].handle),
            ]
            for place in choose.choice([(0, 1), (1, 0)]):
                halves[place][1]()
            sums = [half[0] for half in halves]
            if sums[0] is not given:
                wrong.append(f"{case}: out is not what was given")
        problems = [problem for arrived in packed for problem in check_packed(case, rank, arrived)]
        if received.tolist() != [len(packed) * len(expert) for expert in expected_rows(case, rank)]:
            problems.append("received")
        if not all(same(got.cpu(), expected_sums(case, rank)) for got in sums):
            problems.append("combine")
        wrong += [f"{case}: {problem}" for problem in problems]
    return wrong


DEFAULT_COUNTS = {1: 24, 2: 12, 4: 6}


@pytest.mark.parametrize(("kind", "device"), LOW_LATENCY_COMMUNICATORS)
@pytest.mark.parametrize(("ranks", "count"), gpu_ranks_and_counts(DEFAULT_COUNTS, 1000))
def test_random_cases(kind: str, device: str, ranks: int, count: int) -> None:
    if device == "cpu":  # the larger count is for GPUs
        count = DEFAULT_COUNTS.get(ranks, min(DEFAULT_COUNTS.values()))
    cases = [random_case(1000 * ranks + seed, ranks) for seed in range(count)]
    for start in range(0, count, 50):
        for wrong in run_ranks(ranks, run_cases, kind, device, cases[start : start + 50]):
            assert not wrong, "\n".join(wrong[:5])


@pytest.mark.gpu
@pytest.mark.parametrize(("ranks", "cases"), gpu_ranks_and_counts({1: 300, 2: 400, 4: 260, 8: 40}, 400))
def test_a_thousand_random_cases(ranks: int, cases: int) -> None:
    drawn = [random_case(10_000 * ranks + seed, ranks) for seed in range(cases)]
    for wrong in run_ranks(ranks, run_cases, "nvlink", "cuda", drawn):
        assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize(("kind", "device"), LOW_LATENCY_COMMUNICATORS)
@pytest.mark.parametrize("tokens", [(0, 0), (8, 0), (0, 1), (8, 8)])
def test_any_number_of_tokens(kind: str, device: str, tokens: tuple[int, int]) -> None:
    cases = [replace(BASE, tokens=tokens, seed=seed) for seed in range(4)]
    for wrong in run_ranks(2, run_cases, kind, device, cases):
        assert not wrong, "\n".join(wrong[:5])


def use_every_order(rank: int, world: int, kind: str, device: str) -> list[str]:
    """Dispatches and combines of two micro-batches, halves in every order in which they are legal.

    The weights of one travel with its rows, those of the other with its sums.
    """
    on, wrong = rank_device(device, rank), []
    communicator, batches = build(kind, BASE, rank), [make_inputs(replace(BASE, seed=seed), rank) for seed in (1, 2)]
    wanted = [expected_sums(replace(BASE, seed=seed), rank) for seed in (1, 2)]
    steps = [(batch, step) for batch in range(2) for step in range(4)]
    orders = [order for order in itertools.permutations(steps) if _is_legal(order)]
    for order in random.Random(0).sample(orders, 12):
        packed: list = [None, None]
        summed: list = [None, None]
        for batch, step in order:
            mine = batches[batch]
            x, idx, weights, out = (t.to(on) for t in (mine.x, mine.topk_idx, mine.topk_weights, mine.experts_out))
            if step == 0:
                packed[batch] = communicator.dispatch_send(x, idx, weights if batch == 0 else None)
            elif step == 2:
                late = None if batch == 0 else weights
                summed[batch] = communicator.combine_send(out, idx, late, packed[batch][0].handle)
            else:
                (packed if step == 1 else summed)[batch][1]()
        if not all(same(got.cpu(), want) for (got, _), want in zip(summed, wanted, strict=True)):
            wrong.append(str(order))
    return wrong


def _is_legal(order: tuple[tuple[int, int], ...]) -> bool:
    """The steps of a batch in their order."""
    return all([step for b, step in order if b == batch] == [0, 1, 2, 3] for batch in range(2))


def send_weights_now_and_then(rank: int, world: int, kind: str, device: str) -> list[int]:
    """Dispatches with and without weights, some never combined and some twice, later ones first; which sums are wrong.

    More rounds than landing buffers, so that each is used after rounds of either kind.
    """
    on, wrong = rank_device(device, rank), []
    communicator = build(kind, BASE, rank)
    choose = random.Random(5)  # the same on all ranks
    kept = []
    for seed in range(24):
        case = replace(BASE, seed=seed)
        mine = make_inputs(case, rank)
        x, idx, weights = (t.to(on) for t in (mine.x, mine.topk_idx, mine.topk_weights))
        early = choose.random() < 0.5
        packed = communicator.dispatch(x, idx, weights if early else None)
        kept.append((case, packed.handle, None if early else weights))
        for _ in range(choose.choice([0, 0, 1, 2])):
            case, handle, late = choose.choice(kept)
            mine = make_inputs(case, rank)
            out = communicator.combine(mine.experts_out.to(on), mine.topk_idx.to(on), late, handle)
            wrong += [case.seed] * (not same(out.cpu(), expected_sums(case, rank)))
    return wrong


@pytest.mark.parametrize(("kind", "device"), LOW_LATENCY_COMMUNICATORS)
def test_weights_that_travel_with_rows_stay_with_the_handle(kind: str, device: str) -> None:
    assert run_ranks(2, send_weights_now_and_then, kind, device) == [[], []]


@pytest.mark.parametrize(("kind", "device"), LOW_LATENCY_COMMUNICATORS)
def test_two_exchanges_under_way(kind: str, device: str) -> None:
    assert run_ranks(2, use_every_order, kind, device) == [[], []]


def _messages(rank: int, world: int, kind: str, device: str) -> list[str]:
    on, messages = rank_device(device, rank), []
    communicator, mine = build(kind, BASE, rank), make_inputs(replace(BASE, tokens=(8, 8)), rank)
    x, idx, weights, out = (t.to(on) for t in (mine.x, mine.topk_idx, mine.topk_weights, mine.experts_out))
    packed, weighted = communicator.dispatch(x, idx), communicator.dispatch(x, idx, weights)
    attempts = [
        lambda: communicator.dispatch(x.float(), idx),
        lambda: communicator.dispatch(x[:, :64], idx),
        lambda: communicator.dispatch(x.repeat(2, 1), idx.repeat(2, 1)),
        lambda: communicator.dispatch(x, idx[:3]),
        lambda: communicator.dispatch(x, idx.repeat(1, 20)),
        lambda: communicator.dispatch(x, idx, scale_format="int8"),  # type: ignore[arg-type]
        lambda: communicator.dispatch(x, idx, received=torch.zeros(3, device=on)),
        lambda: communicator.combine(out[:1], idx, weights, packed.handle),
        lambda: communicator.combine(out, idx, weights.double(), packed.handle),
        lambda: communicator.dispatch(x, idx, weights.double()),
        lambda: communicator.dispatch(x, idx, weights[:, :1]),
        lambda: communicator.combine(out, idx, None, packed.handle),
        lambda: communicator.combine(out, idx, weights, weighted.handle),
        lambda: communicator.mask_rank(rank),
    ]
    for attempt in attempts:
        try:
            attempt()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize(("kind", "device"), LOW_LATENCY_COMMUNICATORS)
def test_bad_arguments_are_named(kind: str, device: str) -> None:
    expected = [
        "x: expected torch.bfloat16 [any, 128]",
        "x: expected torch.bfloat16 [any, 128]",
        "x: 16 tokens exceed phases.decode.max_tokens_per_rank (8)",
        "topk_idx: expected torch.int64 [8, any]",
        "topk_idx: expected a top_k of 1 to 32 (moe.top_k), got 40",
        "scale_format: expected one of none, fp32, ue8m0, got 'int8'",
        "received: expected torch.int32 [2]",
        "rows: expected torch.bfloat16 [2, 16, 128]",
        "topk_weights: expected torch.float32 [8, 2]",
        "topk_weights: expected torch.float32 [8, 2]",
        "topk_weights: expected torch.float32 [8, 2]",
        "topk_weights: expected torch.float32 [8, 2], for the dispatch got none; got None",
        "topk_weights: expected None, for the dispatch got them",
        "rank: expected another rank of the group of 2",
    ]
    for answers in run_ranks(2, _messages, kind, device):
        for answer, want in zip(answers, expected, strict=True):
            assert want in answer


def exchange_masked(rank: int, world: int, kind: str, device: str, early: bool) -> bool:
    on, case = rank_device(device, rank), replace(BASE, tokens=(8, 8))
    communicator, mine = build(kind, case, rank), make_inputs(case, rank)
    x, idx, weights = (t.to(on) for t in (mine.x, mine.topk_idx, mine.topk_weights))
    communicator.mask_rank(1 - rank)
    packed = communicator.dispatch(x, idx, weights if early else None)
    out = communicator.combine(packed.rows, idx, None if early else weights, packed.handle)
    mine_alone = ((mine.topk_idx // case.local_experts == rank) & (mine.topk_idx >= 0)) * mine.topk_weights
    exact = mine.x.double() * mine_alone.double().sum(1, keepdim=True)
    close = ((out.cpu().double() - exact).abs() <= 2**-7 * exact.abs() + 1e-30).all()
    rows = sum(len({token for source, token in rows if source == rank}) for rows in expected_rows(case, rank))
    counted = int(packed.counts.sum()) == rows
    dist.barrier()
    communicator.mask_rank(1 - rank, failed=False)
    dist.barrier()
    again = communicator.dispatch(x, idx)
    return bool(close) and counted and not check_packed(case, rank, again)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("kind", "device"), LOW_LATENCY_COMMUNICATORS)
def test_masked_ranks_contribute_nothing(kind: str, device: str, early: bool) -> None:
    assert run_ranks(2, exchange_masked, kind, device, early) == [True, True]


def _third_in_flight(rank: int, world: int) -> str:
    communicator = PortableLowLatencyCommunicator(dist.group.WORLD, max_tokens=2, hidden=128, num_experts=2)
    x, topk_idx = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    hooks = [communicator.dispatch_send(x, topk_idx)[1] for _ in range(2)]
    try:
        communicator.dispatch_send(x, topk_idx)
    except RuntimeError as error:
        return str(error)
    finally:
        for hook in hooks:
            hook()
    return ""


def test_a_third_exchange_under_way_is_refused_in_the_words_of_the_kernels() -> None:
    message = "dispatches: at most 2 may be under way; call the hook of the one before last first"
    assert run_ranks(1, _third_in_flight) == [message]


def _disagree(rank: int, world: int, changes: dict[str, int]) -> list[str]:
    sizes = {"max_tokens": 4, "hidden": 128, "num_experts": 4, "top_k": 2, "weighted": 1}
    messages = []
    for given in ({**sizes, **(changes if rank == 1 else {})}, {**sizes}):
        top_k, weighted = given.pop("top_k"), given.pop("weighted")
        communicator = PortableLowLatencyCommunicator(dist.group.WORLD, **given)
        weights = torch.ones(3, top_k) if weighted else None
        x = torch.zeros(3, given["hidden"], dtype=torch.bfloat16)
        for _ in range(IN_FLIGHT + 1):  # what is refused is not under way
            try:
                communicator.dispatch(x, torch.zeros(3, top_k, dtype=torch.int64), weights)
                messages.append("no error")
            except ValueError as error:
                messages.append(str(error))
    return messages


@pytest.mark.parametrize(
    "changes", [{"max_tokens": 5}, {"hidden": 256}, {"num_experts": 8}, {"top_k": 3}, {"weighted": 0}]
)
def test_ranks_that_disagree_are_told_so(changes: dict[str, int]) -> None:
    for refused in run_ranks(2, _disagree, changes):
        assert all("all ranks must agree" in message for message in refused[: IN_FLIGHT + 1])
        assert refused[IN_FLIGHT + 1 :] == ["no error"] * (IN_FLIGHT + 1)
