"""The kernel of a dispatch that brings rows to their places: its arguments, its results and its launches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.communicator import RowLayout
from ep_moe.comm.node_chunks import NodeChunks
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_handle import Places
from ep_moe.comm.nvlink_rows import OwnRows, RowSource
from ep_moe.comm.nvlink_wire import SHARED_BYTES, Ring
from ep_moe.comm.sm_budget import dispatch_sms

_MAX_WARPS, _MAX_STAGES = 8, 3  # of dispatch.cu
_SMS_THAT_STORE_IN_TIME = 48  # an expert-major result between two ranks as fast as the link brings it
_SMS_THAT_QUANTIZE = 48  # own rows besides


@functools.cache
def dispatch_ring(sms: int, row_bytes: int) -> Ring:
    """The ring of each of ``sms`` blocks, for rows of ``row_bytes`` in shared memory.

    Of the stages of a warp one is being stored, the others are loaded; on few SMs, which store for longer than the link
    brings rows, more of them wait in line.
    """
    room = SHARED_BYTES // row_bytes
    warps = max(min(room // 2, _MAX_WARPS), 1)
    return Ring(warps, min(room // warps, 2 if sms >= _SMS_THAT_STORE_IN_TIME else _MAX_STAGES))


def dispatch_quantizes(sms: int, layout: RowLayout) -> bool:
    """Whether a dispatch on ``sms`` quantises this rank's own rows, instead of having them sent.

    That takes more work and less memory traffic, for which an expert-major result waits and one of rows does not.
    """
    return layout == "expert_major" and sms >= _SMS_THAT_QUANTIZE


class SentRows(NamedTuple):
    """Rows on their way to the ranks that want them, for a dispatch that brings them to their places.

    Attributes:
        source: of this rank's; alive until that dispatch has been launched.
        layout: of the result.
        own: this rank's own rows, if they are not on their way.
        sms: that dispatch occupies.
        early: they are sent beside the layout kernel.
    """

    source: RowSource
    layout: RowLayout
    own: OwnRows | None
    sms: int
    early: bool


def send_rows(
    core: NvlinkCore, source: RowSource, places: Places, layout: RowLayout, num_sms: int | None, *, early: bool
) -> SentRows:
    """Send rows for a dispatch; the layout kernel must be the last work of the stream if they are ``early``.

    Args:
        core: of the communicator that dispatches.
        source: of the rows.
        places: where they will go.
        layout: of the result.
        num_sms: SMs that dispatch may occupy, of which it leaves some to sending; ``None`` for as many as are best.
        early: beside the layout kernel.
    """
    sms = num_sms or dispatch_sms(core.size, places.experts, places.top_k, layout)
    sending = source.send(core, early=early, quantizes=dispatch_quantizes(sms, layout))
    # On a small part of a GPU dispatch had better wait.
    most = max(core.multiprocessors - sending.sms, -(-core.multiprocessors // 2))
    return SentRows(source, layout, sending.own, min(sms, most), early)


class RowDispatch:
    """A dispatch whose rows are sent; made before the host waits for sizes, so that little is left to do then."""

    def __init__(self, core: NvlinkCore, sent: SentRows, places: Places, groups: int, nodes: NodeChunks | None) -> None:
        """Prepare.

        Args:
            core: of the communicator that dispatches.
            sent: by the last work of the stream.
            places: where rows go.
            groups: of experts, one for each launch.
            nodes: that tokens come from; ``None`` if they are this rank's own.
        """
        own, wire, (slots, width) = sent.own, sent.source.wire, places.in_layout(sent.layout)
        self._core, self._source, self._places = core, sent.source, places
        self._ranges = places.ranges(sent.layout, groups)
        comm = core.arguments(sent.sms)
        stage_bytes = wire.bytes if own is None else max(wire.bytes, own.stage_bytes)
        ring = dispatch_ring(comm.blocks, stage_bytes)
        self._arguments = native.DispatchArgs(
            comm=comm,
            slots=slots,
            counts=places.counts,
            ends=places.ends,
            own_rows=None if own is None else own.address,
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=wire.scales,
            own_row_bytes=0 if own is None else own.row_bytes,
            quantize=int(own is not None and own.element is not None),
            element=(own and own.element) or 0,
            slot_tokens=places.slot_tokens,
            width=width,
            warps=ring.warps,
            stages=ring.stages,
            stage_bytes=stage_bytes,
            behind_push=1,
            early=int(sent.early),
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
