"""Where the tokens lie that nodes sent to the ranks of one of them: ``csrc/include/node_chunks.cuh`` from counts.

A rank's tokens come node by node, each node's from a multiple of 32 on. The node's own exchange would order rows by
(expert, place on the node, source node, token); shifts make that (expert, source node, place on the node, token), the
order of source ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native


@dataclass(frozen=True)
class NodeChunks:
    """Tokens of the ranks of a node, by the node that sent them.

    Attributes:
        table: int32 on the device: where tokens start, ``[ranks, nodes + 1]``, then, if there are several ranks, the
            shifts of rows, ``[ranks, nodes, local experts + 1]``.
        nodes: that tokens come from.
        most: chunks that a node sent to a rank.
        first: where each node's tokens start at this rank, and the end of the last.
        most_tokens: places for tokens that the rank of all nodes that needs the most of them needs.
    """

    table: Tensor
    nodes: int
    most: int
    first: tuple[int, ...]
    most_tokens: int
    _ranks: int

    @property
    def tokens(self) -> int:
        """Places for tokens at this rank."""
        return self.first[-1]

    def arguments(self) -> native.NodeChunks:
        """For kernels."""
        return native.NodeChunks(self.table.data_ptr(), self.nodes, self.most)

    @property
    def shifts(self) -> int | None:
        """Address of the shifts; ``None`` where rows are in order without."""
        return None if self._ranks == 1 else self.table.data_ptr() + 4 * self._ranks * (self.nodes + 1)


def node_starts(arriving: Tensor) -> list[tuple[int, ...]]:
    """Where each node's tokens start among those of a rank, and the end of the last, for each rank of this node.

    Args:
        arriving: int64 ``[nodes, ranks]`` on the CPU, tokens that each node sends to each rank of this node.
    """
    size = native.CHUNK_TOKENS
    return [
        tuple(accumulate((-(-tokens // size) * size for tokens in of_rank), initial=0))
        for of_rank in arriving.t().tolist()
    ]


def most_places(sent: Tensor, ranks_per_node: int) -> int:
    """Places for tokens of the rank, of any node, that needs the most of them.

    Args:
        sent: int64 ``[ranks, nodes]`` on the CPU, tokens that each rank sends to each node.
        ranks_per_node: of which the ones in the same place on their nodes send tokens to each other.
    """
    chunks = (sent + native.CHUNK_TOKENS - 1) // native.CHUNK_TOKENS
    return int(chunks.view(-1, ranks_per_node, sent.shape[1]).sum(0).max()) * native.CHUNK_TOKENS


def node_chunks(
    starts: list[tuple[int, ...]], bins: Tensor, rank: int, most_tokens: int, device: torch.device
) -> NodeChunks:
    """Lay out the tokens of a node's ranks.

    Args:
        starts: of :func:`node_starts`.
        bins: int64 ``[local experts + 1, nodes, ranks]`` on the CPU: slots of each of this rank's experts, then its
            rows, by source rank.
        rank: this one's place on the node.
        most_tokens: of :func:`most_places`.
        device: of the table.
    """
    ranks, nodes = len(starts), len(starts[0]) - 1
    table = torch.tensor(starts, dtype=torch.int32).flatten()
    if ranks > 1:
        by_node = _starts(bins).transpose(1, 2)
        shifts = (by_node - _starts(bins.transpose(1, 2))).permute(1, 2, 0)
        table = torch.cat([table, shifts.flatten().to(torch.int32)])
    most = max(end - start for of_rank in starts for start, end in pairwise(of_rank)) // native.CHUNK_TOKENS
    return NodeChunks(to_device(table, device), nodes, most, starts[rank], most_tokens, ranks)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, for which the host does not wait."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _starts(counts: Tensor) -> Tensor:
    """Where each group starts in its bin, for groups in the order of ``counts`` (``[bins, ...]``)."""
    flat = counts.flatten(1)
    return (flat.cumsum(1) - flat).view(counts.shape)
