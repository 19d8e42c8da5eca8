"""The kernel of a dispatch that brings staged rows to their places: its arguments, its results and its launches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

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
_SMS_THAT_STORE_IN_TIME = 48  # an expert-major result between two ranks as fast as the link brings it
_PEER_ROWS, _PEER_BYTES = 128, 950_000
"""Rows on their way from peers at once, and at least so many bytes. Fewer leave the links idle; more only queue, in
front of what other kernels load and of what peers wait for: staged rows and flags."""


@dataclass(frozen=True)
class Ring:
    """Where a block keeps rows between their load and their stores.

    Attributes:
        warps: of the block, each of which brings other rows.
        stages: rows that a warp has room for. One of them is being stored, the others are on their way.
    """

    warps: int
    stages: int


@functools.cache
def ring(layout: RowLayout, ranks: int, sms: int, row_bytes: int) -> Ring:
    """The ring of each of ``sms`` blocks, for rows of ``row_bytes`` as they travel between ``ranks``.

    Warps are an even number where memory allows, so that between two ranks half of them bring rows of the peer.
    """
    room, peers_share = SHARED_BYTES // row_bytes, 1 - 1 / ranks
    if ranks == 1 or layout == "expert_major":
        # Stores take an SM longer than loads, and on few SMs longer than the link: there, more of them in line.
        warps = max(min(room // 2, _MAX_WARPS), 1)
        one_each_suffices = sms >= _SMS_THAT_STORE_IN_TIME and sms * warps * row_bytes * peers_share >= _PEER_BYTES
        return Ring(warps, min(room // warps, 2 if one_each_suffices else _MAX_STAGES))
    under_way = max(_PEER_ROWS, _PEER_BYTES / row_bytes) / peers_share / sms
    stages = _MAX_STAGES if under_way >= _MAX_WARPS else 2
    warps = min(2 * max(round(under_way / (stages - 1) / 2), 1), _MAX_WARPS, max(room // stages, 1))
    return Ring(warps, min(room // warps, stages))


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
        self._core, self._source, self._places = core, source, places
        self._ranges = places.ranges(layout, groups)
        comm = core.arguments(num_sms or dispatch_sms(core.size, places.experts, places.top_k, layout))
        chosen = ring(layout, core.size, comm.blocks, wire.bytes)
        self._arguments = native.DispatchArgs(
            comm=comm,
            slots=slots,
            counts=places.counts,
            ends=places.ends,
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=wire.scales,
            slot_tokens=places.slot_tokens,
            width=width,
            warps=chosen.warps,
            stages=chosen.stages,
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
