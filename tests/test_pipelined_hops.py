"""Both hops at the same time: what they bring is what hops one behind the other bring, bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from communicators import make_communicator, rank_device
from gpu_ranks import gpu_ranks
from ranks import run_ranks
from routing_cases import Case, make_inputs
from test_between_nodes import nvshmem_missing

from ep_moe.comm import Communicator, PeerTimeoutError, RowLayout
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_layout import HostCounts
from ep_moe.comm.symmetric_transport import loopback_transport
from ep_moe.comm.topology import Topology, topology_of_group
from ep_moe.comm.transport import NodeTransport
from ep_moe.comm.two_hop import TwoHopCommunicator, two_hop_communicator

pytestmark = pytest.mark.gpu

LAYOUTS: tuple[RowLayout, ...] = ("expert_major", "rows")


def two_hops(
    topology: Topology, on: torch.device, *, max_tokens: int | None, timeout_s: float = 30.0, kind: str = "loopback"
) -> TwoHopCommunicator:
    """A communicator whose hops overlap, between nodes of this host."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    ranks, node = topology.counterparts(rank), topology.node_of(rank)

    def between(counterparts: dist.ProcessGroup) -> NodeTransport:
        if kind == "loopback":
            return loopback_transport(counterparts, ranks, on, timeout_s=timeout_s)
        from ep_moe.comm.nvshmem import nvshmem_transport

        return nvshmem_transport(group, ranks, node, on, timeout_s=timeout_s)

    def here(members: dist.ProcessGroup) -> NvlinkCommunicator:
        return NvlinkCommunicator(members, on, max_tokens=max_tokens, timeout_s=timeout_s)

    return two_hop_communicator(group, topology, here, between)


def everything(ours: Communicator, case: Case, on: torch.device, layout: RowLayout, fp8: bool) -> dict[str, object]:
    """All operations on one case, of random rows."""
    x, idx, weights = (t.to(on) for t in make_inputs(case, dist.get_rank()))
    options = {"num_experts": case.num_experts, "fp8": fp8, "alignment": 8, "layout": layout}
    got = ours.dispatch(x, idx, weights, **options)  # type: ignore[arg-type]
    generator = torch.Generator(on).manual_seed(case.seed)
    rows = torch.randn(got.rows.shape, device=on, generator=generator).to(case.dtype)
    values = torch.randn(got.segments.num_rows, device=on, generator=generator)
    results = {
        "rows": got.rows.view(torch.uint8),
        "scales": got.scales,
        "weights": got.weights,
        "ends": got.segments.ends,
        "row_of_slot": got.row_of_slot,
        "cached": ours.dispatch_cached(x, got.handle, layout),
        "cached weights": ours.dispatch_weights(weights, got.handle),
        "combined": ours.combine(rows, got.handle, layout),
        "returned": ours.combine_weights(values, got.handle),
    }
    if got.routing is not None:
        results |= {f"received {name}": value for name, value in vars(got.routing).items()}
    torch.cuda.synchronize()
    return results


def differing(got: dict[str, object], want: dict[str, object]) -> list[str]:
    """Names of the results that differ."""
    assert got.keys() == want.keys()
    return [
        name
        for name, tensor in got.items()
        if not (tensor is want[name] is None or torch.equal(tensor, want[name]))  # type: ignore[arg-type]
    ]


def _many_tokens(rank: int, world: int, kind: str) -> list[str]:
    """More chunks than all slots of all channels hold, uneven; the buffers, made for 32 tokens, grow to hold them."""
    on = rank_device("cuda", rank)
    topology = topology_of_group(dist.group.WORLD, max(world // 2, 1))  # type: ignore[arg-type]
    ours = two_hops(topology, on, max_tokens=32, kind=kind)
    oracle = make_communicator("two_hop" if topology.ranks_per_node == 2 else "two_hop_1", dist.group.WORLD)  # type: ignore[arg-type]
    problems = []
    tokens = ([1, 33, 64, 0], [3000, 700, 2111, 31], [0, 1500, 0, 900], [0, 0, 0, 0])
    for seed, most in enumerate(tokens):
        case = Case(tuple(most[:world]), num_experts=4 * world, top_k=3, hidden=256, dtype=torch.bfloat16, seed=seed)
        for layout in LAYOUTS:
            for fp8 in (False, True):
                got, want = (everything(c, case, on, layout, fp8) for c in (ours, oracle))
                problems += [f"{case} {layout} fp8 {fp8}: {name}" for name in differing(got, want)]
    return problems


@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_many_and_uneven_tokens(ranks: int) -> None:
    if ranks not in (2, 4):
        pytest.skip("the portable oracle has nodes of one or two ranks")
    for problems in run_ranks(ranks, _many_tokens, "loopback"):
        assert not problems, "\n".join(problems[:5])


@pytest.mark.skipif(bool(nvshmem_missing()), reason=nvshmem_missing())
def test_many_and_uneven_tokens_by_nvshmem() -> None:
    for problems in run_ranks(2, _many_tokens_by_nvshmem):
        assert not problems, "\n".join(problems[:5])


def _many_tokens_by_nvshmem(rank: int, world: int) -> list[str]:
    from ep_moe.comm import nvshmem

    try:
        return _many_tokens(rank, world, "nvshmem")
    finally:
        nvshmem.shutdown()


def _more_nodes(rank: int, world: int) -> list[str]:
    """A node a rank: rows arrive from several nodes at once."""
    on = rank_device("cuda", rank)
    ours = two_hops(Topology(world, 1), on, max_tokens=None)
    oracle = make_communicator("two_hop_1", dist.group.WORLD)  # type: ignore[arg-type]
    problems = []
    for seed in range(4):
        tokens = tuple((331 * (seed + other)) % 700 for other in range(world))
        case = Case(tokens, num_experts=2 * world, top_k=2, hidden=1024, dtype=torch.float16, seed=seed)
        for layout in LAYOUTS:
            got, want = (everything(c, case, on, layout, False) for c in (ours, oracle))
            problems += [f"{case} {layout}: {name}" for name in differing(got, want)]
    return problems


@pytest.mark.parametrize("ranks", gpu_ranks(3, 4))
def test_rows_from_several_nodes(ranks: int) -> None:
    for problems in run_ranks(ranks, _more_nodes):
        assert not problems, "\n".join(problems[:5])


def _one_node_grows(rank: int, world: int) -> list[bool]:
    """Only ranks of the first node get more tokens than there is room for; then all need more for wider rows."""
    on = rank_device("cuda", rank)
    ours = two_hops(topology_of_group(dist.group.WORLD, world // 2), on, max_tokens=32)  # type: ignore[arg-type]
    right = []
    for hidden in (256, 512):
        x = torch.randn(200, hidden, device=on)
        idx = torch.arange(200, device=on).remainder(world // 2)[:, None]
        got = ours.dispatch(x, idx, None, num_experts=world)
        right.append(torch.equal(ours.combine(got.rows, got.handle), x))
    return right


@pytest.mark.parametrize("ranks", gpu_ranks(4))
def test_a_node_that_gets_more_tokens_than_the_other(ranks: int) -> None:
    assert run_ranks(ranks, _one_node_grows) == [[True, True]] * ranks


def _sequential(rank: int, world: int) -> list[str]:
    """The same kernels, one hop behind the other."""
    on, group = rank_device("cuda", rank), dist.group.WORLD
    assert group is not None
    topology = topology_of_group(group, max(world // 2, 1))
    sequential = two_hop_communicator(
        group,
        topology,
        lambda members: NvlinkCommunicator(members, on),
        lambda members: loopback_transport(members, topology.counterparts(rank), on, timeout_s=30.0),
        overlap=False,
    )
    case = Case((500,) * world, num_experts=8 * world, top_k=4, hidden=2048, dtype=torch.bfloat16)
    ours = two_hops(topology, on, max_tokens=512)
    problems = []
    for layout in LAYOUTS:
        got, want = (everything(c, case, on, layout, False) for c in (ours, sequential))
        problems += differing(got, want)
    return problems


@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_overlap_changes_no_bit(ranks: int) -> None:
    assert all(not problems for problems in run_ranks(ranks, _sequential))


def _waits(rank: int, world: int) -> list[tuple[str, int]]:
    """How often the host waits in a dispatch; whatever else would wait for the GPU raises."""
    on = rank_device("cuda", rank)
    ours = two_hops(Topology(world, 1), on, max_tokens=512)
    case = Case((300,) * world, num_experts=8 * world, top_k=4, hidden=512, dtype=torch.bfloat16)
    x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
    found = []
    for layout in LAYOUTS:
        for fp8 in (False, True):
            options = {"num_experts": case.num_experts, "layout": layout, "fp8": fp8}
            ours.dispatch(x, idx, weights, **options)  # memory is allocated
            with (
                mock.patch.object(HostCounts, "wait", side_effect=AssertionError("sizes are known")),
                mock.patch.object(torch.cuda.Event, "synchronize", autospec=True, side_effect=_wait) as waits,
            ):
                torch.cuda.set_sync_debug_mode("error")
                try:
                    ours.dispatch(x, idx, weights, **options)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            found.append((f"{layout} fp8 {fp8}", waits.call_count))
    torch.cuda.synchronize()
    return found


_wait = torch.cuda.Event.synchronize


@pytest.mark.parametrize("ranks", gpu_ranks(2))
def test_the_host_waits_once_in_a_dispatch(ranks: int) -> None:
    for found in run_ranks(ranks, _waits):
        assert len(found) == 4 and all(waits == 1 for _, waits in found), found


def _wrong_expert(rank: int, world: int) -> list[str]:
    """What a rank is told when another one chooses an expert that there is not, and whether all can go on."""
    on = rank_device("cuda", rank)
    topology = topology_of_group(dist.group.WORLD, max(world // 2, 1))  # type: ignore[arg-type]
    ours = two_hops(topology, on, max_tokens=64)
    case = Case((50,) * world, num_experts=4 * world, top_k=2, hidden=256, dtype=torch.bfloat16)
    x, idx, _ = (t.to(on) for t in make_inputs(case, rank))
    problems = []
    for _ in range(3):
        wrong = idx.clone()
        wrong[7, 1] = case.num_experts + 3 if rank == world - 1 else 0
        try:
            ours.dispatch(x, wrong, None, num_experts=case.num_experts)
        except ValueError as error:
            problems += [str(error)] * (f"got {case.num_experts + 3} at rank {world - 1}" not in str(error))
        else:
            problems.append("not told")
        got = ours.dispatch(x, idx, None, num_experts=case.num_experts)
        if not torch.equal(ours.combine(got.rows, got.handle), 2 * x):
            problems.append("wrong rows afterwards")
    return problems


@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_an_expert_out_of_range_is_named_at_all_ranks(ranks: int) -> None:
    assert run_ranks(ranks, _wrong_expert) == [[]] * ranks


def _two_under_way(rank: int, world: int, rounds: int) -> list[str]:
    """Two dispatches on two streams before either is combined; handles are used out of turn."""
    on = rank_device("cuda", rank)
    topology = topology_of_group(dist.group.WORLD, max(world // 2, 1))  # type: ignore[arg-type]
    ours = two_hops(topology, on, max_tokens=400)
    streams = [torch.cuda.Stream(on) for _ in range(2)]
    problems = []
    for seed in range(rounds):
        cases = [
            Case(tuple((97 * (seed + i + other)) % 401 for other in range(world)), 4 * world, 2, 512, seed=2 * seed + i)
            for i in range(2)
        ]
        inputs = [tuple(t.to(on) for t in make_inputs(case, rank)) for case in cases]
        handles, sums = [], []
        for stream, (x, idx, weights) in zip(streams, inputs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = ours.dispatch(x, idx, weights, num_experts=4 * world)
            handles.append((got.rows, got.handle))
        for stream, (rows, handle), (x, _, _) in reversed(list(zip(streams, handles, inputs, strict=True))):
            with torch.cuda.stream(stream):
                again = ours.dispatch_cached(x, handle)
                sums.append((ours.combine(rows, handle), torch.equal(again, rows)))
        torch.cuda.synchronize()
        for (summed, same), (x, idx, _) in zip(sums, reversed(inputs), strict=True):
            # A token of two experts comes back twice as large: sums of equal numbers are exact.
            times = (idx >= 0).sum(1, keepdim=True).to(x.dtype)
            problems += [f"round {seed}"] * (not same or not torch.equal(summed, x * times))
    return problems


@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_two_dispatches_under_way(ranks: int) -> None:
    assert all(not problems for problems in run_ranks(ranks, _two_under_way, 5))


def _absent(rank: int, world: int, call: str) -> tuple[int | None, str, float]:
    """The last rank makes no second exchange; whom each of the others then names, and how long it waited."""
    on = rank_device("cuda", rank)
    ours = two_hops(topology_of_group(dist.group.WORLD, world // 2), on, max_tokens=64, timeout_s=2.0)  # type: ignore[arg-type]
    # Experts of all ranks for every token, so that everyone waits for everyone.
    x = torch.randn(40, 256, device=on)
    idx = torch.arange(world, device=on).expand(40, -1).contiguous()
    got = ours.dispatch(x, idx, None, num_experts=world)
    calls: dict[str, Callable[[], object]] = {
        "counts": lambda: ours.dispatch(x, idx, None, num_experts=world),
        "dispatch": lambda: ours.dispatch_cached(x, got.handle),
        "combine": lambda: ours.combine(got.rows, got.handle),
    }
    for warm_up in calls.values():
        warm_up()
    torch.cuda.synchronize()
    start, named, message = time.monotonic(), None, ""
    if rank != world - 1:
        try:
            calls[call]()
            torch.cuda.synchronize()
            calls[call]()
        except PeerTimeoutError as error:
            named, message = error.rank, str(error)
    waited = time.monotonic() - start
    dist.barrier()
    return named, message, waited


@pytest.mark.parametrize("call", ["counts", "dispatch", "combine"])
def test_a_node_that_never_comes_is_named(call: str) -> None:
    (named, message, waited), _ = run_ranks(2, _absent, call)
    assert named == 1 and "rank 0 waited 2 s for rank 1" in message and "step: rows between nodes" in message
    assert waited < 10


def test_everyone_names_whom_it_waited_for() -> None:
    results = run_ranks(4, _absent, "dispatch")
    # Rank 1 waits for its counterpart, rank 0 for what that was to bring, rank 2 for the rank of its own node.
    assert [named for named, _, _ in results] == [1, 3, 3, None]
    assert "step: rows between nodes" in results[1][1]
    assert "node 0, whose rank 1 is rank 1" in results[0][1] and "node 1, whose rank 1 is rank 3" in results[2][1]
    assert all(waited < 20 for _, _, waited in results)
