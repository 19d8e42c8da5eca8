"""Expert-parallel exchange between GPUs of one host by our own CUDA kernels over symmetric memory.

The kernels and the argument why they are safe are in ``csrc/``; this file allocates results, fills in arguments and
launches on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.communicator import Dispatched, ExpertSegments, RowLayout, check_dispatch_shapes, check_options
from ep_moe.comm.expert_groups import expert_groups
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_dispatch import RowDispatch, send_rows
from ep_moe.comm.nvlink_handle import NvlinkHandle
from ep_moe.comm.nvlink_layout import HostCounts, KnownSizes, RowPlaces, lay_out
from ep_moe.comm.nvlink_rows import LocalRows, RowSource
from ep_moe.comm.nvlink_sums import SumFlags, Summed
from ep_moe.comm.nvlink_wire import ELEMENTS, aligned, wire_format
from ep_moe.comm.sm_budget import combine_sms

_WEIGHTS_SMS = 64  # one value a thread at usual sizes: they wait more than they move


class NvlinkCommunicator:
    """A :class:`~ep_moe.comm.communicator.Communicator` for CUDA tensors of GPUs that can access each other.

    Operations of one communicator are ordered: each waits on its stream for the one before, whatever stream that ran
    on, and all ranks must issue them in the same order, as with any collective. So layers may share a communicator.
    All of them can be captured in a CUDA graph, dispatch if it is given ``max_rows``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        max_tokens: int | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Prepare; buffers are allocated by the first dispatch.

        Args:
            group: ranks, at most 8, each with a GPU of this host (several may share one).
            device: this rank's GPU.
            max_tokens: most tokens a rank will bring; ``None`` takes the largest number of the first dispatch. A
                dispatch of more makes the buffers grow, unless it has ``max_rows``.
            timeout_s: longest wait for a peer.

        Raises:
            NativeLibraryError: if the CUDA library is missing.
            ValueError: for a group of more than 8 ranks.
        """
        self._core = NvlinkCore(group, device, max_tokens=max_tokens, timeout_s=timeout_s)
        self.group = group
        self.rank = self._core.rank
        self.size = self._core.size
        self.device = device
        self._host_counts = HostCounts(self._core)
        self._sum_flags = SumFlags()

    @property
    def symmetric_bytes(self) -> int:
        """Size of this rank's symmetric buffer; 0 before the first dispatch."""
        return self._core.symmetric_bytes

    def check(self) -> None:
        """Raise what kernels have reported so far, without waiting for running ones; see :class:`NvlinkCore`."""
        self._core.check()

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None, **options: Any) -> Dispatched:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch`; routing weights travel as fp32.

        The range of ``topk_idx`` is checked on the GPU: its error comes with the sizes, before rows are sent, or, with
        ``max_rows``, by a later call.
        """
        return self.dispatch_in_groups(x, topk_idx, topk_weights, groups=1, **options)[0]

    def dispatch_in_groups(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        groups: int,
        num_experts: int,
        scales: Tensor | None = None,
        fp8: bool = False,
        **options: Any,
    ) -> tuple[Dispatched, Iterator[None]]:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_in_groups`; a launch a group."""
        check_dispatch_shapes(x, topk_idx, topk_weights, num_experts, self.size, scales=scales, fp8=fp8)
        topk_idx = topk_idx.contiguous()
        rows = LocalRows(x, topk_idx, num_experts, scales, fp8=fp8)
        return self._dispatch(rows, topk_idx, topk_weights, groups=groups, num_experts=num_experts, **options)

    def dispatch_from_nodes(
        self,
        rows: RowSource,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        nodes: NodeChunks,
        sizes: KnownSizes,
        **options: Any,
    ) -> Dispatched:
        """:meth:`dispatch` of tokens that come from nodes, while they come; rows are ordered by their source ranks.

        The host waits for nothing: it has learnt the sizes from the nodes.

        Args:
            rows: of the tokens, with a place for each of ``nodes.tokens``.
            topk_idx: int64 ``[nodes.tokens, top_k]``, expert of this node or -1; all are in range.
            topk_weights: ``[nodes.tokens, top_k]`` or ``None``.
            nodes: that tokens come from; the same on all ranks but for this rank's part.
            sizes: of what arrives here.
            **options: as of :meth:`dispatch`, without ``scales`` and ``fp8``.
        """
        core, topk_idx = self._core, topk_idx.contiguous()
        core.reserve(nodes.most_tokens, topk_idx.shape[1], rows.wire.bytes, self._row_places(nodes))
        if nodes.most_tokens > core.max_tokens:
            core.grow(nodes.most_tokens)
        return self._dispatch(rows, topk_idx, topk_weights, groups=1, nodes=nodes, sizes=sizes, **options)[0]

    def _dispatch(
        self,
        source: RowSource,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        *,
        groups: int,
        num_experts: int,
        nodes: NodeChunks | None = None,
        sizes: KnownSizes | None = None,
        layout: RowLayout = "expert_major",
        alignment: int = 1,
        max_rows: int | None = None,
        num_sms: int | None = None,
    ) -> tuple[Dispatched, Iterator[None]]:
        check_options(layout, alignment, max_rows, num_sms)
        self.check_limits(topk_idx, num_experts, max_rows)
        tokens, top_k = topk_idx.shape
        core, local_experts = self._core, num_experts // self.size
        expert_groups(local_experts, groups)
        core.reserve(tokens, top_k, source.wire.bytes, self._row_places(nodes))
        with core:
            while True:
                places = lay_out(
                    core,
                    topk_idx,
                    topk_weights,
                    num_experts=num_experts,
                    layout=layout,
                    alignment=alignment,
                    max_rows=max_rows,
                    host_counts=self._host_counts,
                    nodes=nodes,
                    sizes=sizes,
                )
                # Sending needs no sizes: it runs beside the layout and while the host waits for them.
                sent = send_rows(core, source, places.tokens, layout, num_sms, early=True)
                try:
                    kernel = RowDispatch(core, sent, places.tokens, groups, nodes)
                    most_tokens, received, segments = self._arriving(places, max_rows, sizes, local_experts, alignment)
                    if most_tokens <= core.max_tokens:
                        slots = segments.num_rows
                        rows, row_scales, steps = kernel.start(received if layout == "rows" else slots)
                        break
                    core.grow(most_tokens)  # all ranks have learnt the same number
                except Exception:
                    core.skip_dispatch()
                    raise
        dtype = None if topk_weights is None else topk_weights.dtype
        weights, routing = places.weights(slots, dtype), places.routing(received, dtype)
        routes = NvlinkHandle(num_sms, topk_idx, places.tokens, segments, received, nodes)
        return Dispatched(rows, row_scales, weights, segments, places.row_of_slot(slots), routes, routing), steps

    def _row_places(self, nodes: NodeChunks | None) -> int:
        """For the rows of a dispatch: of every rank that pushes, or two copies of those from ``nodes``."""
        return self.size if nodes is None else 2

    def _arriving(
        self, places: RowPlaces, max_rows: int | None, sizes: KnownSizes | None, local_experts: int, alignment: int
    ) -> tuple[int, int, ExpertSegments]:
        """The most tokens of a rank, or 0 where buffers are large enough for it; rows there are; and their segments.

        With ``max_rows`` there are as many as there is room for; otherwise the host knows ``sizes``, or waits for them.
        """
        if max_rows is not None:
            return 0, places.max_received, ExpertSegments(places.counts, places.ends, None, places.max_slots)
        most_tokens, found = (0, sizes) if sizes is not None else self._host_counts.wait(local_experts)
        return most_tokens, found.received, ExpertSegments(places.counts, places.ends, found.padded(alignment))

    def dispatch_cached(self, x: Tensor, handle: NvlinkHandle, layout: RowLayout = "expert_major") -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached`; rows of e4m3 may travel too."""
        return self._dispatch_cached(self._rows_of(x, handle), handle, layout, 1)[0]

    def dispatch_cached_from_nodes(
        self, rows: RowSource, handle: NvlinkHandle, layout: RowLayout = "expert_major"
    ) -> Tensor:
        """:meth:`dispatch_cached` along the routes of :meth:`dispatch_from_nodes`, of ``rows`` likewise."""
        return self._dispatch_cached(rows, handle, layout, 1)[0]

    def dispatch_cached_in_groups(self, x: Tensor, handle: NvlinkHandle, groups: int) -> tuple[Tensor, Iterator[None]]:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_cached_in_groups`."""
        return self._dispatch_cached(self._rows_of(x, handle), handle, "expert_major", groups)

    def _rows_of(self, x: Tensor, handle: NvlinkHandle) -> LocalRows:
        if x.dim() != 2 or x.shape[0] != handle.tokens:
            raise ValueError(f"x: expected [{handle.tokens}, hidden] as in the dispatch, got {list(x.shape)}")
        return LocalRows(x, handle.topk_idx, handle.places.experts * self.size)

    def _dispatch_cached(
        self, source: RowSource, handle: NvlinkHandle, layout: RowLayout, groups: int
    ) -> tuple[Tensor, Iterator[None]]:
        core = self._core
        core.reserve(handle.tokens, handle.top_k, source.wire.bytes, self._row_places(handle.nodes))
        with core:
            sent = send_rows(core, source, handle.places, layout, handle.num_sms, early=False)
            try:
                kernel = RowDispatch(core, sent, handle.places, groups, handle.nodes)
                rows, _, steps = kernel.start(handle.num_rows(layout))
            except Exception:
                core.skip_dispatch()
                raise
        return rows, steps

    def dispatch_weights(self, topk_weights: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.dispatch_weights`."""
        if topk_weights.shape != (handle.tokens, handle.top_k):
            raise ValueError(f"topk_weights: expected {[handle.tokens, handle.top_k]}, got {list(topk_weights.shape)}")
        slots = torch.zeros(handle.segments.num_rows, dtype=torch.float32, device=self.device)
        self._exchange_weights(topk_weights.float().contiguous(), slots, handle, native.TO_SLOTS)
        return slots.to(topk_weights.dtype)

    def combine(
        self, rows: Tensor, handle: NvlinkHandle, layout: RowLayout = "expert_major", *, behind_gemms: bool = False
    ) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine`."""
        out, steps = self._combine(rows, handle, layout, 1, behind_gemms)
        next(steps)
        return out

    def combine_in_groups(self, rows: Tensor, handle: NvlinkHandle, groups: int) -> tuple[Tensor, Iterator[None]]:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_in_groups`; a launch a group."""
        return self._combine(rows, handle, "expert_major", groups)

    def combine_to_nodes(
        self,
        rows: Tensor,
        handle: NvlinkHandle,
        layout: RowLayout,
        send: Callable[[Summed], None],
        *,
        leave_sms: int,
    ) -> Tensor:
        """:meth:`combine` of tokens that came from nodes; ``send`` launches the kernel that takes sums on.

        Args:
            rows: as of :meth:`combine`.
            handle: of :meth:`dispatch_from_nodes`.
            layout: of ``rows``.
            send: to launch beside this, as the next work of the stream.
            leave_sms: SMs for that; a block of combine takes the whole of one.
        """
        out, arguments = self._combine_arguments(rows, handle, layout)
        assert handle.nodes is not None
        core = self._core
        with core:
            summed = self._sum_flags.next(core, out)
            arguments.comm.blocks = max(min(arguments.comm.blocks, core.multiprocessors - leave_sms), 1)
            arguments.nodes = handle.nodes.arguments()
            arguments.summed, arguments.epoch = summed.flags.data_ptr(), summed.epoch
            core.launch("combine", arguments)
            send(summed)
        return out

    def _combine(
        self, rows: Tensor, handle: NvlinkHandle, layout: RowLayout, groups: int, behind_gemms: bool = False
    ) -> tuple[Tensor, Iterator[None]]:
        rows = aligned(rows)
        out, arguments = self._combine_arguments(rows, handle, layout, behind_gemms)
        return out, self._core.steps("combine", arguments, handle.places.ranges(layout, groups), (rows, out, handle))

    def _combine_arguments(
        self, rows: Tensor, handle: NvlinkHandle, layout: RowLayout, behind_gemms: bool = False
    ) -> tuple[Tensor, native.CombineArgs]:
        """The result, and the arguments that fill it; of contiguous ``rows``."""
        expected = handle.num_rows(layout)
        if rows.dim() != 2 or rows.shape[0] != expected:
            raise ValueError(f"rows: expected [{expected}, hidden] as dispatched, got {list(rows.shape)}")
        wire = wire_format(rows, ELEMENTS, scaled=False)
        num_sms = handle.num_sms or combine_sms(
            self.size, handle.places.experts, handle.top_k, layout, behind_gemms=behind_gemms
        )
        self._core.reserve(handle.tokens, handle.top_k, wire.bytes)
        out = torch.empty(handle.tokens, rows.shape[1], dtype=rows.dtype, device=self.device)
        slots, width = handle.places.in_layout(layout)
        arguments = native.CombineArgs(
            comm=self._core.arguments(num_sms),
            slots=slots,
            owners=handle.places.owners,
            rows=rows.data_ptr(),
            out=out.data_ptr(),
            topk_idx=handle.topk_idx.data_ptr(),
            ends=handle.places.ends,
            row_bytes=wire.row_bytes,
            element=ELEMENTS[rows.dtype],
            tokens=handle.tokens,
            slot_tokens=handle.places.slot_tokens,
            width=width,
        )
        return out, arguments

    def combine_weights(self, row_weights: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_weights`."""
        if row_weights.shape != (handle.segments.num_rows,):
            raise ValueError(f"row_weights: expected [{handle.segments.num_rows}], got {list(row_weights.shape)}")
        out = torch.empty(handle.tokens, handle.top_k, dtype=torch.float32, device=self.device)
        self._exchange_weights(out, row_weights.float().contiguous(), handle, native.FROM_SLOTS)
        return out.to(row_weights.dtype)

    def combine_received(self, values: Tensor, handle: NvlinkHandle) -> Tensor:
        """See :meth:`ep_moe.comm.communicator.Communicator.combine_received`."""
        expected = [handle.num_received, handle.top_k]
        if values.dtype != torch.float32 or list(values.shape) != expected:
            raise ValueError(f"values: expected torch.float32 {expected}, got {values.dtype} {list(values.shape)}")
        out = torch.empty(handle.tokens, handle.top_k, dtype=torch.float32, device=self.device)
        self._exchange_weights(out, values.contiguous(), handle, native.SUMS)
        return out

    def check_limits(self, topk_idx: Tensor, num_experts: int, max_rows: int | None) -> None:
        """Raise ``ValueError`` unless kernels take so many experts, and a dispatch without ``max_rows`` now."""
        if topk_idx.shape[1] > native.MAX_TOP_K:
            raise ValueError(f"topk_idx: expected top_k of at most {native.MAX_TOP_K}, got {topk_idx.shape[1]}")
        if num_experts > native.MAX_EXPERTS:
            raise ValueError(f"num_experts: expected at most {native.MAX_EXPERTS}, got {num_experts}")
        if max_rows is None and torch.cuda.is_current_stream_capturing():
            raise ValueError("max_rows: must be given while a CUDA graph is captured, for the host cannot learn sizes")

    def _exchange_weights(self, by_token: Tensor, by_row: Tensor, handle: NvlinkHandle, direction: int) -> None:
        with self._core:
            arguments = native.WeightsArgs(
                comm=self._core.arguments(min(handle.num_sms or _WEIGHTS_SMS, _WEIGHTS_SMS)),
                slots=handle.places.rows if direction == native.SUMS else handle.places.slots,
                topk_idx=handle.topk_idx.data_ptr(),
                owners=handle.places.owners,
                by_token=by_token.data_ptr(),
                by_row=by_row.data_ptr(),
                tokens=handle.tokens,
                top_k=handle.top_k,
                experts_per_rank=handle.places.experts,
                direction=direction,
                slot_tokens=handle.places.slot_tokens,
            )
            self._core.launch("weights", arguments)
