"""Rows that a dispatch moves, and how they get to where peers pull them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.nvlink_core import NvlinkCore
from ep_moe.comm.nvlink_wire import ELEMENTS, MOVED, WireFormat, wire_format
from ep_moe.native import pointer


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

    def stage(self, core: NvlinkCore, *, early: bool) -> None:
        """Launch the kernel that puts rows where peers pull them in the next dispatch.

        Args:
            core: of the communicator that dispatches.
            early: beside the layout kernel, which must be the last work of the stream.
        """
        ...


class LocalRows:
    """A :class:`RowSource` of this rank's own tokens."""

    def __init__(self, x: Tensor, scales: Tensor | None = None, *, fp8: bool = False) -> None:
        """Check and hold the rows; arguments as of a dispatch.

        Raises:
            ValueError: if kernels cannot move such rows.
        """
        self.wire = wire_format(x, MOVED, scaled=fp8 or scales is not None)
        self.dtype = torch.float8_e4m3fn if self.wire.scales else x.dtype
        self.hidden = x.shape[1]
        self._x = x.contiguous()
        self._scales = None if scales is None else scales.contiguous()

    def stage(self, core: NvlinkCore, *, early: bool) -> None:
        """See :meth:`RowSource.stage`."""
        x, scales, wire = self._x, self._scales, self.wire
        arguments = native.StageArgs(
            comm=core.arguments(1),
            x=x.data_ptr(),
            scales=pointer(scales),
            wire_bytes=wire.bytes,
            row_bytes=wire.row_bytes,
            row_scales=0 if scales is None else wire.scales,
            tokens=min(x.shape[0], core.max_tokens),  # more are found out by the layout kernel
            hidden=x.shape[1],
            element=ELEMENTS.get(x.dtype, 0),
            quantize=int(wire.scales > 0 and scales is None),
            early=int(early),
        )
        core.launch("stage", arguments)
