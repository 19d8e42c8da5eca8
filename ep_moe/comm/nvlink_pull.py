"""The kernel of a dispatch that brings staged rows to their places: its arguments, its results and its launches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.communicator import RowLayout
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_handle import Places
from ep_moe.comm.nvlink_rows import RowSource
from ep_moe.comm.nvlink_wire import SHARED_BYTES
from ep_moe.comm.sm_budget import dispatch_sms

_MAX_WARPS, _MAX_STAGES = 8, 3


class Pull:
    """A dispatch that has been staged; made before the host waits for sizes, so that little is left to do then."""

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
            source: whose rows are staged, by the last work of the stream.
            places: where they go.
            layout: of the result.
            groups: of experts, one for each launch.
            num_sms: SMs that it may occupy; ``None`` for as many as are best.
            nodes: that tokens come from; ``None`` if they are this rank's own.
            early: beside the layout kernel ahead of staging.
        """
        wire, (slots, width) = source.wire, places.in_layout(layout)
        warps = max(min(SHARED_BYTES // (2 * wire.bytes), _MAX_WARPS), 1)
        self._core, self._source, self._places = core, source, places
        self._ranges = places.ranges(layout, groups)
        self._arguments = native.DispatchArgs(
            comm=core.arguments(num_sms or dispatch_sms(core.size, places.experts, places.top_k, layout)),
            slots=slots,
            counts=places.counts,
            ends=places.ends,
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=wire.scales,
            slot_tokens=places.slot_tokens,
            width=width,
            warps=warps,
            stages=min(SHARED_BYTES // (warps * wire.bytes), _MAX_STAGES),
            behind_staging=1,
            early=int(early),
        )
        if nodes is not None:
            self._arguments.nodes = nodes.arguments()

    def start(self, num_rows: int) -> tuple[Tensor, Tensor | None, Iterator[None]]:
        """Bring the rows as they are staged: those of the first group of experts, and by each step those of one more.

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
        arguments.behind_staging = arguments.early = 0
        return rows, scales, core.steps("dispatch", arguments, later, (rows, scales, self._places))
