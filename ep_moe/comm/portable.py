"""Expert-parallel exchange over ``torch.distributed`` alone: gloo on CPUs, NCCL on GPUs.

The plainest correct implementation of the :class:`~ep_moe.comm.communicator.Communicator` contract and the
oracle for the faster ones. Sizes are exchanged first and read on the host once per dispatch; then rows travel
by uneven all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ep_moe.comm.all_to_all import all_to_all_rows
from ep_moe.comm.communicator import (
    SIGNATURE,
    Dispatched,
    ExpertSegments,
    ReceivedRouting,
    RowLayout,
    check_dispatch_shapes,
    check_expert_range,
    check_options,
    check_signature,
    exchange_signature,
    too_many_rows,
)
from ep_moe.comm.fp8 import quantize_e4m3
from ep_moe.comm.layout import ExpertLayout, SendLayout, expert_layout, send_layout, sum_by_token
from ep_moe.comm.undivided import UndividedExchanges

_COUNTS_STEP = 1024  # more local experts than anybody has


@dataclass(frozen=True)
class PortableHandle:
    """The routes of one dispatch.

    Attributes:
        shape: ``(tokens, top_k)`` at this rank.
        send: which (token, rank) pairs left this rank.
        send_counts: rows to each rank.
        recv_counts: rows from each rank.
        received: rows of a tensor in the layout ``rows``; more than arrived if there is room for more.
        experts: where the arrived rows lie in the expert-major tensor.
        segments: of the expert-major tensor as it was handed out.
    """

    shape: tuple[int, int]
    send: SendLayout
    send_counts: list[int]
    recv_counts: list[int]
    received: int
    experts: ExpertLayout
    segments: ExpertSegments

    def num_rows(self, layout: RowLayout) -> int:
        """Rows of a tensor in ``layout``."""
        return self.received if layout == "rows" else self.segments.num_rows


class PortableCommunicator(UndividedExchanges):
    """A :class:`~ep_moe.comm.communicator.Communicator` over collectives of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

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
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch`.

        The host learns the sizes also with ``max_rows``; gloo and NCCL have SM settings of their own.
        """
        check_options(layout, alignment, max_rows, num_sms)
        check_dispatch_shapes(x, topk_idx, topk_weights, num_experts, self.size, scales=scales, fp8=fp8)
        check_expert_range(topk_idx, num_experts)
        payload = [*quantize_e4m3(x)] if fp8 else [x] if scales is None else [x, scales]
        send = send_layout(topk_idx, num_experts, self.size)
        signature = [*exchange_signature(x, topk_idx, topk_weights, fp8), num_experts]
        send_counts, recv_counts, expert_counts = self._exchange_counts(send, signature)
        local_experts = self._exchange(send.local_experts, send_counts, recv_counts)
        experts = expert_layout(local_experts, expert_counts, alignment)
        segments, slots, received = experts.segments, experts.segments.num_rows, sum(recv_counts)
        needed = received if layout == "rows" else slots
        if max_rows is not None:
            room = max(max_rows, needed)
            slots, received = (slots, room) if layout == "rows" else (room, received)
            segments = ExpertSegments(segments.counts, segments.ends, None, slots)
        shape = (topk_idx.shape[0], topk_idx.shape[1])
        handle = PortableHandle(shape, send, send_counts, recv_counts, received, experts, segments)
        arrived, *arrived_scales = (self._spread(tensor, handle, layout) for tensor in payload)
        weights, arrived_weights = None, None
        if topk_weights is not None:
            arrived_weights = self._exchange(topk_weights[send.tokens], send_counts, recv_counts)
            weights = self._by_slot(arrived_weights, handle)
        if max_rows is not None and needed > max_rows:  # only now: the other ranks expect this rank's messages
            raise too_many_rows(max_rows, needed, self.rank)
        row_of_slot = torch.full((segments.num_rows,), -1, dtype=torch.int32, device=x.device)
        row_of_slot[experts.slots] = (experts.entries // handle.shape[1]).to(torch.int32)
        routing = None
        if layout == "rows":
            routing = ReceivedRouting(
                topk_idx=_with_room(local_experts.to(torch.int64), received, -1),
                topk_weights=None
                if arrived_weights is None
                else _with_room(torch.where(local_experts < 0, 0, arrived_weights), received),
                rows_per_rank=torch.tensor(recv_counts, dtype=torch.int64, device=x.device),
            )
        return Dispatched(
            rows=arrived,
            scales=arrived_scales[0] if arrived_scales else None,
            weights=weights,
            segments=segments,
            row_of_slot=row_of_slot,
            handle=handle,
            routing=routing,
        )

    def dispatch_cached(self, x: Tensor, handle: PortableHandle, layout: RowLayout = "expert_major") -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached`."""
        if x.dim() != 2 or x.shape[0] != handle.shape[0]:
            raise ValueError(f"x: expected [{handle.shape[0]}, hidden] as in the dispatch, got {list(x.shape)}")
        return self._spread(x, handle, layout)

    def dispatch_weights(self, topk_weights: Tensor, handle: PortableHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_weights`."""
        if topk_weights.shape != handle.shape:
            raise ValueError(f"topk_weights: expected {list(handle.shape)}, got {list(topk_weights.shape)}")
        arrived = self._exchange(topk_weights[handle.send.tokens], handle.send_counts, handle.recv_counts)
        return self._by_slot(arrived, handle)

    def combine(
        self, rows: Tensor, handle: PortableHandle, layout: RowLayout = "expert_major", *, behind_gemms: bool = False
    ) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine`."""
        if rows.dim() != 2 or rows.shape[0] != handle.num_rows(layout):
            raise ValueError(
                f"rows: expected [{handle.num_rows(layout)}, hidden] as dispatched, got {list(rows.shape)}"
            )
        accumulate = torch.promote_types(rows.dtype, torch.float32)
        partial = rows[: sum(handle.recv_counts)] if layout == "rows" else self._sum_slots(rows, handle, accumulate)
        returned = self._exchange(partial, handle.recv_counts, handle.send_counts)
        return _sum(returned, handle, accumulate).to(rows.dtype)

    def _by_slot(self, arrived_weights: Tensor, handle: PortableHandle) -> Tensor:
        """Weights ``[received, top_k]`` as ``[num_rows]``, 0 for padding."""
        row_weights = arrived_weights.new_zeros(handle.segments.num_rows)
        row_weights[handle.experts.slots] = arrived_weights.flatten()[handle.experts.entries]
        return row_weights

    def _sum_slots(self, rows: Tensor, handle: PortableHandle, accumulate: torch.dtype) -> Tensor:
        """The sum of each received token's slots, rounded once: ``[received, hidden]``."""
        slot_of = handle.experts.slot_of
        partial = rows.new_zeros((slot_of.shape[0], rows.shape[1]), dtype=accumulate)
        if rows.shape[0]:
            for slots in slot_of.unbind(1):
                # `where`, not a product: rows of other tokens may hold NaN or infinity.
                partial += torch.where((slots >= 0)[:, None], rows[slots.clamp(min=0)], 0).to(accumulate)
        return partial.to(rows.dtype)

    def combine_weights(self, row_weights: Tensor, handle: PortableHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_weights`."""
        experts = handle.experts
        if row_weights.shape != (handle.segments.num_rows,):
            raise ValueError(f"row_weights: expected [{handle.segments.num_rows}], got {list(row_weights.shape)}")
        by_entry = row_weights.new_zeros(experts.slot_of.shape)
        by_entry.view(-1)[experts.entries] = row_weights[experts.slots]
        returned = self._exchange(by_entry, handle.recv_counts, handle.send_counts)
        return _sum(returned, handle, row_weights.dtype)

    def _exchange_counts(self, send: SendLayout, signature: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Tell every rank how many rows it will get, in all and per expert; the only wait of the host."""
        header = torch.tensor(signature, dtype=torch.int64, device=send.tokens.device).expand(self.size, -1)
        counts = send.rows_per_expert.view(self.size, -1)
        local_experts, first = counts.shape[1], 1 + len(signature)
        table = torch.cat([send.rows_per_rank[:, None], header, counts], dim=1)
        # Of one size whatever num_experts is: back ends end the process where ranks disagree on that of a message.
        message = pad(table, (0, -local_experts % _COUNTS_STEP))
        arrived = self._exchange(message, [1] * self.size, [1] * self.size)[:, : table.shape[1]]
        sent, received = torch.stack([table, arrived]).tolist()
        for rank, line in enumerate(received):
            check_signature(rank, line[1:first], self.rank, signature, (*SIGNATURE, "num_experts"))
        expert_counts = [sum(line[first + expert] for line in received) for expert in range(local_experts)]
        return [line[0] for line in sent], [line[0] for line in received], expert_counts

    def _spread(self, x: Tensor, handle: PortableHandle, layout: RowLayout) -> Tensor:
        """Send rows along the routes of ``handle`` and lay them out."""
        experts = handle.experts
        # FP8 dtypes lack most operations; as bytes they move like any other.
        data = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        arrived = self._exchange(data[handle.send.tokens], handle.send_counts, handle.recv_counts)
        if layout == "rows":
            return _with_room(arrived, handle.received).view(x.dtype)
        rows = data.new_zeros((handle.segments.num_rows, data.shape[1]))
        rows[experts.slots] = arrived[experts.entries // handle.shape[1]]
        return rows.view(x.dtype)

    def _exchange(self, rows: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        return all_to_all_rows(rows, send_counts, recv_counts, self.group)


def _sum(returned: Tensor, handle: PortableHandle, accumulate: torch.dtype) -> Tensor:
    """What came back for each token, added over the ranks: ``[tokens, width]``."""
    return sum_by_token(returned.split(handle.send_counts), handle.send.tokens, handle.shape[0], accumulate)


def _with_room(rows: Tensor, num_rows: int, fill: int = 0) -> Tensor:
    """``rows``, and ``fill`` behind them up to ``num_rows``."""
    missing = num_rows - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows.new_full((missing, rows.shape[1]), fill)])
