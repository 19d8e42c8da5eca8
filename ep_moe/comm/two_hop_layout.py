"""Where rows go that take two hops: index arithmetic on counts, without communication.

The node's own exchange orders rows by (expert, place on the node, source node, token), the contract asks for
(expert, source rank, token), where a source rank is (source node, place on the node).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ep_moe.comm.topology import Topology


def order_of(counts: Tensor, topology: Topology, *, alignment: int = 1, capacity: int | None = None) -> Tensor | None:
    """Places in the order of the node's exchange, for every place in the order of the contract.

    Args:
        counts: int64 ``[segments, ranks]`` on the CPU, rows by segment and source rank.
        topology: of the ranks.
        alignment: segments are padded to a multiple of this.
        capacity: places in all; those behind the last segment stay where they are.

    Returns:
        int64 ``[places]`` on the CPU, a permutation; ``None`` for one that changes nothing.
    """
    if topology.nodes == 1 or topology.ranks_per_node == 1:
        return None
    segments = counts.shape[0]
    # Blocks of rows that stay together: [segment, place on the node, source node], then the padding of the segment.
    blocks = counts.view(segments, topology.nodes, topology.ranks_per_node).transpose(1, 2).flatten(1)
    filled = counts.sum(1, keepdim=True)
    sizes = torch.cat([blocks, -filled % alignment], dim=1)
    starts = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes)
    wanted = torch.arange(topology.ranks).view(topology.ranks_per_node, topology.nodes).t().flatten()
    wanted = torch.cat([wanted, torch.tensor([topology.ranks])])
    starts, sizes = starts[:, wanted].flatten(), sizes[:, wanted].flatten()
    within = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    order = starts.repeat_interleave(sizes) + within
    return order if capacity is None else torch.cat([order, torch.arange(order.numel(), capacity)])


def inverse_of(order: Tensor) -> Tensor:
    """The permutation that undoes ``order`` (int64 ``[places]``)."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse
