"""Both hops at the same time, by our own kernels between nodes and on each node.

Routing travels first, then rows. In a dispatch the exchange between nodes takes the place of the push: rows that arrive
go to where peers of the node pull them, chunk by chunk, while others are on their way. In a combine it sends a node's
sums while others are being made. Why these kernels do not wait for each other for ever:
``csrc/include/node_exchange.cuh``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ep_moe.comm.communicator import Dispatched, RowLayout
from ep_moe.comm.hops import Counts, Place
from ep_moe.comm.node_chunks import most_places, node_chunks, node_starts
from ep_moe.comm.nvlink import NvlinkCommunicator
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_handle import NvlinkHandle
from ep_moe.comm.nvlink_layout import KnownSizes
from ep_moe.comm.nvlink_rows import Sending
from ep_moe.comm.nvlink_sums import Summed
from ep_moe.comm.nvlink_wire import MOVED, WireFormat, aligned, wire_format
from ep_moe.comm.symmetric_transport import Spans, SymmetricTransport
from ep_moe.comm.transport import NodeRoutes


@dataclass(frozen=True)
class PipelinedHandle:
    """The routes of one dispatch.

    Attributes:
        tokens: int64 ``[sent]``, the token of each row that is sent, by node.
        sent: of these rows.
        arrived: of the rows that arrive, those of a node from a multiple of 32 on.
        num_arrived: places for them.
        node: handle of the exchange within the node.
    """

    tokens: Tensor
    sent: Spans
    arrived: Spans
    num_arrived: int
    node: NvlinkHandle

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        return self.node.num_rows(layout)


class _ArrivingRows:
    """A :class:`~ep_moe.comm.nvlink_rows.RowSource` of rows from all nodes."""

    def __init__(
        self, transport: SymmetricTransport, tensors: Sequence[Tensor], tokens: Tensor, sent: Spans, arrived: Spans
    ) -> None:
        """Hold rows of ``tensors``, and scales if there are two; the others as of :class:`PipelinedHandle`.

        Raises:
            ValueError: if kernels cannot move such rows.
        """
        self._transport, self._tensors, self._tokens, self._spans = transport, tensors, tokens, (sent, arrived)
        self.wire: WireFormat = wire_format(tensors[0], MOVED, scaled=len(tensors) > 1)
        self.dtype = tensors[0].dtype
        self.hidden = tensors[0].shape[1]

    def send(self, core: NvlinkCore, *, early: bool, quantizes: bool) -> Sending:
        """See :meth:`ep_moe.comm.nvlink_rows.RowSource.send`."""
        self._transport.stage(
            self._tensors,
            (0, self.wire.row_bytes)[: len(self._tensors)],
            self._tokens,
            *self._spans,
            comm=core.arguments(1),
            row_bytes=self.wire.bytes,
            early=early,
        )
        return Sending(None, 0)  # all rows arrive; by a few SMs that are busy until they have


class PipelinedHops:
    """:class:`~ep_moe.comm.hops.Hops` whose hops overlap."""

    def __init__(self, place: Place, node: NvlinkCommunicator, transport: SymmetricTransport) -> None:
        """Compose.

        Args:
            place: of this rank.
            node: among the ranks of its node; nobody else uses it.
            transport: among the ranks in this rank's place on every node.
        """
        self._place, self._node, self._transport = place, node, transport

    def dispatch(
        self,
        payload: Sequence[Tensor],
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        routes: NodeRoutes,
        counts: Counts,
        *,
        num_experts: int,
        layout: RowLayout,
        alignment: int,
        max_rows: int | None,
        num_sms: int | None,
    ) -> Dispatched:
        """See :meth:`ep_moe.comm.hops.Hops.dispatch`."""
        place, node, transport = self._place, self._node, self._transport
        nodes, ranks = place.topology.nodes, place.topology.ranks_per_node
        assert routes.tokens is not None
        here = num_experts // nodes
        node.check_limits(topk_idx, here, max_rows)
        starts = node_starts(counts.nodes[:, place.node].view(nodes, ranks))
        *first, num_arrived = starts[node.rank]
        sent, arrived = Spans.packed(routes.send_counts), Spans(tuple(first), routes.recv_counts)
        rows = _ArrivingRows(transport, payload, routes.tokens, sent, arrived)
        routing = [topk_idx]
        # Places without a token are routed nowhere.
        arrived_routing = [topk_idx.new_full((num_arrived, topk_idx.shape[1]), -1)]
        if topk_weights is not None:
            routing.append(topk_weights)
            arrived_routing.append(topk_weights.new_zeros(num_arrived, topk_idx.shape[1]))
        with transport:
            transport.reserve(payload)
            transport.reserve(routing)
            transport.move(routing, arrived_routing, routes.tokens, sent, arrived)
            # While that is under way.
            # Buffers of all nodes grow together, as allocate_symmetric wants it.
            most_tokens = most_places(counts.nodes, ranks)
            chunks = node_chunks(starts, counts.bins.view(-1, nodes, ranks), node.rank, most_tokens, node.device)
            *slots, received = counts.bins.sum(1).tolist()
            with place.ranks_named():
                dispatched = node.dispatch_from_nodes(
                    rows,
                    place.experts(arrived_routing[0], num_experts),
                    None if topk_weights is None else arrived_routing[1],
                    chunks,
                    KnownSizes(tuple(slots), received),
                    num_experts=here,
                    layout=layout,
                    alignment=alignment,
                    max_rows=max_rows,
                    num_sms=num_sms,
                )
        handle = PipelinedHandle(routes.tokens, sent, arrived, num_arrived, dispatched.handle)
        return replace(dispatched, handle=handle)

    def dispatch_cached(self, x: Tensor, handle: PipelinedHandle, layout: RowLayout) -> Tensor:
        """See :meth:`ep_moe.comm.hops.Hops.dispatch_cached`."""
        rows = _ArrivingRows(self._transport, [x], handle.tokens, handle.sent, handle.arrived)
        with self._transport:
            self._transport.reserve([x])
            with self._place.ranks_named():
                return self._node.dispatch_cached_from_nodes(rows, handle.node, layout)

    def dispatch_weights(self, topk_weights: Tensor, handle: PipelinedHandle) -> Tensor:
        """See :meth:`ep_moe.comm.hops.Hops.dispatch_weights`."""
        arrived = topk_weights.new_zeros(handle.num_arrived, topk_weights.shape[1])
        with self._transport:
            self._transport.reserve([topk_weights])
            self._transport.move([topk_weights], [arrived], handle.tokens, handle.sent, handle.arrived)
            with self._place.ranks_named():
                return self._node.dispatch_weights(arrived, handle.node)

    def combine(self, rows: Tensor, handle: PipelinedHandle, layout: RowLayout) -> Sequence[Tensor]:
        """See :meth:`ep_moe.comm.hops.Hops.combine`."""
        own = self._place.node
        # Sums of this rank's own node stay where they are made.
        back = Spans.packed([0 if node == own else count for node, count in enumerate(handle.sent.counts)])
        returned = rows.new_empty(back.end, rows.shape[1])

        def send(summed: Summed) -> None:
            self._transport.send_summed(summed, returned, handle.arrived, back)

        with self._transport:
            self._transport.reserve([returned])
            with self._place.ranks_named():
                sums = self._node.combine_to_nodes(
                    aligned(rows), handle.node, layout, send, leave_sms=self._transport.blocks
                )
        return [
            handle.arrived.of(sums, node) if node == own else back.of(returned, node)
            for node in range(len(handle.sent.counts))
        ]

    def combine_weights(self, row_weights: Tensor, handle: PipelinedHandle) -> Sequence[Tensor]:
        """See :meth:`ep_moe.comm.hops.Hops.combine_weights`."""
        with self._transport:
            with self._place.ranks_named():
                values = self._node.combine_weights(row_weights, handle.node)
            back = Spans.packed(handle.sent.counts)
            returned = values.new_empty(back.end, values.shape[1])
            self._transport.reserve([values])
            self._transport.move([values], [returned], None, handle.arrived, back)
        return returned.split(handle.sent.counts)
