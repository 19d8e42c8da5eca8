"""Expert-parallel exchange between several nodes in two hops.

Dispatch: a token crosses once to every node that holds one of its experts, to the GPU that has the source's place
there; that GPU dispatches it among the GPUs of its node. Combine goes back the same way: the ranks of a node return
their sums to that GPU, which adds them and sends one row to the source. So between nodes a row travels at most once a
node and direction (group-limited routing bounds the nodes), and each GPU talks to one GPU of every other node.

The hop between nodes is a :class:`~ep_moe.comm.transport.NodeTransport`, the hop within a node any
:class:`~ep_moe.comm.communicator.Communicator` of the node's ranks; they follow each other, or, where both are our own
kernels, run at the same time (:class:`~ep_moe.comm.hops.Hops`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.communicator import (
    Communicator,
    Dispatched,
    ExpertSegments,
    RowLayout,
    check_dispatch_shapes,
    check_options,
    exchange_signature,
    too_many_rows,
)
from ep_moe.comm.fp8 import check_blocks
from ep_moe.comm.fp8_quantize import quantize_rows
from ep_moe.comm.hops import Counts, Hops, Place
from ep_moe.comm.layout import sum_by_token
from ep_moe.comm.node_chunks import to_device
from ep_moe.comm.node_sum import sum_over_nodes
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.pipelined_hops import PipelinedHops
from ep_moe.comm.routing_tally import TallyFormat, route_tokens
from ep_moe.comm.sequential_hops import SequentialHops
from ep_moe.comm.symmetric_transport import SymmetricTransport, loopback_transport
from ep_moe.comm.tally_exchange import GatheredTallies, PutTallies, TallyExchange
from ep_moe.comm.topology import Topology
from ep_moe.comm.transport import NodeRoutes, NodeTransport
from ep_moe.comm.undivided import UndividedExchanges


@dataclass(frozen=True)
class TwoHopHandle:
    """The routes of one dispatch.

    Attributes:
        shape: ``(tokens, top_k)`` at this rank.
        routes: of this rank's tokens to the nodes.
        tokens: int64 ``[sent]``, the token of each row that returns, by node.
        places: int32 ``[nodes, tokens]``, where among a node's rows that of a token returns, or -1.
        hops: handle of the exchange.
        segments: of the expert-major rows.
    """

    shape: tuple[int, int]
    routes: NodeRoutes
    tokens: Tensor
    places: Tensor
    hops: Any
    segments: ExpertSegments

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        rows: int = self.hops.num_rows(layout)
        return rows


class TwoHopCommunicator(UndividedExchanges):
    """A :class:`~ep_moe.comm.communicator.Communicator` over nodes.

    Rows are those of a communicator of one hop, bit by bit; combine rounds once more where nodes have several ranks:
    the sum of a node's ranks, to the dtype that travels. The host learns all sizes in every dispatch, also with
    ``max_rows``, so a dispatch cannot be captured in a CUDA graph.
    """

    def __init__(self, group: dist.ProcessGroup, topology: Topology, hops: Hops, tallies: TallyExchange) -> None:
        """Compose.

        Args:
            group: all ranks.
            topology: of these ranks.
            hops: among the ranks in this rank's place on every node, and among those of its node.
            tallies: among all ranks.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.topology = topology
        self._hops, self._tallies = hops, tallies
        self._place = Place(self.rank, topology)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        num_experts: int,
        scales: Tensor | None = None,
        fp8: bool = False,
        layout: RowLayout = "expert_major",
        alignment: int = 1,
        max_rows: int | None = None,
        num_sms: int | None = None,
    ) -> Dispatched:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch`."""
        check_options(layout, alignment, max_rows, num_sms)
        check_dispatch_shapes(x, topk_idx, topk_weights, num_experts, self.size, scales=scales, fp8=fp8)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "dispatch: over several nodes it cannot be captured in a CUDA graph, for the host learns sizes"
            )
        if fp8:
            check_blocks(x.shape[1])
        signature = exchange_signature(x, topk_idx, topk_weights, fp8)
        form = TallyFormat(self.topology, num_experts // self.size)
        routed = route_tokens(topk_idx, form, signature)
        everyone = self._tallies.share(routed.tally)
        # Needs no sizes: it runs while the host waits for them.
        payload = [*quantize_rows(x.contiguous())] if fp8 else [x] if scales is None else [x, scales]
        counts = form.read(everyone(), self.rank, signature)
        routes = self._routes(counts, routed.sent)
        sizes = tuple(-(-count // alignment) * alignment for count in counts.slots.sum(1).tolist())
        needed = int(counts.rows.sum()) if layout == "rows" else sum(sizes)
        here = self._hops.dispatch(
            [part.contiguous() for part in payload],
            topk_idx.contiguous(),
            None if topk_weights is None else topk_weights.contiguous(),
            routes,
            counts,
            num_experts=num_experts,
            layout=layout,
            alignment=alignment,
            max_rows=None if max_rows is None else max(max_rows, needed),
            num_sms=num_sms,
        )
        if max_rows is not None and needed > max_rows:  # only now: the other ranks expect this rank's messages
            raise too_many_rows(max_rows, needed, self.rank)
        segments = replace(here.segments, sizes=sizes) if max_rows is None else here.segments
        routing = here.routing
        if routing is not None:
            routing = replace(routing, rows_per_rank=to_device(counts.rows.flatten(), x.device))
        shape = (topk_idx.shape[0], topk_idx.shape[1])
        assert routes.tokens is not None
        handle = TwoHopHandle(shape, routes, routes.tokens, routed.places, here.handle, segments)
        return replace(here, segments=segments, handle=handle, routing=routing)

    def dispatch_cached(self, x: Tensor, handle: TwoHopHandle, layout: RowLayout = "expert_major") -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached`."""
        if x.dim() != 2 or x.shape[0] != handle.shape[0]:
            raise ValueError(f"x: expected [{handle.shape[0]}, hidden] as in the dispatch, got {list(x.shape)}")
        return self._hops.dispatch_cached(x.contiguous(), handle.hops, layout)

    def dispatch_weights(self, topk_weights: Tensor, handle: TwoHopHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_weights`."""
        if topk_weights.shape != handle.shape:
            raise ValueError(f"topk_weights: expected {list(handle.shape)}, got {list(topk_weights.shape)}")
        return self._hops.dispatch_weights(topk_weights.contiguous(), handle.hops)

    def combine(
        self, rows: Tensor, handle: TwoHopHandle, layout: RowLayout = "expert_major", *, behind_gemms: bool = False
    ) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine`."""
        if rows.dim() != 2 or rows.shape[0] != handle.num_rows(layout):
            raise ValueError(
                f"rows: expected [{handle.num_rows(layout)}, hidden] as dispatched, got {list(rows.shape)}"
            )
        returned = self._hops.combine(rows, handle.hops, layout)
        return sum_over_nodes(returned, handle.tokens, handle.places)

    def combine_weights(self, row_weights: Tensor, handle: TwoHopHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_weights`."""
        if row_weights.shape != (handle.segments.num_rows,):
            raise ValueError(f"row_weights: expected [{handle.segments.num_rows}], got {list(row_weights.shape)}")
        returned = self._hops.combine_weights(row_weights, handle.hops)
        return sum_by_token(returned, handle.tokens, handle.shape[0], row_weights.dtype)

    def _routes(self, counts: Counts, sent: Tensor) -> NodeRoutes:
        """Where tokens go, the first of ``sent``, and how many rows come."""
        topology = self.topology
        nodes: list[list[int]] = counts.nodes.tolist()
        own, leaving = topology.node_of(self.rank), nodes[self.rank]
        arriving = tuple(nodes[rank][own] for rank in topology.counterparts(self.rank))
        return NodeRoutes(sent[: sum(leaving)], tuple(leaving), arriving)


def two_hop_communicator(
    group: dist.ProcessGroup,
    topology: Topology,
    node_communicator: Callable[[dist.ProcessGroup], Communicator],
    transport: Callable[[dist.ProcessGroup], NodeTransport],
    *,
    overlap: bool = True,
) -> TwoHopCommunicator:
    """Form the groups of both hops and compose; collective over ``group``.

    Args:
        group: all ranks.
        topology: of these ranks.
        node_communicator: makes the communicator of a node's ranks, which serves ``topology.nodes`` times the tokens of
            a rank, rounded up to a multiple of 32 for each node.
        transport: makes the transport among the ranks in one place of every node.
        overlap: let both hops run at the same time, where both are our own kernels.
    """
    rank = dist.get_rank(group)
    _even_out_names(group)
    node, counterparts = (
        dist.new_group(
            [dist.get_global_rank(group, member) for member in members],
            backend=dist.get_backend(group),
            use_local_synchronization=True,  # ranks of other expert-parallel groups take no part
        )
        for members in (topology.ranks_of_node(topology.node_of(rank)), topology.counterparts(rank))
    )
    assert node is not None and counterparts is not None
    here, between, place = node_communicator(node), transport(counterparts), Place(rank, topology)
    if (
        overlap
        and topology.nodes > 1
        and isinstance(here, NvlinkCommunicator)
        and isinstance(between, SymmetricTransport)
    ):
        within = None
        if topology.ranks_per_node > 1:
            ranks = topology.ranks_of_node(place.node)
            within = loopback_transport(node, ranks, here.device, timeout_s=between.timeout_s)
        return TwoHopCommunicator(
            group, topology, PipelinedHops(place, here, between), PutTallies(topology, between, within)
        )
    return TwoHopCommunicator(group, topology, SequentialHops(place, here, between), GatheredTallies(group))


def _even_out_names(group: dist.ProcessGroup) -> None:
    """Let all ranks give the next groups that they form the same names; collective over ``group``.

    PyTorch names a group that only its members form after their ranks and the number of groups that the process is in.
    Ranks that are in more groups than others would wait for them under another name, for ever. Groups of one make up
    for the difference.
    """
    mine = len(dist.distributed_c10d._world.pg_names)
    counts = [mine] * dist.get_world_size(group)
    dist.all_gather_object(counts, mine, group=group)
    for _ in range(max(counts) - mine):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
