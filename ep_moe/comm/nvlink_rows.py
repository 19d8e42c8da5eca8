"""Rows that a dispatch moves, and how they get to the ranks that want them."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_wire import ELEMENTS, MOVED, SHARED_BYTES, Ring, WireFormat, aligned, wire_format
from ep_moe.comm.sm_budget import push_sms
from ep_moe.native import pointer

_MAX_WARPS, _MAX_STAGES = 7, 2  # of push.cu


@functools.cache
def push_ring(stage_bytes: int) -> Ring:
    """The ring of a block that pushes, for rows that take ``stage_bytes`` of shared memory."""
    room = SHARED_BYTES // stage_bytes
    warps = max(min(room // 2, _MAX_WARPS), 1)
    return Ring(warps, min(room // warps, _MAX_STAGES))


class OwnRows(NamedTuple):
    """This rank's own rows, where a dispatch takes them from where they are.

    Attributes:
        address: of ``[tokens]`` rows.
        row_bytes: of each.
        stage_bytes: of shared memory that one needs.
        element: of those that dispatch quantises; ``None`` if they are as they travel.
    """

    address: int
    row_bytes: int
    stage_bytes: int
    element: int | None


class Sending(NamedTuple):
    """What a dispatch must know of rows that are sent for it.

    Attributes:
        own: this rank's own rows, unless they are sent too.
        sms: that dispatch must leave to the kernel that sends.
    """

    own: OwnRows | None
    sms: int


class RowSource(Protocol):
    """Rows for one dispatch; alive until that has been launched, for it reads them beside its other kernels."""

    @property
    def hidden(self) -> int:
        """Their width."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """In which they travel."""
        ...

    @property
    def wire(self) -> WireFormat:
        """How they travel."""
        ...

    def send(self, core: NvlinkCore, *, early: bool, quantizes: bool) -> Sending:
        """Launch the kernel that puts rows where the next dispatch of their ranks takes them.

        Args:
            core: of the communicator that dispatches.
            early: beside the layout kernel, which must be the last work of the stream.
            quantizes: whether that dispatch quantises this rank's own rows, if that is to do.
        """
        ...


class LocalRows:
    """A :class:`RowSource` of this rank's own tokens, which go to the ranks of their experts."""

    def __init__(
        self, x: Tensor, topk_idx: Tensor, num_experts: int, scales: Tensor | None = None, *, fp8: bool = False
    ) -> None:
        """Check and hold the rows; arguments as of a dispatch, ``topk_idx`` contiguous.

        Raises:
            ValueError: if kernels cannot move such rows.
        """
        self.wire = wire_format(x, MOVED, scaled=fp8 or scales is not None)
        self.dtype = torch.float8_e4m3fn if self.wire.scales else x.dtype
        self.hidden = x.shape[1]
        self._x, self._topk_idx, self._num_experts = aligned(x), topk_idx, num_experts
        self._scales = None if scales is None else scales.contiguous()

    def send(self, core: NvlinkCore, *, early: bool, quantizes: bool) -> Sending:
        """See :meth:`RowSource.send`."""
        x, scales, wire, top_k = self._x, self._scales, self.wire, self._topk_idx.shape[1]
        x_row_bytes, quantize = x.shape[1] * x.element_size(), wire.scales > 0 and scales is None
        stage_bytes = wire.stage_bytes(x_row_bytes)
        own = None
        if not wire.scales:
            own = OwnRows(x.data_ptr(), x_row_bytes, wire.bytes, None)
        elif quantize and quantizes and 2 * stage_bytes <= SHARED_BYTES:
            own = OwnRows(x.data_ptr(), x_row_bytes, stage_bytes, ELEMENTS[x.dtype])
        ring = push_ring(stage_bytes)
        sms, tokens = 1, 0  # where nothing is to be sent
        if own is None or core.size > 1:
            sms = push_sms(core.size, self._num_experts // core.size, top_k, own=own is None, quantize=quantize)
            tokens = min(x.shape[0], core.max_tokens)  # more are found out by the layout kernel
        arguments = native.PushArgs(
            comm=core.arguments(sms),
            x=x.data_ptr(),
            scales=pointer(scales),
            topk_idx=self._topk_idx.data_ptr(),
            x_row_bytes=x_row_bytes,
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=wire.scales,
            tokens=tokens,
            top_k=top_k,
            num_experts=self._num_experts,
            element=ELEMENTS.get(x.dtype, 0),
            quantize=int(quantize),
            own=int(own is None),
            warps=ring.warps,
            stages=ring.stages,
            stage_bytes=stage_bytes,
            early=int(early),
        )
        core.launch("push", arguments)
        return Sending(own, sms)
