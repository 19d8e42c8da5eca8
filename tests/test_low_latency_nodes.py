"""Low-latency mode between nodes, on one host: stores for the network, and NVSHMEM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from communicators import end_nvshmem, nvshmem_missing, rank_device
from gpu_ranks import gpu_ranks
from low_latency_cases import random_case
from ranks import run_ranks
from test_low_latency import exchange_masked, run_cases, send_weights_now_and_then, use_every_order
from test_nvlink_low_latency import (
    build,
    check_losses,
    inputs,
    is_weighted_sum,
    lose_a_rank,
    replay_changing_routing,
    round_trip,
    use_streams_and_threads,
)

from ep_moe.comm import communicator_factory
from ep_moe.comm.nvlink_low_latency import NvlinkLowLatencyCommunicator
from ep_moe.comm.portable_low_latency import PortableLowLatencyCommunicator

pytestmark = pytest.mark.gpu

NVSHMEM = pytest.mark.skipif(bool(nvshmem_missing()), reason=nvshmem_missing())
# Two nodes, and nodes of one rank: with two ranks these are the same.
KINDS = ["loopback", "loopback_1", pytest.param("nvshmem", marks=NVSHMEM), pytest.param("nvshmem_1", marks=NVSHMEM)]


def run(ranks: int, kind: str, function: Callable[..., Any], *arguments: object) -> list[Any]:
    """The results of all ranks; NVSHMEM ends behind them, for its communicators do not outlive a test."""
    results = run_ranks(ranks, function, *arguments)
    if kind.startswith("nvshmem"):
        run_ranks(ranks, _end)
    return results


def _end(rank: int, world: int) -> None:
    end_nvshmem()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", gpu_ranks(2, 3, 4))
def test_random_cases(ranks: int, kind: str) -> None:
    if ranks % 2 and kind != "loopback_1":
        pytest.skip("an odd number of ranks is no two nodes, and NVSHMEM wants as many ranks on every GPU")
    cases = [random_case(5000 * ranks + seed, ranks) for seed in range(16)]
    for wrong in run(ranks, kind, run_cases, kind, "cuda", cases):
        assert not wrong, "\n".join(wrong[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_two_exchanges_under_way(kind: str) -> None:
    assert run(2, kind, use_every_order, kind, "cuda") == [[], []]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_travel_with_rows_stay_with_the_handle(kind: str) -> None:
    assert run(2, kind, send_weights_now_and_then, kind, "cuda") == [[], []]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_ranks_contribute_nothing(kind: str, early: bool) -> None:
    assert run(2, kind, exchange_masked, kind, "cuda", early) == [True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_replays_with_changing_routing(ranks: int, kind: str) -> None:
    assert run(ranks, kind, replay_changing_routing, 100, kind) == [0] * ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", gpu_ranks(2))
def test_hooks_in_other_threads_and_streams(ranks: int, kind: str) -> None:
    for right in run(ranks, kind, use_streams_and_threads, kind):
        assert all(right)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_a_rank_that_stops_is_named_and_can_be_masked(ranks: int, kind: str, early: bool) -> None:
    check_losses(run(ranks, kind, lose_a_rank, early, kind))


def _many_rounds(rank: int, world: int, kind: str) -> list[bool]:
    """More rounds than buffers, in bursts without a pause of the host, with routing that changes."""
    communicator, everyone = build(rank, world, kind), list(range(world))
    right = []
    for burst in range(10):
        batches = [inputs(rank, world, seed) for seed in range(12 * burst, 12 * burst + 12)]
        outs = [round_trip(communicator, *batch, early=burst % 2 == 0) for batch in batches]
        right += [is_weighted_sum(out, *batch, everyone) for out, batch in zip(outs, batches, strict=True)]  # type: ignore[call-arg]
    return right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", gpu_ranks(2, 4))
def test_staging_places_are_used_again(ranks: int, kind: str) -> None:
    for right in run(ranks, kind, _many_rounds, kind):
        assert len(right) == 120 and all(right)


def _from_configuration(rank: int, world: int, between_nodes: str, ranks_per_node: int | None) -> tuple[str, bool]:
    device = rank_device("cuda", rank)
    factory = communicator_factory(
        "nvlink",
        dist.group.WORLD,
        max_tokens=None,
        timeout_s=30.0,
        ranks_per_node=ranks_per_node,
        between_nodes=between_nodes,  # type: ignore[arg-type]
    )
    communicator = factory.build_low_latency(device, 8, 256, 4 * world)
    x, idx, weights = inputs(rank, world)
    packed = communicator.dispatch(x, idx, weights)
    out = communicator.combine(packed.rows, idx, None, packed.handle)
    torch.cuda.synchronize()
    return type(communicator).__name__, is_weighted_sum(out, x, idx, weights, list(range(world)))


@pytest.mark.parametrize(
    ("between_nodes", "ranks_per_node", "kernels"),
    [
        ("portable", 1, False),
        ("loopback", 1, True),
        ("loopback", None, True),
        pytest.param("nvshmem", 1, True, marks=NVSHMEM),
    ],
)
def test_the_configuration_chooses(between_nodes: str, ranks_per_node: int | None, kernels: bool) -> None:
    chosen = NvlinkLowLatencyCommunicator if kernels else PortableLowLatencyCommunicator
    results = run(2, between_nodes, _from_configuration, between_nodes, ranks_per_node)
    assert results == [(chosen.__name__, True)] * 2
