"""Sums that another kernel takes on while combine makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm import nvlink_args as native
from ep_moe.comm.nvlink_core import NvlinkCore

_MOST_EPOCHS = 2**31 - 1


@dataclass(frozen=True)
class Summed:
    """The sums of a running combine.

    Attributes:
        out: ``[tokens, hidden]``.
        flags: int32, one for 8 tokens: ``epoch`` once their sums are in ``out``.
        epoch: of this combine, never 0.
    """

    out: Tensor
    flags: Tensor
    epoch: int


class SumFlags:
    """The flags of one communicator, which all its combines use in turn."""

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._epoch = 0

    def next(self, core: NvlinkCore, out: Tensor) -> Summed:
        """Those of the next combine, into ``out``; made anew where the buffer of ``core`` has grown."""
        count = core.max_tokens // native.COMBINE_GROUP
        if self._flags is None or self._flags.shape[0] != count:
            self._flags = torch.zeros(count, dtype=torch.int32, device=core.device)
        self._epoch = self._epoch % _MOST_EPOCHS + 1
        return Summed(out, self._flags, self._epoch)
