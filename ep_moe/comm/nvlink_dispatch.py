"""The kernel of a dispatch that brings rows to their places: its arguments, its results and its launches."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.communicator import RowLayout
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_handle import Places
from ep_moe.comm.nvlink_rows import RowSource
from ep_moe.comm.nvlink_wire import SHARED_BYTES, Ring
from ep_moe.comm.sm_budget import dispatch_sms
from ep_moe.native import pointer

_MAX_WARPS, _MAX_STAGES = 8, 3  # of dispatch.cu
_SMS_THAT_STORE_IN_TIME = 48  # an expert-major result between two ranks as fast as the link brings it


@functools.cache
def dispatch_ring(sms: int, row_bytes: int) -> Ring:
    """The ring of each of ``sms`` blocks, for rows of ``row_bytes`` as they travel.

    Of the stages of a warp one is being stored, the others are loaded; on few SMs, which store for longer than the link
    brings rows, more of them wait in line.
    """
    room = SHARED_BYTES // row_bytes
    warps = max(min(room // 2, _MAX_WARPS), 1)
    return Ring(warps, min(room // warps, 2 if sms >= _SMS_THAT_STORE_IN_TIME else _MAX_STAGES))


class RowDispatch:
    """A dispatch whose rows are sent; made before the host waits for sizes, so that little is left to do then."""

    def __init__(
        self,
        core: NvlinkCore,
        source: RowSource,
        places: Places,
        layout: RowLayout,
        groups: int,
        num_sms: int | None,
        nodes: NodeChunks | None,
        *,
        early: bool,
    ) -> None:
        """Prepare.

        Args:
            core: of the communicator that dispatches.
            source: whose rows are sent, by the last work of the stream.
            places: where they go.
            layout: of the result.
            groups: of experts, one for each launch.
            num_sms: SMs that it may occupy; ``None`` for as many as are best.
            nodes: that tokens come from; ``None`` if they are this rank's own.
            early: beside the layout kernel ahead of that.
        """
        wire, (slots, width) = source.wire, places.in_layout(layout)
        self._core, self._source, self._places = core, source, places
        self._ranges = places.ranges(layout, groups)
        comm = core.arguments(num_sms or dispatch_sms(core.size, places.experts, places.top_k, layout))
        ring = dispatch_ring(comm.blocks, wire.bytes)
        self._arguments = native.DispatchArgs(
            comm=comm,
            slots=slots,
            counts=places.counts,
            ends=places.ends,
            own_rows=pointer(source.in_place),
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=wire.scales,
            slot_tokens=places.slot_tokens,
            width=width,
            warps=ring.warps,
            stages=ring.stages,
            behind_push=1,
            early=int(early),
        )
        if nodes is not None:
            self._arguments.nodes = nodes.arguments()

    def start(self, num_rows: int) -> tuple[Tensor, Tensor | None, Iterator[None]]:
        """Bring the rows as they arrive: those of the first group of experts, and by each step those of one more.

        Returns:
            ``[num_rows, hidden]``, their scales if they have any, and the steps.

        Raises:
            torch.OutOfMemoryError: if there is no room for these.
        """
        core, source, arguments = self._core, self._source, self._arguments
        scales = None
        rows = torch.empty(num_rows, source.hidden, dtype=source.dtype, device=core.device)
        if arguments.row_scales:
            scales = torch.empty(num_rows, arguments.row_scales, dtype=torch.float32, device=core.device)
            arguments.scales = scales.data_ptr()
        arguments.rows, arguments.num_rows = rows.data_ptr(), num_rows
        arguments.range, *later = self._ranges
        core.launch("dispatch", arguments)
        arguments.behind_push = arguments.early = 0
        return rows, scales, core.steps("dispatch", arguments, later, (rows, scales, source, self._places))
