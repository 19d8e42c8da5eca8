"""Expert-parallel exchange between several nodes in two hops.

Dispatch: a token crosses once to every node that holds one of its experts, to the GPU that has the source's place
there; that GPU dispatches it among the GPUs of its node. Combine goes back the same way: the ranks of a node return
their sums to that GPU, which adds them and sends one row to the source. So between nodes a row travels at most once a
node and direction (group-limited routing bounds the nodes), and each GPU talks to one GPU of every other node.

The hop between nodes is a :class:`~ep_moe.comm.transport.NodeTransport`, the hop within a node any
:class:`~ep_moe.comm.communicator.Communicator` of the node's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm.all_to_all import staging_device
from ep_moe.comm.communicator import (
    CapacityError,
    Communicator,
    Dispatched,
    ExpertSegments,
    ReceivedRouting,
    RowLayout,
    check_dispatch_shapes,
    check_expert_range,
    exchange_signature,
)
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.layout import SendLayout, send_layout, sum_by_token
from ep_moe.comm.nvlink_faults import PeerTimeoutError
from ep_moe.comm.topology import Topology
from ep_moe.comm.transport import NodeRoutes, NodeTransport
from ep_moe.comm.two_hop_layout import inverse_of, order_of
from ep_moe.comm.undivided import UndividedExchanges


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
class TwoHopHandle:
    """The routes of one dispatch.

    Attributes:
        shape: ``(tokens, top_k)`` at this rank.
        routes: of this rank's tokens to the nodes.
        tokens: int64 ``[sent]``, the token of each row that returns, by node.
        node: handle of the exchange within the node.
        slots: where slots belong; ``None`` if they are in order.
        rows: where received rows belong; ``None`` if they are in order.
        segments: of the expert-major rows.
        received: rows of a tensor in the layout ``rows``.
    """

    shape: tuple[int, int]
    routes: NodeRoutes
    tokens: Tensor
    node: Any
    slots: _Order | None
    rows: _Order | None
    segments: ExpertSegments
    received: int

    def order(self, layout: RowLayout) -> _Order | None:
        """Where rows of a tensor in ``layout`` belong."""
        return self.rows if layout == "rows" else self.slots

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        return self.received if layout == "rows" else self.segments.num_rows


@dataclass(frozen=True)
class _Counts:
    """What every rank sends: int64 on the CPU, the first dimension the sending rank.

    Attributes:
        nodes: ``[ranks, nodes]``, rows to each node.
        ranks: ``[ranks, ranks]``, rows that each rank receives in the end.
        experts: ``[ranks, num_experts]``, slots of each expert.
    """

    nodes: Tensor
    ranks: Tensor
    experts: Tensor


class TwoHopCommunicator(UndividedExchanges):
    """A :class:`~ep_moe.comm.communicator.Communicator` over nodes.

    Rows are those of a communicator of one hop, bit by bit; combine rounds once more where nodes have several ranks:
    the sum of a node's ranks, to the dtype that travels. The host learns all sizes in every dispatch, also with
    ``max_rows``, so a dispatch cannot be captured in a CUDA graph.
    """

    def __init__(
        self, group: dist.ProcessGroup, topology: Topology, node: Communicator, transport: NodeTransport
    ) -> None:
        """Compose.

        Args:
            group: all ranks.
            topology: of these ranks.
            node: among the ranks of this rank's node; it serves ``topology.nodes`` times the tokens of a rank. Its
                handles tell by ``num_rows(layout)`` how many rows a tensor has.
            transport: among the ranks in this rank's place on every node.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.topology = topology
        self._node = node
        self._transport = transport

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
        check_dispatch_shapes(x, topk_idx, topk_weights, num_experts, self.size, scales=scales, fp8=fp8)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "dispatch: over several nodes it cannot be captured in a CUDA graph, for the host learns sizes"
            )
        check_expert_range(topk_idx, num_experts)
        topology = self.topology
        payload = [*quantize_e4m3(x)] if fp8 else [x.contiguous()] if scales is None else [x.contiguous(), scales]
        to_nodes = send_layout(topk_idx, num_experts, topology.nodes)
        to_ranks = send_layout(topk_idx, num_experts, self.size)
        counts = self._exchange_counts(to_nodes, to_ranks, exchange_signature(x, topk_idx, topk_weights, fp8))
        routes = self._routes(counts, to_nodes.tokens)
        sent = [*payload, topk_idx.to(torch.int32)]
        if topk_weights is not None:
            sent.append(topk_weights.contiguous())
        arrived = self._transport.exchange(sent, routes)
        weights = None if topk_weights is None else arrived.pop()
        *arrived, chosen = arrived

        local_experts = num_experts // self.size
        slot_counts = counts.experts[:, self.rank * local_experts : (self.rank + 1) * local_experts].t().contiguous()
        row_counts = counts.ranks[None, :, self.rank].contiguous()
        sizes = tuple(-(-count // alignment) * alignment for count in slot_counts.sum(1).tolist())
        needed = int(row_counts.sum()) if layout == "rows" else sum(sizes)
        room = None if max_rows is None else max(max_rows, needed)
        with self._ranks_named():
            here = self._node.dispatch(
                arrived[0],
                self._node_experts(chosen, num_experts),
                weights,
                num_experts=num_experts // topology.nodes,
                scales=arrived[1] if len(arrived) > 1 else None,
                layout=layout,
                alignment=alignment,
                max_rows=room,
                num_sms=num_sms,
            )
        if max_rows is not None and needed > max_rows:  # only now: the other ranks expect this rank's messages
            raise CapacityError(f"max_rows = {max_rows}: {needed} rows arrived at rank {self.rank}")
        # With room to spare these may be more than arrive, in either layout.
        num_slots, received = here.segments.num_rows, here.handle.num_rows("rows")
        device = x.device
        slots = _order_on(device, order_of(slot_counts, topology, alignment=alignment, capacity=num_slots))
        rows = _order_on(device, order_of(row_counts, topology, capacity=received))
        segments = replace(here.segments, sizes=sizes) if max_rows is None else here.segments
        handle = TwoHopHandle(
            (topk_idx.shape[0], topk_idx.shape[1]),
            routes,
            to_nodes.tokens,
            here.handle,
            slots,
            rows,
            segments,
            received,
        )
        return _in_order(here, handle, layout, row_counts.flatten().to(device))

    def dispatch_cached(self, x: Tensor, handle: TwoHopHandle, layout: RowLayout = "expert_major") -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached`."""
        if x.dim() != 2 or x.shape[0] != handle.shape[0]:
            raise ValueError(f"x: expected [{handle.shape[0]}, hidden] as in the dispatch, got {list(x.shape)}")
        arrived = self._transport.exchange([x.contiguous()], handle.routes)[0]
        with self._ranks_named():
            here = self._node.dispatch_cached(arrived, handle.node, layout)
        return _reordered(here, handle.order(layout))

    def dispatch_weights(self, topk_weights: Tensor, handle: TwoHopHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_weights`."""
        if topk_weights.shape != handle.shape:
            raise ValueError(f"topk_weights: expected {list(handle.shape)}, got {list(topk_weights.shape)}")
        arrived = self._transport.exchange([topk_weights.contiguous()], handle.routes)[0]
        with self._ranks_named():
            here = self._node.dispatch_weights(arrived, handle.node)
        return _reordered(here, handle.slots)

    def combine(self, rows: Tensor, handle: TwoHopHandle, layout: RowLayout = "expert_major") -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine`."""
        if rows.dim() != 2 or rows.shape[0] != handle.num_rows(layout):
            raise ValueError(
                f"rows: expected [{handle.num_rows(layout)}, hidden] as dispatched, got {list(rows.shape)}"
            )
        order = handle.order(layout)
        with self._ranks_named():
            here = self._node.combine(rows if order is None else rows[order.inverse], handle.node, layout)
        accumulate = torch.promote_types(rows.dtype, torch.float32)
        return self._sum_over_nodes(here, handle, accumulate).to(rows.dtype)

    def combine_weights(self, row_weights: Tensor, handle: TwoHopHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_weights`."""
        if row_weights.shape != (handle.segments.num_rows,):
            raise ValueError(f"row_weights: expected [{handle.segments.num_rows}], got {list(row_weights.shape)}")
        weights = row_weights if handle.slots is None else row_weights[handle.slots.inverse]
        with self._ranks_named():
            here = self._node.combine_weights(weights, handle.node)
        return self._sum_over_nodes(here, handle, row_weights.dtype)

    def _routes(self, counts: _Counts, tokens: Tensor) -> NodeRoutes:
        """Where ``tokens`` (int64 ``[sent]``, by node) go, and how many rows come."""
        topology = self.topology
        arriving = counts.nodes[topology.counterparts(self.rank), topology.node_of(self.rank)]
        return NodeRoutes(tokens, tuple(counts.nodes[self.rank].tolist()), tuple(arriving.tolist()))

    def _node_experts(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """int64, the experts of ``topk_idx`` among those of this rank's node, -1 for others."""
        here = num_experts // self.topology.nodes
        local = topk_idx.to(torch.int64) - self.topology.node_of(self.rank) * here
        return torch.where((local >= 0) & (local < here), local, -1)

    @contextmanager
    def _ranks_named(self) -> Iterator[None]:
        """Errors of the node's communicator name ranks of the node: say which of the group that is."""
        try:
            yield
        except PeerTimeoutError as error:
            node = self.topology.node_of(self.rank)
            rank = self.topology.ranks_of_node(node)[error.rank]
            raise PeerTimeoutError(f"node {node}, whose rank {error.rank} is rank {rank}: {error}", rank) from error

    def _sum_over_nodes(self, here: Tensor, handle: TwoHopHandle, accumulate: torch.dtype) -> Tensor:
        """Bring the node's sums back to their source ranks and add those of a token: ``[tokens, width]``."""
        returned = self._transport.exchange([here.contiguous()], handle.routes.back())[0]
        return sum_by_token(returned, handle.routes.send_counts, handle.tokens, handle.shape[0], accumulate)

    def _exchange_counts(self, to_nodes: SendLayout, to_ranks: SendLayout, signature: list[int]) -> _Counts:
        """Tell every rank what this one sends; the host waits for it."""
        header = torch.tensor(signature, dtype=torch.int64, device=to_nodes.tokens.device)
        parts = [to_nodes.rows_per_rank, to_ranks.rows_per_rank, to_ranks.rows_per_expert, header]
        mine = torch.cat(parts)
        mine = mine.to(staging_device(self.group, mine.device))
        everyone = mine.new_empty(self.size * mine.numel())
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        table = everyone.view(self.size, -1).cpu()
        nodes, ranks, experts, headers = table.split([part.numel() for part in parts], dim=1)
        for rank, line in enumerate(headers.tolist()):
            if line != signature:
                raise ValueError(
                    f"dispatch: rank {rank} of the group passed (hidden, top_k, dtype, weights, fp8) = {line}, "
                    f"rank {self.rank} {signature}: all ranks must agree"
                )
        return _Counts(nodes, ranks, experts)


def _order_on(device: torch.device, order: Tensor | None) -> _Order | None:
    if order is None:
        return None
    order = order.to(device)
    return _Order(order, inverse_of(order))


def _reordered(tensor: Tensor, order: _Order | None) -> Tensor:
    """A tensor in the order of the node's exchange, in the order of the contract."""
    if order is None:
        return tensor
    # FP8 dtypes lack most operations; as bytes they move like any other.
    data = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return data[order.of].view(tensor.dtype)


def _in_order(here: Dispatched, handle: TwoHopHandle, layout: RowLayout, rows_per_rank: Tensor) -> Dispatched:
    """What the node's exchange brought, as the contract wants it."""

    def reordered(tensor: Tensor | None, order: _Order | None) -> Tensor | None:
        return None if tensor is None else _reordered(tensor, order)

    row_of_slot = _reordered(here.row_of_slot, handle.slots)
    if handle.rows is not None:
        # Behind the last row there is none, which padding and garbage point at.
        places = torch.cat([handle.rows.inverse.to(torch.int32), row_of_slot.new_full((1,), -1)])
        known = (row_of_slot >= 0) & (row_of_slot < handle.received)
        row_of_slot = places[torch.where(known, row_of_slot, handle.received).long()]
    routing = None
    if here.routing is not None:
        topk_weights = reordered(here.routing.topk_weights, handle.rows)
        routing = ReceivedRouting(_reordered(here.routing.topk_idx, handle.rows), topk_weights, rows_per_rank)
    return Dispatched(
        rows=_reordered(here.rows, handle.order(layout)),
        scales=reordered(here.scales, handle.order(layout)),
        weights=reordered(here.weights, handle.slots),
        segments=handle.segments,
        row_of_slot=row_of_slot,
        handle=handle,
        routing=routing,
    )


def two_hop_communicator(
    group: dist.ProcessGroup,
    topology: Topology,
    node_communicator: Callable[[dist.ProcessGroup], Communicator],
    transport: Callable[[dist.ProcessGroup], NodeTransport],
) -> TwoHopCommunicator:
    """Form the groups of both hops and compose; collective over ``group``.

    Args:
        group: all ranks.
        topology: of these ranks.
        node_communicator: makes the communicator of a node's ranks.
        transport: makes the transport among the ranks in one place of every node.
    """
    rank = dist.get_rank(group)
    node, counterparts = (
        dist.new_group(
            [dist.get_global_rank(group, member) for member in members],
            backend=dist.get_backend(group),
            use_local_synchronization=True,  # ranks of other expert-parallel groups take no part
        )
        for members in (topology.ranks_of_node(topology.node_of(rank)), topology.counterparts(rank))
    )
    assert node is not None and counterparts is not None
    return TwoHopCommunicator(group, topology, node_communicator(node), transport(counterparts))
