"""Exchange between nodes: two hops give what one hop gives."""

from __future__ import annotations

import random
from typing import Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from communicators import make_communicator
from node_doubles import NodeDouble, TransportDouble, any_device
from ranks import run_ranks
from routing_cases import PATTERNS, Case, make_inputs

from ep_moe import EPMoELayer
from ep_moe.comm import (
    Communicator,
    Dispatched,
    PeerTimeoutError,
    PortableCommunicator,
    communicator_factory,
    pipelined_hops,
    tally_exchange,
    transport,
)
from ep_moe.comm.hops import Place
from ep_moe.comm.pipelined_hops import PipelinedHops
from ep_moe.comm.tally_exchange import PutTallies
from ep_moe.comm.topology import Topology, topology_of_group, topology_of_hosts
from ep_moe.comm.transport import PortableTransport
from ep_moe.comm.two_hop import TwoHopCommunicator, two_hop_communicator
from ep_moe.config import Config, ConfigError, ModelConfig, MoEConfig


def same(a: object, b: object) -> bool:
    """Whether tensors, or dataclasses of tensors, are equal bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        fp8 = a.dtype == torch.float8_e4m3fn
        return a.dtype == b.dtype and (torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if fp8 else a.equal(b))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in vars(a) if name != "handle")
    return a == b


def everything(
    communicator: Communicator, case: Case, rank: int, **settings: object
) -> list[Dispatched | torch.Tensor]:
    """All operations on one case; rows to combine are powers of two, whose sums are exact."""
    x, idx, weights = make_inputs(case, rank)
    arrived = communicator.dispatch(x, idx, weights, num_experts=case.num_experts, **settings)  # type: ignore[arg-type]
    layout = settings["layout"]
    handle = arrived.handle
    values = torch.arange(arrived.segments.num_rows, dtype=weights.dtype)
    rows = torch.exp2(torch.arange(arrived.rows.shape[0]) % 4)[:, None].expand(arrived.rows.shape).to(case.dtype)
    return [
        arrived,
        communicator.dispatch_cached(x, handle, layout),  # type: ignore[arg-type]
        communicator.dispatch_weights(weights, handle),
        communicator.combine(rows, handle, layout),  # type: ignore[arg-type]
        communicator.combine_weights(values, handle),
    ]


def overlapping(rank: int, world: int, per_node: int) -> Communicator:
    """Two hops that overlap, over stand-ins for their kernels."""
    topology = Topology(world, per_node)
    here, counterparts = (
        dist.new_group(members, use_local_synchronization=True)
        for members in (topology.ranks_of_node(topology.node_of(rank)), topology.counterparts(rank))
    )
    transport = TransportDouble(counterparts)
    hops = PipelinedHops(Place(rank, topology), NodeDouble(here, transport), transport)  # type: ignore[arg-type]
    tallies = PutTallies(topology, transport, TransportDouble(here) if per_node > 1 else None)  # type: ignore[arg-type]
    assert dist.group.WORLD is not None
    return TwoHopCommunicator(dist.group.WORLD, topology, hops, tallies)


def _compare(rank: int, world: int, kind: str, first_seed: int, count: int) -> list[str]:
    ours = make_communicator(kind, dist.group.WORLD)  # type: ignore[arg-type]
    return _differences(ours, rank, world, first_seed, count)


def _compare_overlapping(rank: int, world: int, per_node: int, first_seed: int, count: int) -> list[str]:
    with mock.patch.object(pipelined_hops, "wire_format", any_device):
        return _differences(overlapping(rank, world, per_node), rank, world, first_seed, count)


def _differences(ours: Communicator, rank: int, world: int, first_seed: int, count: int) -> list[str]:
    problems = []
    for seed in range(first_seed, first_seed + count):
        choose = random.Random(seed)
        fp8 = choose.random() < 0.3
        case = Case(
            tokens=tuple(choose.choice([0, 1, choose.randint(0, 20), choose.randint(30, 70)]) for _ in range(world)),
            num_experts=world * choose.randint(1, 5),
            top_k=choose.randint(1, 6),
            hidden=128 if fp8 else choose.randint(1, 40),
            pattern=choose.choice(PATTERNS),
            dtype=choose.choice([torch.float32, torch.bfloat16] if fp8 else [torch.float64, torch.float16]),
            seed=seed,
        )
        settings = {
            "layout": choose.choice(["rows", "expert_major"]),
            "alignment": choose.choice([1, 3, 8]),
            "max_rows": choose.choice([None, 2000]),
            "fp8": fp8,
        }
        oracle = make_communicator("portable", dist.group.WORLD)  # type: ignore[arg-type]
        got, want = (everything(communicator, case, rank, **settings) for communicator in (ours, oracle))
        problems += [
            f"{case}, {settings}: result {n}" for n, (a, b) in enumerate(zip(got, want, strict=True)) if not same(a, b)
        ]
    return problems


@pytest.mark.parametrize(("ranks", "kind"), [(2, "two_hop_1"), (4, "two_hop"), (4, "two_hop_1"), (4, "two_hop_4")])
def test_two_hops_equal_one_bit_by_bit(ranks: int, kind: str) -> None:
    for problems in run_ranks(ranks, _compare, kind, 100 * ranks, 40):
        assert not problems, "\n".join(problems[:5])


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (4, 1)])
def test_what_overlapping_hops_move_equals_one_hop_bit_by_bit(ranks: int, per_node: int) -> None:
    for problems in run_ranks(ranks, _compare_overlapping, per_node, 300 * ranks, 25):
        assert not problems, "\n".join(problems[:5])


def _exchanges(rank: int, world: int, per_node: int) -> tuple[int, int, int, int]:
    """Of a dispatch whose hops overlap: exchanges between nodes and on the node, collectives besides, and waits."""
    ours = overlapping(rank, world, per_node)
    between, within = ours._tallies._between, ours._tallies._within  # type: ignore[attr-defined]
    x, idx, weights = make_inputs(Case((40,) * world, num_experts=4 * world, top_k=3, hidden=128), rank)
    with (
        mock.patch.object(pipelined_hops, "wire_format", any_device),
        mock.patch.object(tally_exchange, "all_gather", wraps=tally_exchange.all_gather) as gathers,
        mock.patch.object(tally_exchange, "_to_host", wraps=tally_exchange._to_host) as waits,
    ):
        ours.dispatch(x, idx, weights, num_experts=4 * world, fp8=True)
    # Doubles of a node's kernels gather among themselves.
    collectives = sum(call.kwargs["group"] is dist.group.WORLD for call in gathers.call_args_list)
    return between.exchanges, 0 if within is None else within.exchanges, collectives, waits.call_count


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2)])
def test_overlapping_hops_learn_sizes_in_one_exchange(ranks: int, per_node: int) -> None:
    # Between nodes: counts, routing, rows.
    assert run_ranks(ranks, _exchanges, per_node) == [(3, int(per_node > 1), 0, 1)] * ranks


def _gathers(rank: int, world: int) -> tuple[int, int, int]:
    """Of a dispatch whose hops follow each other, in FP8: collectives that gather, waits, collectives between nodes."""
    ours = make_communicator("two_hop", dist.group.WORLD)  # type: ignore[arg-type]
    x, idx, weights = make_inputs(Case((7,) * world, num_experts=8, top_k=3, hidden=512), rank)
    with (
        mock.patch.object(tally_exchange, "all_gather", wraps=tally_exchange.all_gather) as gathers,
        mock.patch.object(tally_exchange, "_to_host", wraps=tally_exchange._to_host) as waits,
        mock.patch.object(transport, "all_to_all_rows", wraps=transport.all_to_all_rows) as exchanges,
    ):
        ours.dispatch(x, idx, weights, num_experts=8, fp8=True)
    gathered = sum(call.kwargs["group"] is dist.group.WORLD for call in gathers.call_args_list)
    return gathered, waits.call_count, exchanges.call_count


def test_hops_in_turn_learn_sizes_in_one_collective() -> None:
    # Then rows travel, and their scales with routing and weights.
    assert run_ranks(4, _gathers) == [(1, 1, 2)] * 4


def _out_of_range(rank: int, world: int, entry: int) -> list[str]:
    """What ranks are told when one of them chooses an expert that there is not, and whether they can go on."""
    x, idx, _ = make_inputs(Case((5,) * world, num_experts=8, top_k=2, hidden=8), rank)
    wrong = idx.clone()
    if rank == 1:
        wrong[2, 0] = entry
    told = []
    for ours in (make_communicator("two_hop", dist.group.WORLD), overlapping(rank, world, 2)):  # type: ignore[arg-type]
        with pytest.raises(ValueError) as caught:
            ours.dispatch(x, wrong, None, num_experts=8)
        told.append(str(caught.value))
        with mock.patch.object(pipelined_hops, "wire_format", any_device):
            ours.dispatch(x, idx, None, num_experts=8)
    return told


@pytest.mark.parametrize("entry", [8, -2])
def test_an_expert_out_of_range_is_named_at_all_ranks(entry: int) -> None:
    message = f"topk_idx: expected experts in [0, 8) (moe.num_experts) or -1, got {entry} at rank 1 of the group"
    assert run_ranks(4, _out_of_range, entry) == [[message] * 2] * 4


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["a"], Topology(1, 1)),
        (["a", "a"], Topology(2, 2)),
        (["b", "a"], Topology(2, 1)),
        (["a", "a", "b", "b", "c", "c"], Topology(6, 2)),
    ],
)
def test_nodes_are_hosts(hosts: list[str], expected: Topology) -> None:
    assert topology_of_hosts(hosts) == expected


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (["a", "a", "b"], "all hosts must hold equally many ranks of the expert-parallel group, got a: 2, b: 1"),
        (["a", "b", "a", "b"], "ranks of a host must be consecutive"),
    ],
)
def test_nodes_that_do_not_fit_are_named(hosts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topology_of_hosts(hosts)


def test_places_in_a_topology() -> None:
    topology = Topology(6, 2)
    assert topology.nodes == 3 and [topology.node_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert topology.ranks_of_node(1) == [2, 3] and topology.counterparts(3) == [1, 3, 5]


def _uneven(rank: int, world: int) -> str:
    with pytest.raises(ConfigError) as caught:
        topology_of_group(dist.group.WORLD, 3)
    return str(caught.value)


def test_ranks_that_do_not_divide_into_nodes_are_named() -> None:
    message = "moe.comm_ranks_per_node = 3: must divide the 4 ranks of the expert-parallel group"
    assert run_ranks(4, _uneven) == [message] * 4


def _factories(rank: int, world: int) -> tuple[list[str], str]:
    """What the keys of the configuration make."""

    def build(comm: Literal["auto", "portable", "nvlink"], ranks_per_node: int | None) -> str:
        factory = communicator_factory(
            comm, dist.group.WORLD, max_tokens=None, timeout_s=30.0, ranks_per_node=ranks_per_node
        )
        communicator = factory.build(torch.device("cpu"))
        assert factory.build(torch.device("cpu")) is communicator
        nodes = communicator.topology.nodes if isinstance(communicator, TwoHopCommunicator) else 0
        return f"{type(communicator).__name__} {nodes}"

    made = [build("portable", None), build("auto", None), build("auto", 2), build("portable", 1), build("portable", 4)]
    factory = communicator_factory("nvlink", dist.group.WORLD, max_tokens=None, timeout_s=30.0, ranks_per_node=2)
    with pytest.raises(ConfigError) as caught:
        factory.build_low_latency(torch.device("cpu"), 8, 128, 8)
    return made, str(caught.value)


def test_configuration_chooses_the_hops() -> None:
    one, several = "PortableCommunicator 0", "TwoHopCommunicator"
    for made, low_latency in run_ranks(4, _factories):
        assert made == [one, one, f"{several} 2", f"{several} 4", one]
        assert "moe.comm = nvlink: the tokens are on cpu, kernels need a CUDA GPU" in low_latency


def _layer(rank: int, world: int, ranks_per_node: int | None) -> list[torch.Tensor]:
    """Output and gradients of a layer."""
    torch.manual_seed(3)
    moe = MoEConfig(num_experts=8, top_k=3, comm="portable", comm_ranks_per_node=ranks_per_node)
    layer = EPMoELayer(Config(model=ModelConfig(hidden_size=32), moe=moe))
    x = torch.randn(7 + rank, 32, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_layer_over_nodes_gives_the_same_output_and_gradients(ranks_per_node: int) -> None:
    for got, want in zip(run_ranks(4, _layer, ranks_per_node), run_ranks(4, _layer, None), strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def _limited(rank: int, world: int) -> tuple[int, int]:
    """Rows that leave this rank for tokens that choose among the experts of one node."""
    x, idx, weights = make_inputs(Case((6, 3, 0, 9), num_experts=8, top_k=3, hidden=8), rank)
    idx = idx % 4 + 4 * (torch.arange(idx.shape[0]) % 2)[:, None]
    handle = make_communicator("two_hop", dist.group.WORLD).dispatch(x, idx, weights, num_experts=8).handle
    return sum(handle.routes.send_counts), x.shape[0]


def test_groups_bound_the_rows_between_nodes() -> None:
    for sent, tokens in run_ranks(4, _limited):
        assert sent == tokens


def _late_peer(rank: int, world: int) -> tuple[str, int]:
    class Late(PortableCommunicator):
        def combine(self, *arguments: object) -> torch.Tensor:
            raise PeerTimeoutError("rank 0 waited 2 s for rank 1", 1)

    communicator = two_hop_communicator(dist.group.WORLD, Topology(4, 2), Late, PortableTransport)
    x, idx, weights = make_inputs(Case((2, 2, 2, 2), num_experts=4, top_k=2, hidden=8), rank)
    arrived = communicator.dispatch(x, idx, weights, num_experts=4)
    with pytest.raises(PeerTimeoutError) as caught:
        communicator.combine(arrived.rows, arrived.handle)
    return str(caught.value), caught.value.rank


def test_a_late_rank_of_a_node_is_named_by_its_rank_in_the_group() -> None:
    for rank, (message, late) in enumerate(run_ranks(4, _late_peer)):
        assert late == (1, 3)[rank // 2]
        assert message == f"node {rank // 2}, whose rank 1 is rank {late}: rank 0 waited 2 s for rank 1"


def _in_more_groups_than_others(rank: int, world: int) -> bool:
    before = set(dist.distributed_c10d._world.pg_names)
    dist.new_group([0]), dist.new_group([0])
    ours = make_communicator("two_hop_1", dist.group.WORLD)  # type: ignore[arg-type]
    agree = not _differences(ours, rank, world, 0, 3)
    for group in list(dist.distributed_c10d._world.pg_names):
        if group not in before:
            dist.destroy_process_group(group)
    return agree


def test_ranks_may_be_in_different_numbers_of_groups() -> None:
    assert run_ranks(2, _in_more_groups_than_others) == [True, True]
