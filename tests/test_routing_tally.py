"""Where tokens go over two hops, and what other ranks are told of it."""

from __future__ import annotations

import random

import pytest
import torch

from ep_moe.comm import PeerTimeoutError, routing_tally
from ep_moe.comm.routing_tally import RoutedTokens, TallyFormat, route_tokens
from ep_moe.comm.topology import Topology

SIGNATURE = [7168, 8, 1, -1, 0]


def _routing(seed: int) -> tuple[torch.Tensor, TallyFormat]:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    per_node = choose.choice([1, 2, 4])
    form = TallyFormat(Topology(choose.choice([1, 2, 5, 8]) * per_node, per_node), choose.choice([1, 3, 16]))
    tokens = choose.choice([0, 1, 31, 512, 700])
    topk_idx = torch.randint(-1, form.num_experts, (tokens, choose.choice([1, 2, 8])), generator=generator)
    if tokens and seed % 3 == 0:  # out of range, also of 32 bits
        topk_idx[tokens // 2, 0], topk_idx[0, -1] = form.num_experts + 2, -7 if seed % 2 else -(2**40)
    return topk_idx, form


@pytest.mark.parametrize("seed", range(12))
def test_tokens_and_counts_are_those_of_a_loop(seed: int) -> None:
    topk_idx, form = _routing(seed)
    topology, here = form.topology, form.experts_per_rank
    routed = route_tokens(topk_idx, form, SIGNATURE)
    bins = torch.zeros(topology.ranks, here + 1, dtype=torch.int32)
    tokens: list[list[int]] = [[] for _ in range(topology.nodes)]
    for token, chosen in enumerate(topk_idx.tolist()):
        experts = [expert for expert in chosen if 0 <= expert < form.num_experts]
        for expert in experts:
            bins[expert // here, expert % here] += 1
        ranks = {expert // here for expert in experts}
        for rank in ranks:
            bins[rank, here] += 1
        for node in {topology.node_of(rank) for rank in ranks}:
            tokens[node].append(token)
    assert routed.sent.tolist() == [token for of_node in tokens for token in of_node]
    for of_node, places in zip(tokens, routed.places.tolist(), strict=True):
        assert [places[token] for token in of_node] == list(range(len(of_node)))
        assert sum(place >= 0 for place in places) == len(of_node)
    counted = routed.tally[: form.bins + topology.nodes].tolist()
    assert counted == [*bins.flatten().tolist(), *map(len, tokens)]
    assert form.width % 4 == 0 and routed.tally.shape == (form.width,)


def _table(form: TallyFormat) -> torch.Tensor:
    """The tallies of four ranks."""
    routings = [torch.tensor([[rank, 7 - rank], [-1, 4]]) for rank in range(4)]
    return torch.stack([route_tokens(topk_idx, form, SIGNATURE).tally for topk_idx in routings])


FORM = TallyFormat(Topology(4, 2), 2)


def test_a_rank_reads_what_concerns_it() -> None:
    counts = FORM.read(_table(FORM), 2, SIGNATURE)
    assert counts.nodes.tolist() == [[1, 2]] * 4
    # Experts 4 and 5, and the rows of rank 2: every second token, and the first ones of ranks 2 and 3.
    assert counts.slots.tolist() == [[1, 1, 1, 2], [0, 0, 1, 0]]
    assert counts.rows.tolist() == [[1, 1, 2, 2]]


def test_ranks_that_disagree_are_named() -> None:
    table = _table(FORM)
    table[3, FORM.bins + FORM.topology.nodes + 3] = 4096
    with pytest.raises(
        ValueError, match="rank 3 of the group passed hidden 4096, rank 1 hidden 7168: all ranks must agree"
    ):
        FORM.read(table, 1, SIGNATURE)


def test_a_tally_that_did_not_come_is_named() -> None:
    table = _table(FORM)
    table[1] = 0
    with pytest.raises(PeerTimeoutError, match="counts of rank 1 did not come") as caught:
        FORM.read(table, 0, SIGNATURE)
    assert caught.value.rank == 1


@pytest.mark.parametrize(("entry", "told"), [(8, "8"), (-2, "-2"), (2**40, str(2**31 - 1))])
def test_experts_out_of_range_are_named_at_all_ranks(entry: int, told: str) -> None:
    table = _table(FORM)
    table[1] = route_tokens(torch.tensor([[0, entry]]), FORM, SIGNATURE).tally
    with pytest.raises(ValueError, match=rf"experts in \[0, 8\) .* or -1, got {told} at rank 1"):
        FORM.read(table, 3, SIGNATURE)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_kernel_equals_pytorch(seed: int) -> None:
    topk_idx, form = _routing(seed)
    assert routing_tally._usable(topk_idx.cuda(), form)
    got, want = route_tokens(topk_idx.cuda(), form, SIGNATURE), route_tokens(topk_idx, form, SIGNATURE)
    _check_equal(got, want)


@pytest.mark.gpu
def test_kernel_takes_many_nodes_and_tokens() -> None:
    form = TallyFormat(Topology(256, 8), 4)
    topk_idx = torch.rand(20000, form.num_experts).topk(8).indices
    _check_equal(route_tokens(topk_idx.cuda(), form, SIGNATURE), route_tokens(topk_idx, form, SIGNATURE))


def _check_equal(got: RoutedTokens, want: RoutedTokens) -> None:
    assert torch.equal(got.tally.cpu(), want.tally)
    assert torch.equal(got.places.cpu(), want.places)
    assert torch.equal(got.sent[: want.sent.numel()].cpu(), want.sent)
