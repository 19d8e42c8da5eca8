"""Where the tokens lie that nodes sent to the ranks of one of them: ``csrc/include/node_chunks.cuh`` from counts.

A rank's tokens come node by node, each node's from a multiple of 32 on. The node's own exchange would order rows by
(expert, place on the node, source node, token); shifts make that (expert, source node, place on the node, token), the
order of source ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native


@dataclass(frozen=True)
class NodeChunks:
    """Tokens of the ranks of a node, by the node that sent them.

    Attributes:
        table: int32 on the device: where tokens start, ``[ranks, nodes + 1]``, then the shifts of rows,
            ``[ranks, nodes, local experts + 1]``.
        nodes: that tokens come from.
        most: chunks that a node sent to a rank.
        first: where each node's tokens start at this rank, and the end of the last.
        most_tokens: places for tokens that a rank needs.
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
    def shifts(self) -> int:
        """Address of the shifts."""
        return self.table.data_ptr() + 4 * self._ranks * (self.nodes + 1)


def node_chunks(arriving: Tensor, bins: Tensor, rank: int, device: torch.device) -> NodeChunks:
    """Lay out the tokens of a node's ranks.

    Args:
        arriving: int64 ``[nodes, ranks]`` on the CPU, tokens that each node sends to each rank of this node.
        bins: int64 ``[local experts + 1, nodes, ranks]`` on the CPU: slots of each of this rank's experts, then its
            rows, by source rank.
        rank: this one's place on the node.
        device: of the table.
    """
    nodes, ranks = arriving.shape
    chunks = -(-arriving.t() // native.CHUNK_TOKENS)
    first = torch.zeros(ranks, nodes + 1, dtype=torch.int64)
    first[:, 1:] = (chunks * native.CHUNK_TOKENS).cumsum(1)
    by_node = _starts(bins).transpose(1, 2)
    shifts = (by_node - _starts(bins.transpose(1, 2))).permute(1, 2, 0)
    table = torch.cat([first.flatten(), shifts.flatten()]).to(torch.int32)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return NodeChunks(table, nodes, int(chunks.max()), tuple(first[rank].tolist()), int(first[:, -1].max()), ranks)


def _starts(counts: Tensor) -> Tensor:
    """Where each group starts in its bin, for groups in the order of ``counts`` (``[bins, ...]``)."""
    flat = counts.flatten(1)
    return (flat.cumsum(1) - flat).view(counts.shape)
