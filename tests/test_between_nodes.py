"""Kernels between nodes, on one host: stores for the network, and NVSHMEM."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from communicators import make_communicator, nvshmem_missing, rank_device
from gpu_ranks import gpu_ranks
from ranks import run_ranks
from routing_cases import make_inputs
from test_nvlink import random_case

from ep_moe.comm import Communicator, PeerTimeoutError
from ep_moe.comm.symmetric_transport import loopback_transport
from ep_moe.comm.topology import topology_of_group
from ep_moe.comm.transport import NodeRoutes, PortableTransport
from ep_moe.comm.two_hop import two_hop_communicator

pytestmark = pytest.mark.gpu


def _compare(ours: Communicator, first_seed: int, count: int) -> list[str]:
    """Random cases for which two hops by kernels and one portable one differ."""
    rank, world = dist.get_rank(), dist.get_world_size()
    on, oracle = rank_device("cuda", rank), make_communicator("portable", dist.group.WORLD)
    problems = []
    for seed in range(first_seed, first_seed + count):
        case, alignment, fp8 = random_case(seed, world)
        x, idx, weights = (t.to(on) for t in make_inputs(case, rank))
        kwargs = {"num_experts": case.num_experts, "alignment": alignment, "fp8": fp8}
        got, want = (c.dispatch(x, idx, weights, **kwargs) for c in (ours, oracle))
        once, wanted_once = (c.dispatch(x, idx, weights, layout="rows", **kwargs) for c in (ours, oracle))
        room = got.segments.num_rows + 40
        roomy = ours.dispatch(x, idx, weights, max_rows=room, **kwargs)
        values = torch.randn(got.segments.num_rows, device=on)
        # Powers of two, whose sums are exact: one more rounding between the hops changes nothing.
        rows = torch.exp2(torch.arange(got.segments.num_rows, device=on) % 3)[:, None]
        rows = rows.expand(-1, case.hidden).to(case.dtype)
        checks = {
            "rows": torch.equal(got.rows.view(torch.uint8), want.rows.view(torch.uint8)),
            "scales": not fp8 or torch.equal(got.scales, want.scales),  # type: ignore[arg-type]
            "weights": torch.equal(got.weights, want.weights),  # type: ignore[arg-type]
            "ends": torch.equal(got.segments.ends, want.segments.ends),
            "row_of_slot": torch.equal(got.row_of_slot, want.row_of_slot),
            "received": torch.equal(once.rows.view(torch.uint8), wanted_once.rows.view(torch.uint8)),
            "received routing": all(
                torch.equal(a, b)
                for a, b in zip(vars(once.routing).values(), vars(wanted_once.routing).values(), strict=True)
            ),
            "cached": torch.equal(ours.dispatch_cached(x, got.handle), oracle.dispatch_cached(x, want.handle)),
            "cached weights": torch.equal(ours.dispatch_weights(weights, got.handle), want.weights),  # type: ignore[arg-type]
            "combined": torch.equal(ours.combine(rows, got.handle), oracle.combine(rows, want.handle)),
            "roomy": torch.equal(roomy.rows[: room - 40].view(torch.uint8), want.rows.view(torch.uint8)),
            "roomy, combined from rows": torch.equal(
                ours.combine(ours.dispatch_cached(x, roomy.handle, "rows"), roomy.handle, "rows"),
                ours.combine(ours.dispatch_cached(x, got.handle, "rows"), got.handle, "rows"),
            ),
            "returned": torch.equal(
                ours.combine_weights(values, got.handle), oracle.combine_weights(values, want.handle)
            ),
        }
        problems += [f"seed {seed}, {case}, {alignment}, fp8 {fp8}: {name}" for name, ok in checks.items() if not ok]
    return problems


def _random_cases(rank: int, world: int, first_seed: int, count: int) -> list[str]:
    return _compare(make_communicator("loopback", dist.group.WORLD), first_seed, count)


# Eight ranks take turns on a GPU or two: a call of twenty cases would not end within the limit of a call.
@pytest.mark.parametrize(("ranks", "calls"), [(ranks, 10 if ranks > 4 else 1) for ranks in gpu_ranks(2, 4)])
def test_random_cases_equal_the_portable_communicator(ranks: int, calls: int) -> None:
    count = 20 // calls
    for call in range(calls):
        for problems in run_ranks(ranks, _random_cases, 7000 * ranks + call * count, count):
            assert not problems, "\n".join(problems[:5])


def _many_rows(rank: int, world: int, rounds: int) -> list[bool]:
    """Exchanges of more rows than rings hold, with widths that copy by 16, 4 and 1 bytes, there and back."""
    on = rank_device("cuda", rank)
    transport = loopback_transport(dist.group.WORLD, range(world), on, timeout_s=30.0)
    oracle = PortableTransport(dist.group.WORLD)
    right = []
    for number in range(rounds):
        generator = torch.Generator().manual_seed(number)
        counts = torch.randint(0, 3000, (world, world), generator=generator)
        counts[number % world, 0] = 0
        tokens = torch.randint(0, 100, (int(counts[rank].sum()),), generator=generator).to(on)
        routes = NodeRoutes(tokens, tuple(counts[rank].tolist()), tuple(counts[:, rank].tolist()))
        tensors = [torch.randn(100, 64, device=on), torch.randn(100, 7, device=on)]
        tensors.append(torch.randint(0, 256, (100, 5), device=on).to(torch.uint8))
        there = transport.exchange(tensors, routes)
        back = transport.exchange(there, routes.back())
        right += [torch.equal(a, b) for a, b in zip(there, oracle.exchange(tensors, routes), strict=True)]
        right += [torch.equal(a, b[tokens]) for a, b in zip(back, tensors, strict=True)]
    return right


@pytest.mark.parametrize("ranks", gpu_ranks(2, 3))
def test_more_rows_than_landing_slots(ranks: int) -> None:
    for right in run_ranks(ranks, _many_rows, 5):
        assert len(right) == 30 and all(right)


def _absent_node(rank: int, world: int) -> tuple[str, float]:
    on = rank_device("cuda", rank)
    transport = loopback_transport(dist.group.WORLD, range(world), on, timeout_s=2.0)
    rows, routes = torch.zeros(8, 16, device=on), NodeRoutes(None, (4, 4), (4, 4))
    transport.exchange([rows], routes)
    torch.cuda.synchronize()
    start, message = time.monotonic(), ""
    if rank == 0:
        transport.exchange([rows], routes)
        torch.cuda.synchronize()
        try:
            transport.check()
        except PeerTimeoutError as error:
            message = str(error)
    waited = time.monotonic() - start
    dist.barrier()
    return message, waited


def test_a_node_that_never_sends_is_named() -> None:
    (message, waited), _ = run_ranks(2, _absent_node)
    assert "rank 0 waited 2 s for rank 1" in message and "step: rows between nodes" in message
    assert waited < 10


def _nvshmem_twice(rank: int, world: int) -> list[str]:
    """Exchanges over NVSHMEM, then its end, and all of it again."""
    from ep_moe.comm import nvshmem
    from ep_moe.comm.nvlink import NvlinkCommunicator

    on, group = rank_device("cuda", rank), dist.group.WORLD
    torch.cuda.set_device(on)
    topology = topology_of_group(group, max(world // 2, 1))
    problems = []
    for start in (1, 2):
        ours = two_hop_communicator(
            group,
            topology,
            lambda node: NvlinkCommunicator(node, on, max_tokens=64 * topology.nodes),
            lambda _: nvshmem.nvshmem_transport(
                group, topology.counterparts(rank), topology.node_of(rank), on, timeout_s=30.0
            ),
        )
        problems += _compare(ours, 9000 * world + start, 4)
        nvshmem.shutdown()
    return problems


@pytest.mark.skipif(bool(nvshmem_missing()), reason=nvshmem_missing())
@pytest.mark.parametrize("ranks", gpu_ranks(2))
def test_nvshmem_starts_and_ends_twice(ranks: int) -> None:
    for problems in run_ranks(ranks, _nvshmem_twice):
        assert not problems, "\n".join(problems[:5])
