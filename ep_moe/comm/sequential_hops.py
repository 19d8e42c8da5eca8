"""One hop behind the other, by any transport and any communicator of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep_moe.comm.communicator import Communicator, Dispatched, ReceivedRouting, RowLayout
from ep_moe.comm.hops import Counts, Place
from ep_moe.comm.node_chunks import to_device
from ep_moe.comm.transport import NodeRoutes, NodeTransport
from ep_moe.comm.two_hop_layout import inverse_of, order_of


@dataclass(frozen=True)
class _Order:
    """From the order of the node's exchange to that of the contract and back.

    Attributes:
        of: int64 ``[places]``, place in the node's order of each place of the contract's.
        inverse: int64 ``[places]``.
    """

    of: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class SequentialHandle:
    """The routes of one dispatch.

    Attributes:
        routes: of this rank's tokens to the nodes.
        node: handle of the exchange within the node.
        slots: where slots belong; ``None`` if they are in order.
        rows: where received rows belong; ``None`` if they are in order.
    """

    routes: NodeRoutes
    node: Any
    slots: _Order | None
    rows: _Order | None

    def order(self, layout: RowLayout) -> _Order | None:
        """Where rows of a tensor in ``layout`` belong."""
        return self.rows if layout == "rows" else self.slots

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        rows: int = self.node.num_rows(layout)
        return rows


class SequentialHops:
    """:class:`~ep_moe.comm.hops.Hops` that finishes one hop before it begins the other."""

    def __init__(self, place: Place, node: Communicator, transport: NodeTransport) -> None:
        """Compose.

        Args:
            place: of this rank.
            node: among the ranks of its node; its handles tell by ``num_rows(layout)`` how many rows a tensor has.
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
        place = self._place
        sent = [*payload, topk_idx.to(torch.int32)]
        if topk_weights is not None:
            sent.append(topk_weights)
        arrived = self._transport.exchange(sent, routes)
        weights = None if topk_weights is None else arrived.pop()
        *arrived, chosen = arrived
        with place.ranks_named():
            here = self._node.dispatch(
                arrived[0],
                place.experts(chosen, num_experts),
                weights,
                num_experts=num_experts // place.topology.nodes,
                scales=arrived[1] if len(arrived) > 1 else None,
                layout=layout,
                alignment=alignment,
                max_rows=max_rows,
                num_sms=num_sms,
            )
        # With room to spare these may be more than arrive, in either layout.
        num_slots, received = here.segments.num_rows, here.handle.num_rows("rows")
        device = topk_idx.device
        slots = _order_on(device, order_of(counts.slots, place.topology, alignment=alignment, capacity=num_slots))
        rows = _order_on(device, order_of(counts.rows, place.topology, capacity=received))
        return _in_order(here, SequentialHandle(routes, here.handle, slots, rows), layout)

    def dispatch_cached(self, x: Tensor, handle: SequentialHandle, layout: RowLayout) -> Tensor:
        """See :meth:`ep_moe.comm.hops.Hops.dispatch_cached`."""
        arrived = self._transport.exchange([x], handle.routes)[0]
        with self._place.ranks_named():
            here = self._node.dispatch_cached(arrived, handle.node, layout)
        return _reordered(here, handle.order(layout))

    def dispatch_weights(self, topk_weights: Tensor, handle: SequentialHandle) -> Tensor:
        """See :meth:`ep_moe.comm.hops.Hops.dispatch_weights`."""
        arrived = self._transport.exchange([topk_weights], handle.routes)[0]
        with self._place.ranks_named():
            here = self._node.dispatch_weights(arrived, handle.node)
        return _reordered(here, handle.slots)

    def combine(self, rows: Tensor, handle: SequentialHandle, layout: RowLayout) -> Sequence[Tensor]:
        """See :meth:`ep_moe.comm.hops.Hops.combine`."""
        order = handle.order(layout)
        with self._place.ranks_named():
            here = self._node.combine(rows if order is None else rows[order.inverse], handle.node, layout)
        return self._back(here, handle)

    def combine_weights(self, row_weights: Tensor, handle: SequentialHandle) -> Sequence[Tensor]:
        """See :meth:`ep_moe.comm.hops.Hops.combine_weights`."""
        weights = row_weights if handle.slots is None else row_weights[handle.slots.inverse]
        with self._place.ranks_named():
            here = self._node.combine_weights(weights, handle.node)
        return self._back(here, handle)

    def _back(self, here: Tensor, handle: SequentialHandle) -> Sequence[Tensor]:
        """What tokens of this node get, from each node that they were sent to."""
        returned = self._transport.exchange([here.contiguous()], handle.routes.back())[0]
        return returned.split(handle.routes.send_counts)


def _order_on(device: torch.device, order: Tensor | None) -> _Order | None:
    if order is None:
        return None
    order = to_device(order, device)
    return _Order(order, inverse_of(order))


def _reordered(tensor: Tensor, order: _Order | None) -> Tensor:
    """A tensor in the order of the node's exchange, in the order of the contract."""
    if order is None:
        return tensor
    # FP8 dtypes lack most operations; as bytes they move like any other.
    data = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return data[order.of].view(tensor.dtype)


def _in_order(here: Dispatched, handle: SequentialHandle, layout: RowLayout) -> Dispatched:
    """What the node's exchange brought, as the contract wants it."""

    def reordered(tensor: Tensor | None, order: _Order | None) -> Tensor | None:
        return None if tensor is None else _reordered(tensor, order)

    row_of_slot = _reordered(here.row_of_slot, handle.slots)
    if handle.rows is not None:
        received = handle.num_rows("rows")
        # Behind the last row there is none, which padding and garbage point at.
        places = torch.cat([handle.rows.inverse.to(torch.int32), row_of_slot.new_full((1,), -1)])
        known = (row_of_slot >= 0) & (row_of_slot < received)
        row_of_slot = places[torch.where(known, row_of_slot, received).long()]
    routing = None
    if here.routing is not None:
        topk_weights = reordered(here.routing.topk_weights, handle.rows)
        topk_idx = _reordered(here.routing.topk_idx, handle.rows)
        routing = ReceivedRouting(topk_idx, topk_weights, here.routing.rows_per_rank)
    return replace(
        here,
        rows=_reordered(here.rows, handle.order(layout)),
        scales=reordered(here.scales, handle.order(layout)),
        weights=reordered(here.weights, handle.slots),
        row_of_slot=row_of_slot,
        handle=handle,
        routing=routing,
    )
