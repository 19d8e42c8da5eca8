"""The communicator contract: what every implementation must do, against an oracle in plain Python."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from communicators import COMMUNICATORS, make_communicator, rank_device
from gpu_ranks import gpu_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks
from routing_cases import PATTERNS, Case, make_inputs

from ep_moe.comm import CapacityError
from ep_moe.comm.fp8 import dequantize_e4m3, quantize_e4m3

CASES = [
    Case(tokens=(5, 7), num_experts=4, top_k=2, hidden=8),
    Case(tokens=(0, 3), num_experts=6, top_k=3, hidden=4),
    Case(tokens=(0, 0), num_experts=2, top_k=1, hidden=4),
    Case(tokens=(9,), num_experts=3, top_k=2, hidden=12),
    Case(tokens=(4, 0, 6, 1), num_experts=8, top_k=4, hidden=16, dtype=torch.bfloat16),
    Case(tokens=(3, 3, 3, 3), num_experts=4, top_k=4, hidden=8, dtype=torch.float16),
    *(Case((3, 0, 5, 8, 1, 2, 9, 4)[:ranks], num_experts=2 * ranks, top_k=3, hidden=8) for ranks in gpu_ranks()),
]


def expected_slots(case: Case) -> list[list[tuple[int, int, int]]]:
    """Per rank, the (source rank, token, k) of every row, ordered by expert, source rank, token, k."""
    inputs = [make_inputs(case, rank)[1].tolist() for rank in range(case.ranks)]
    return [
        [
            (source, token, k)
            for expert in range(rank * case.local_experts, (rank + 1) * case.local_experts)
            for source in range(case.ranks)
            for token, chosen in enumerate(inputs[source])
            for k, choice in enumerate(chosen)
            if choice == expert
        ]
        for rank in range(case.ranks)
    ]


def run_exchange(rank: int, world: int, kind: str, device: str, case: Case, alignment: int, fp8: bool) -> dict:
    """Both layouts of dispatch, cached dispatch and combine, and the weight exchanges of one rank; on the CPU."""
    on = rank_device(device, rank)
    communicator = make_communicator(kind, dist.group.WORLD)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    arrived = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, alignment=alignment, fp8=fp8)
    rows = arrived.rows if arrived.scales is None else dequantize_e4m3(arrived.rows, arrived.scales, case.dtype)
    row_values = torch.arange(rows.shape[0], device=on, dtype=weights.dtype) + 1
    once = communicator.dispatch(
        x, idx, weights, num_experts=case.num_experts, alignment=alignment, fp8=fp8, layout="rows"
    )
    received = once.rows if once.scales is None else dequantize_e4m3(once.rows, once.scales, case.dtype)
    out = {
        "rows": rows,
        "weights": arrived.weights,
        "counts": arrived.segments.counts,
        "ends": arrived.segments.ends,
        "sizes": arrived.segments.sizes,
        "cached": communicator.dispatch_cached(x * 2, arrived.handle),
        "cached_weights": communicator.dispatch_weights(weights, arrived.handle),
        "combined": communicator.combine(rows * 0.5, arrived.handle),
        "returned": communicator.combine_weights(row_values, arrived.handle),
        "row_of_slot": arrived.row_of_slot,
        "received": received,
        "received_weights": once.weights,
        "received_row_of_slot": once.row_of_slot,
        "no_routing": arrived.routing,
        "received_topk_idx": once.routing.topk_idx,
        "received_topk_weights": once.routing.topk_weights,
        "rows_per_rank": once.routing.rows_per_rank,
        "received_cached": communicator.dispatch_cached(x * 2, arrived.handle, "rows"),
        "received_combined": communicator.combine(received * 0.5, once.handle, "rows"),
        "received_sums": communicator.combine_received(
            _whole_numbers(received.shape[0], case.top_k).to(on), once.handle
        ),
    }
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in out.items()}


def _whole_numbers(rows: int, top_k: int) -> torch.Tensor:
    """Values of received rows whose sums are exact: ``[rows, top_k]``."""
    return torch.arange(rows * top_k, dtype=torch.float32).view(rows, top_k)


def check_routing(case: Case, rank: int, result: dict, arrivals: list[tuple[int, int]]) -> None:
    """Compare the routing of received rows with the oracle."""
    inputs = [make_inputs(case, source) for source in range(case.ranks)]
    assert result["no_routing"] is None
    topk_idx, topk_weights = torch.empty(0, case.top_k, dtype=torch.int64), inputs[0][2][:0]
    for source, token in arrivals:
        local = inputs[source][1][token] - rank * case.local_experts
        mine = (local >= 0) & (local < case.local_experts)
        topk_idx = torch.cat([topk_idx, torch.where(mine, local, -1)[None]])
        topk_weights = torch.cat([topk_weights, torch.where(mine, inputs[source][2][token], 0)[None]])
    assert torch.equal(result["received_topk_idx"], topk_idx)
    assert torch.equal(result["received_topk_weights"], topk_weights)
    assert result["rows_per_rank"].dtype == torch.int64
    assert result["rows_per_rank"].tolist() == [
        sum(other == source for other, _ in arrivals) for source in range(case.ranks)
    ]


def check_exchange(case: Case, results: list[dict], alignment: int, fp8: bool) -> None:
    """Compare every rank's results with the oracle."""
    inputs = [make_inputs(case, rank) for rank in range(case.ranks)]
    sources = [quantize_dequantize(x) if fp8 else x for x, _, _ in inputs]
    returned = [torch.zeros_like(weights) for _, _, weights in inputs]
    sums = [torch.zeros(weights.shape) for _, _, weights in inputs]
    for rank, (result, slots) in enumerate(zip(results, expected_slots(case), strict=True)):
        counts = [
            sum(int((idx == rank * case.local_experts + e).sum()) for _, idx, _ in inputs)
            for e in range(case.local_experts)
        ]
        sizes = [-(-count // alignment) * alignment for count in counts]
        ends = torch.tensor(sizes).cumsum(0)
        assert result["counts"].tolist() == counts
        assert list(result["sizes"]) == sizes
        assert result["ends"].dtype == torch.int32 and torch.equal(result["ends"].long(), ends)
        arrivals = sorted({(source, token) for source, token, _ in slots})
        row_of_slot = torch.full((sum(sizes),), -1, dtype=torch.int32)
        rows = torch.zeros(sum(sizes), case.hidden, dtype=case.dtype)
        cached, weights = torch.zeros_like(rows), torch.zeros(sum(sizes), dtype=inputs[0][2].dtype)
        filled = iter(slots)
        for end, size, count in zip(ends.tolist(), sizes, counts, strict=True):
            for slot in range(end - size, end - size + count):
                source, token, k = next(filled)
                rows[slot], cached[slot] = sources[source][token], inputs[source][0][token] * 2
                weights[slot] = inputs[source][2][token, k]
                returned[source][token, k] = slot + 1
                row_of_slot[slot] = arrivals.index((source, token))
        assert torch.equal(result["rows"], rows) and torch.equal(result["cached"], cached)
        for name in ("weights", "cached_weights", "received_weights"):
            assert torch.equal(result[name], weights)
        assert torch.equal(result["row_of_slot"], row_of_slot)
        assert torch.equal(result["received_row_of_slot"], row_of_slot)
        check_routing(case, rank, result, arrivals)
        for (source, token), values in zip(arrivals, _whole_numbers(len(arrivals), case.top_k), strict=True):
            sums[source][token] += values
        received = [sources[source][token] for source, token in arrivals]
        cached_once = [inputs[source][0][token] * 2 for source, token in arrivals]
        empty = torch.zeros(0, case.hidden, dtype=case.dtype)
        assert torch.equal(result["received"], torch.stack(received) if received else empty)
        assert torch.equal(result["received_cached"], torch.stack(cached_once) if received else empty)
    for rank, result in enumerate(results):
        assert torch.equal(result["returned"], returned[rank])
        assert torch.equal(result["received_sums"], sums[rank])
        routed = (inputs[rank][1] >= 0).sum(1, keepdim=True)
        exact = sources[rank].to(torch.float64) * 0.5 * routed
        # Each rank's partial sum and the final sum are rounded once to the dtype that travels; of subnormal numbers,
        # whose steps are all the same, half a row can lie between two as well.
        finfo = torch.finfo(case.dtype)
        subnormal_step = finfo.smallest_normal * finfo.eps
        rounding = 2 * finfo.eps * exact.abs() + (routed / 2 + 1) * subnormal_step + 1e-30
        assert result["combined"].dtype == case.dtype
        assert ((result["combined"].to(torch.float64) - exact).abs() <= rounding).all()
        owners = torch.zeros(len(routed), case.ranks + 1)
        owners.scatter_(1, torch.where(inputs[rank][1] < 0, case.ranks, inputs[rank][1] // case.local_experts), 1.0)
        exact = sources[rank].to(torch.float64) * 0.5 * owners[:, :-1].sum(1, keepdim=True)
        assert ((result["received_combined"].to(torch.float64) - exact).abs() <= rounding).all()


def _dispatch_quantised(rank: int, world: int, kind: str, device: str, case: Case) -> dict[str, bool]:
    on = rank_device(device, rank)
    communicator = make_communicator(kind, dist.group.WORLD)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    values, scales = quantize_e4m3(x)
    want = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, fp8=True)
    got = communicator.dispatch(values, idx, weights, num_experts=case.num_experts, scales=scales)
    assert got.scales is not None and want.scales is not None
    cached = communicator.dispatch_cached(values, want.handle)
    return {
        "rows": torch.equal(got.rows.view(torch.uint8), want.rows.view(torch.uint8)),
        "scales": torch.equal(got.scales, want.scales),
        "cached": torch.equal(cached.view(torch.uint8), want.rows.view(torch.uint8)),
    }


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("hidden", [128, 640])
def test_rows_that_are_quantised_already_travel_as_they_are(kind: str, device: str, hidden: int) -> None:
    case = Case(tokens=(5, 7), num_experts=4, top_k=2, hidden=hidden, dtype=torch.bfloat16)
    for result in run_ranks(2, _dispatch_quantised, kind, device, case):
        assert all(result.values()), result


def _with_capacity(rank: int, world: int, kind: str, device: str, case: Case, spare: int) -> tuple[dict, str]:
    on = rank_device(device, rank)
    communicator = make_communicator(kind, dist.group.WORLD)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    want = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, alignment=4)
    needed, error = want.segments.num_rows, ""
    room = needed + spare
    checks = {}
    try:
        got = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, alignment=4, max_rows=room)
        if spare < 0:  # kernels report too little room to a later call
            torch.cuda.synchronize()
            communicator.dispatch(x, idx, weights, num_experts=case.num_experts)
        y = torch.full((room, case.hidden), float("nan"), device=on, dtype=case.dtype)
        y[:needed] = want.rows
        values = torch.arange(room, device=on, dtype=weights.dtype)
        assert got.weights is not None and want.weights is not None
        checks = {
            "sizes": got.segments.sizes is None and got.segments.num_rows == room == got.rows.shape[0],
            "ends": torch.equal(got.segments.ends, want.segments.ends),
            "host_sizes": got.segments.host_sizes() == want.segments.sizes,
            "rows": torch.equal(got.rows[:needed], want.rows),
            "weights": torch.equal(got.weights[:needed], want.weights),
            "cached": torch.equal(communicator.dispatch_cached(x, got.handle)[:needed], want.rows),
            "combined": torch.equal(communicator.combine(y, got.handle), communicator.combine(want.rows, want.handle)),
            "returned": torch.equal(
                communicator.combine_weights(values, got.handle),
                communicator.combine_weights(values[:needed], want.handle),
            ),
        }
    except CapacityError as caught:
        error = str(caught).replace(str(needed), "needed").replace(str(room), "room")
    return checks, error


def _with_row_capacity(rank: int, world: int, kind: str, device: str, case: Case, spare: int) -> tuple[dict, str]:
    on = rank_device(device, rank)
    communicator = make_communicator(kind, dist.group.WORLD)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    once = functools.partial(communicator.dispatch, x, idx, weights, num_experts=case.num_experts, layout="rows")
    want = once()
    needed, error = want.rows.shape[0], ""
    room = needed + spare
    checks = {}
    try:
        got = once(max_rows=room)
        if spare < 0:  # kernels report too little room to a later call
            torch.cuda.synchronize()
            once()
        y = torch.full((room, case.hidden), float("nan"), device=on, dtype=case.dtype)
        y[:needed] = want.rows
        assert got.routing is not None and want.routing is not None
        assert got.routing.topk_weights is not None and want.routing.topk_weights is not None
        checks = {
            "sizes": [t.shape[0] for t in (got.rows, got.routing.topk_idx, got.routing.topk_weights)] == [room] * 3,
            "rows": torch.equal(got.rows[:needed], want.rows),
            "topk_idx": torch.equal(got.routing.topk_idx[:needed], want.routing.topk_idx),
            "no more": bool((got.routing.topk_idx[needed:] == -1).all()),
            "topk_weights": torch.equal(got.routing.topk_weights[:needed], want.routing.topk_weights),
            "no weights": bool((got.routing.topk_weights[needed:] == 0).all()),
            "rows_per_rank": torch.equal(got.routing.rows_per_rank, want.routing.rows_per_rank),
            "cached": torch.equal(communicator.dispatch_cached(x, got.handle, "rows")[:needed], want.rows),
            "combined": torch.equal(
                communicator.combine(y, got.handle, "rows"), communicator.combine(want.rows, want.handle, "rows")
            ),
        }
    except CapacityError as caught:
        error = str(caught).replace(str(needed), "needed").replace(str(room), "room")
    return checks, error


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("spare", [0, 1, 100])
def test_a_capacity_of_received_rows(kind: str, device: str, spare: int) -> None:
    case = Case(tokens=(23, 31), num_experts=6, top_k=3, hidden=16, pattern="some_unrouted")
    for checks, error in run_ranks(2, _with_row_capacity, kind, device, case, spare):
        assert all(checks.values()) and not error, (checks, error)


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
def test_too_small_a_capacity_of_received_rows_is_an_error(kind: str, device: str) -> None:
    # One expert on both ranks gets all tokens, so that both lack room.
    case = Case(tokens=(30, 30), num_experts=2, top_k=2, hidden=16)
    for rank, (_, error) in enumerate(run_ranks(2, _with_row_capacity, kind, device, case, -4)):
        assert error == f"max_rows = room (moe.capacity_rows): needed rows arrived at rank {rank}"


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("spare", [0, 1, 100])
def test_a_capacity_instead_of_exact_sizes(kind: str, device: str, spare: int) -> None:
    case = Case(tokens=(23, 31), num_experts=6, top_k=3, hidden=16, pattern="some_unrouted")
    for checks, error in run_ranks(2, _with_capacity, kind, device, case, spare):
        assert all(checks.values()) and not error, (checks, error)


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
def test_too_small_a_capacity_is_an_error(kind: str, device: str) -> None:
    # The same tokens on both ranks, so that both lack room.
    case = Case(tokens=(30, 30), num_experts=2, top_k=2, hidden=16)
    for rank, (_, error) in enumerate(run_ranks(2, _with_capacity, kind, device, case, -4)):
        assert error == f"max_rows = room (moe.capacity_rows): needed rows arrived at rank {rank}"


def quantize_dequantize(x: torch.Tensor) -> torch.Tensor:
    return dequantize_e4m3(*quantize_e4m3(x), x.dtype)


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.tokens}")
def test_exchange_matches_oracle(kind: str, device: str, case: Case, pattern: str) -> None:
    case = replace(case, pattern=pattern)
    results = run_ranks(case.ranks, run_exchange, kind, device, case, 1, False)
    check_exchange(case, results, 1, False)


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("alignment", [4, 16])
def test_segments_are_padded_with_zero_rows(kind: str, device: str, alignment: int) -> None:
    case = Case(tokens=(5, 0, 3, 9), num_experts=8, top_k=3, hidden=8, pattern="some_unrouted")
    check_exchange(case, run_ranks(4, run_exchange, kind, device, case, alignment, False), alignment, False)


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_rows_are_bit_equal_to_quantised_tokens(kind: str, device: str, dtype: torch.dtype) -> None:
    case = Case(tokens=(5, 7), num_experts=4, top_k=2, hidden=256, dtype=dtype)
    check_exchange(case, run_ranks(2, run_exchange, kind, device, case, 8, True), 8, True)


@pytest.mark.parametrize(("kind", "device"), COMMUNICATORS)
def test_results_are_bitwise_reproducible(kind: str, device: str) -> None:
    case = Case(tokens=(33, 20, 7, 50), num_experts=8, top_k=4, hidden=64, dtype=torch.bfloat16)
    first, second = (run_ranks(4, run_exchange, kind, device, case, 1, False) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("rows", "weights", "combined", "returned"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exchange_property(data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([1, 2, 4]))
    case = Case(
        tokens=tuple(data.draw(st.lists(st.integers(0, 20), min_size=ranks, max_size=ranks))),
        num_experts=ranks * data.draw(st.integers(1, 5)),
        top_k=data.draw(st.integers(1, 6)),
        hidden=data.draw(st.integers(1, 40)),
        pattern=data.draw(st.sampled_from(PATTERNS)),
        dtype=data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        seed=data.draw(st.integers(0, 10**6)),
    )
    alignment = data.draw(st.sampled_from([1, 3, 8]))
    check_exchange(case, run_ranks(ranks, run_exchange, "portable", "cpu", case, alignment, False), alignment, False)


def _non_finite_rows(rank: int, world: int) -> list[bool]:
    communicator = make_communicator("portable", dist.group.WORLD)
    x = torch.ones(2, 4)
    x[0] = float("nan") if rank == 0 else float("inf")
    idx = torch.tensor([[0, 1], [1, 0]])
    arrived = communicator.dispatch(x, idx, None, num_experts=2)
    assert arrived.weights is None
    out = communicator.combine(arrived.rows, arrived.handle)
    return [bool(out[0].isfinite().any()), bool(out[1].eq(2).all())]


def test_non_finite_rows_stay_in_their_token() -> None:
    assert run_ranks(2, _non_finite_rows) == [[False, True]] * 2


def _dispatch_with(rank: int, world: int, changes: dict, only: int | None = None) -> str:
    case = Case(tokens=(4, 4), num_experts=4, top_k=2, hidden=8)
    x, idx, weights = make_inputs(case, rank)
    arguments = {"x": x, "topk_idx": idx, "topk_weights": weights, "num_experts": 4}
    if only is None or rank == only:
        arguments.update(changes)
    try:
        make_communicator("portable", dist.group.WORLD).dispatch(**arguments)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4)}, "x: expected floating point [tokens, hidden], got torch.float32 [4]"),
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, "x: expected floating point"),
        ({"topk_idx": torch.zeros(4, 2, dtype=torch.int32)}, "topk_idx: expected int64"),
        ({"topk_idx": torch.zeros(3, 2, dtype=torch.int64)}, "topk_idx: expected 4 tokens as in x, got 3"),
        ({"topk_idx": torch.full((4, 2), 4)}, "expected experts in [0, 4) (moe.num_experts) or -1, got 4 to 4"),
        ({"topk_idx": torch.full((4, 2), -2)}, "or -1, got -2 to -2"),
        (
            {"topk_weights": torch.zeros(4, 3)},
            "expected floating point [4, 2] as topk_idx, got torch.float32 [4, 3]",
        ),
        ({"topk_weights": torch.zeros(4, 2, dtype=torch.int32)}, "topk_weights: expected floating point [4, 2]"),
        ({"num_experts": 3}, "num_experts: expected a multiple of the 2 ranks of the group, got 3"),
        ({"alignment": 0}, "alignment: expected at least 1, got 0"),
        ({"alignment": -4}, "alignment: expected at least 1, got -4"),
        ({"max_rows": -1}, "max_rows: expected at least 0 (moe.capacity_rows), got -1"),
        ({"num_sms": 0}, "num_sms: expected at least 1 (phases.<phase>.num_sms), got 0"),
        ({"layout": "row"}, "layout: expected expert_major or rows, got 'row'"),
        ({"fp8": True}, "multiple of 128 for fp8, got 8"),
        ({"scales": torch.zeros(4, 1)}, "x: expected torch.float8_e4m3fn with scales"),
        ({"x": torch.zeros(4, 8).to(torch.float8_e4m3fn)}, "got torch.float8_e4m3fn without scales, fp8 False"),
        (
            {"x": torch.zeros(4, 256).to(torch.float8_e4m3fn), "scales": torch.zeros(4, 1)},
            "scales: expected torch.float32 [4, 2], one per 128 channels of x [4, 256], got torch.float32 [4, 1]",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_is_sent(changes: dict, message: str) -> None:
    assert all(message in answer for answer in run_ranks(2, _dispatch_with, changes))


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({"x": torch.zeros(4, 16)}, "hidden 16"),
        ({"x": torch.zeros(4, 8, dtype=torch.bfloat16)}, "dtype torch.bfloat16"),
        ({"topk_weights": None}, "dtype of weights none"),
        ({"topk_weights": torch.zeros(4, 2, dtype=torch.float16)}, "dtype of weights torch.float16"),
        ({"num_experts": 8}, "num_experts 8"),
        ({"num_experts": 512}, "num_experts 512"),
    ],
)
def test_ranks_that_disagree_are_told_so(changes: dict, passed: str) -> None:
    here, there = run_ranks(2, _dispatch_with, changes, 1)
    assert f"rank 1 of the group passed {passed}, rank 0 " in here and "all ranks must agree" in here
    assert "rank 0 of the group passed" in there and f"rank 1 {passed}: all ranks must agree" in there


def _fail_on_one_rank(rank: int, world: int) -> None:
    if rank == 1:
        raise RuntimeError("planted failure")


def test_harness_reports_failing_ranks() -> None:
    with pytest.raises(RankError, match=r"rank 1[\s\S]*planted failure"):
        run_ranks(2, _fail_on_one_rank)
