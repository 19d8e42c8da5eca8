"""Stand-ins, on CPUs, for the kernels whose hops overlap: what they leave behind, without what happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import Dispatched, PortableCommunicator, RowLayout
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_layout import KnownSizes
from ep_moe.comm.nvlink_rows import RowSource
from ep_moe.comm.nvlink_sums import Summed
from ep_moe.comm.nvlink_wire import WireFormat
from ep_moe.comm.portable import PortableHandle
from ep_moe.comm.symmetric_transport import Spans
from ep_moe.comm.transport import NodeRoutes, PortableTransport


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


class TransportDouble:
    """A ``SymmetricTransport`` over ``torch.distributed``."""

    blocks = 16

    def __init__(self, counterparts: dist.ProcessGroup) -> None:
        self._portable = PortableTransport(counterparts)
        self._node = dist.get_rank(counterparts)
        self.staged: list[Tensor] = []
        self.exchanges = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...

    def reserve(self, tensors: Sequence[Tensor]) -> None: ...

    def check(self) -> None: ...

    def move(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], tokens: Tensor | None, send: Spans, recv: Spans
    ) -> None:
        self.exchanges += 1
        rows = torch.cat(
            [torch.arange(first, first + count) for first, count in zip(send.first, send.counts, strict=True)]
        )
        routes = NodeRoutes(rows if tokens is None else tokens[rows], send.counts, recv.counts)
        for tensor, target in zip(tensors, out, strict=True):
            arrived = self._portable.exchange([tensor], routes)[0].split(recv.counts)
            for first, part in zip(recv.first, arrived, strict=True):
                _as_bytes(target)[first : first + len(part)] = _as_bytes(part)

    def stage(
        self,
        tensors: Sequence[Tensor],
        columns: Sequence[int],
        tokens: Tensor | None,
        send: Spans,
        recv: Spans,
        *,
        comm: int,
        row_bytes: int,
        early: bool,
    ) -> None:
        self.staged = [tensor.new_empty(comm, tensor.shape[1]) for tensor in tensors]
        self.move(tensors, self.staged, tokens, send, recv)

    def send_summed(self, summed: Summed, out: Tensor, send: Spans, recv: Spans) -> None:
        counts = [0 if node == self._node else count for node, count in enumerate(send.counts)]
        self.move([summed.out], [out], None, Spans(send.first, tuple(counts)), recv)


@dataclass(frozen=True)
class _Handle:
    portable: PortableHandle
    places: dict[RowLayout, Tensor]  # of each slot or row of the portable exchange

    def num_rows(self, layout: RowLayout) -> int:
        return self.portable.num_rows(layout)


def any_device(x: Tensor, dtypes: object, *, scaled: bool) -> WireFormat:
    """``wire_format`` of rows that need not be on a GPU."""
    hidden = x.shape[1]
    return WireFormat(hidden, hidden // 128) if scaled else WireFormat(hidden * x.element_size(), 0)


class NodeDouble:
    """An ``NvlinkCommunicator`` for tokens from nodes: the portable one, whose rows are then shifted."""

    device = torch.device("cpu")

    def __init__(self, group: dist.ProcessGroup, transport: TransportDouble) -> None:
        self._portable, self._transport = PortableCommunicator(group), transport
        self.rank = self._portable.rank
        self._tokens = 0

    def check_limits(self, topk_idx: Tensor, num_experts: int, max_rows: int | None) -> None: ...

    def arguments(self, num_sms: int) -> int:
        """What the double of the transport asks for: places for tokens."""
        return self._tokens

    def dispatch_from_nodes(
        self,
        rows: RowSource,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        nodes: NodeChunks,
        sizes: KnownSizes,
        **options: Any,
    ) -> Dispatched:
        assert topk_idx.shape[0] == nodes.tokens <= nodes.most_tokens
        options.pop("num_sms")
        values, *scales = self._stage(rows, nodes.tokens)
        here = self._portable.dispatch(values, topk_idx, topk_weights, scales=scales[0] if scales else None, **options)
        # The kernels are told these, and make just as much room.
        assert list(sizes.slots) == here.segments.counts.tolist() and sizes.received == sum(here.handle.recv_counts)
        layouts: tuple[RowLayout, ...] = ("expert_major", "rows")
        places = {layout: self._places(here, nodes, layout) for layout in layouts}
        slots, received = places["expert_major"], places["rows"]
        arrived = places[options["layout"]]
        row_of_slot = torch.cat([received, received.new_full((1,), -1)])[here.row_of_slot].to(torch.int32)
        routing = here.routing
        if routing is not None:
            weights = None if routing.topk_weights is None else _moved(routing.topk_weights, received)
            routing = replace(routing, topk_idx=_moved(routing.topk_idx, received), topk_weights=weights)
        return replace(
            here,
            rows=_moved(here.rows, arrived),
            scales=None if here.scales is None else _moved(here.scales, arrived),
            weights=None if here.weights is None else _moved(here.weights, slots),
            row_of_slot=_moved(row_of_slot, slots),
            handle=_Handle(here.handle, places),
            routing=routing,
        )

    def dispatch_cached_from_nodes(self, rows: RowSource, handle: _Handle, layout: RowLayout) -> Tensor:
        staged = self._stage(rows, handle.portable.shape[0])[0]
        return _moved(self._portable.dispatch_cached(staged, handle.portable, layout), handle.places[layout])

    def dispatch_weights(self, topk_weights: Tensor, handle: _Handle) -> Tensor:
        return _moved(self._portable.dispatch_weights(topk_weights, handle.portable), handle.places["expert_major"])

    def combine_to_nodes(
        self, rows: Tensor, handle: _Handle, layout: RowLayout, send: Callable[[Summed], None], *, leave_sms: int
    ) -> Tensor:
        out = self._portable.combine(rows[handle.places[layout]], handle.portable, layout)
        send(Summed(out, out, 1))
        return out

    def combine_weights(self, row_weights: Tensor, handle: _Handle) -> Tensor:
        return self._portable.combine_weights(row_weights[handle.places["expert_major"]], handle.portable)

    def _stage(self, rows: RowSource, tokens: int) -> list[Tensor]:
        self._tokens = tokens
        rows.send(self, early=False, quantizes=False)  # type: ignore[arg-type]
        return self._transport.staged

    def _places(self, here: Dispatched, nodes: NodeChunks, layout: RowLayout) -> Tensor:
        """int64, where each row of the portable exchange belongs: its place, shifted by its bin, rank and node."""
        ranks, bins = self._portable.size, here.segments.counts.numel() + 1
        starts = ranks * (nodes.nodes + 1)
        first = nodes.table[:starts].view(ranks, nodes.nodes + 1)[self.rank].long()
        shifts = torch.zeros(ranks * nodes.nodes, bins, dtype=torch.int64)
        if nodes.shifts is not None:
            shifts = nodes.table[starts:].view_as(shifts).long()
        # Every token says where it comes from.
        node = torch.searchsorted(first, torch.arange(nodes.tokens), right=True) - 1
        source = (self.rank * nodes.nodes + node).double()[:, None]
        source = self._portable.dispatch_cached(source, here.handle, layout)[:, 0].long()
        place = torch.arange(source.numel())
        if layout == "rows":
            real, bin = place < sum(here.handle.recv_counts), torch.full_like(place, bins - 1)
        else:
            ends, counts = here.segments.ends.long(), here.segments.counts
            bin = torch.searchsorted(ends, place, right=True).clamp(max=bins - 2)
            real = place - torch.cat([ends.new_zeros(1), ends])[bin] < counts[bin]
        return torch.where(real, place + shifts[source, bin], place)


def _moved(tensor: Tensor, places: Tensor) -> Tensor:
    """``tensor`` with its row ``i`` at ``places[i]``."""
    out = torch.empty_like(tensor)
    _as_bytes(out)[places] = _as_bytes(tensor)
    return out
