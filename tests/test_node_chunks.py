"""Places of tokens that come from nodes: shifts turn the order of the node's exchange into that of source ranks."""

from __future__ import annotations

import random

import pytest
import torch

from ep_moe.comm.node_chunks import NodeChunks, most_places, node_chunks, node_starts

Token = tuple[int, int, int, int]  # node, rank of the node, number among those it sent there, bin


def _tables(chunks: NodeChunks, ranks: int, bins: int) -> tuple[list[list[int]], torch.Tensor]:
    starts = ranks * (chunks.nodes + 1)
    first = chunks.table[:starts].view(ranks, chunks.nodes + 1)
    if ranks == 1:
        assert chunks.shifts is None and chunks.table.numel() == starts
        return first.tolist(), torch.zeros(ranks, chunks.nodes, bins, dtype=torch.int32)
    assert chunks.shifts == chunks.table.data_ptr() + 4 * starts
    return first.tolist(), chunks.table[starts:].view(ranks, chunks.nodes, bins)


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 1), (2, 2), (3, 4), (5, 8)])
def test_shifted_places_are_ordered_by_source_rank(nodes: int, ranks: int) -> None:
    choose = random.Random(nodes * ranks)
    bins = 4  # three experts and the rows
    arriving = torch.tensor([[choose.choice([0, 1, 31, 32, 33, 70]) for _ in range(ranks)] for _ in range(nodes)])
    # A token in some bins; in the last one, of the rows, whenever it is in another.
    entries: list[Token] = []
    for node in range(nodes):
        for rank in range(ranks):
            for number in range(int(arriving[node, rank])):
                chosen = [bin for bin in range(bins - 1) if choose.random() < 0.4]
                entries += [(node, rank, number, bin) for bin in [*chosen, *([bins - 1] if chosen else [])]]
    counts = torch.zeros(bins, nodes, ranks, dtype=torch.int64)
    for node, rank, _, bin in entries:
        counts[bin, node, rank] += 1
    chunks = node_chunks(node_starts(arriving), counts, 0, 0, torch.device("cpu"))
    first, shifts = _tables(chunks, ranks, bins)

    for bin in range(bins):
        here = [entry for entry in entries if entry[3] == bin]
        # As the layout kernel orders a bin: by rank, then by place among the rank's tokens.
        by_place = sorted(here, key=lambda entry: (entry[1], first[entry[1]][entry[0]] + entry[2]))
        shifted = {entry: place + int(shifts[entry[1], entry[0], bin]) for place, entry in enumerate(by_place)}
        assert [shifted[entry] for entry in sorted(here)] == list(range(len(here)))


def test_nodes_start_at_a_chunk() -> None:
    arriving = torch.tensor([[33, 0], [0, 5], [64, 1]])  # of three nodes, to two ranks
    chunks = node_chunks(node_starts(arriving), torch.zeros(2, 3, 2, dtype=torch.int64), 1, 128, torch.device("cpu"))
    first, _ = _tables(chunks, 2, 2)
    assert first == [[0, 64, 64, 128], [0, 0, 32, 64]]
    assert (chunks.first, chunks.tokens, chunks.most_tokens, chunks.most) == ((0, 0, 32, 64), 64, 128, 2)


def test_no_tokens_at_all() -> None:
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    chunks = node_chunks(node_starts(zeros), torch.zeros(3, 2, 2, dtype=torch.int64), 0, 0, torch.device("cpu"))
    assert (chunks.tokens, chunks.most_tokens, chunks.most) == (0, 0, 0)


def test_most_places_are_those_of_the_fullest_rank_of_any_node() -> None:
    generator = torch.Generator().manual_seed(5)
    for nodes, ranks_per_node in ((1, 1), (2, 1), (2, 4), (4, 2)):
        sent = torch.randint(0, 200, (nodes * ranks_per_node, nodes), generator=generator)
        by_node = [node_starts(sent[:, node].view(nodes, ranks_per_node)) for node in range(nodes)]
        assert most_places(sent, ranks_per_node) == max(starts[-1] for of_node in by_node for starts in of_node)
