"""How a row travels between GPUs, and which rows can."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm.fp8 import BLOCK, check_blocks
from ep_moe.comm.nvlink_args import BFLOAT16, FLOAT16, FLOAT32

# Rows that kernels compute with, and those that they move.
ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
MOVED = (*ELEMENTS, torch.float8_e4m3fn)
SHARED_BYTES = 208 * 1024  # of a block's dynamic shared memory that dispatch may use for rows

_OTHERWISE = "moe.comm: portable takes such rows"


@dataclass(frozen=True)
class WireFormat:
    """A row as it travels: its values, then its scales."""

    row_bytes: int
    scales: int

    @property
    def bytes(self) -> int:
        """From row to row: whole lines of the caches, for copies that begin within one take longer."""
        return self.stage_bytes(self.row_bytes)

    def stage_bytes(self, x_row_bytes: int) -> int:
        """Shared memory for a row of ``x_row_bytes`` and its scales behind it, in whole lines."""
        return -(-(x_row_bytes + 4 * self.scales) // 128) * 128


def aligned(x: Tensor) -> Tensor:
    """``x`` as bulk copies read it, its rows behind each other from a multiple of 16 bytes on; else a copy of it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@dataclass(frozen=True)
class Ring:
    """Where a block of a kernel keeps rows in shared memory.

    Attributes:
        warps: of the block, each of which moves other rows.
        stages: rows that a warp has room for.
    """

    warps: int
    stages: int


def wire_format(x: Tensor, dtypes: Collection[torch.dtype], *, scaled: bool) -> WireFormat:
    """The format of rows of ``x`` (``[rows, hidden]``), of one of ``dtypes``; ``scaled``: e4m3 with scales.

    Raises:
        ValueError: if kernels cannot move such rows.
    """
    if not x.is_cuda:
        raise ValueError(f"x: expected a CUDA tensor, got one on {x.device}")
    if x.dtype not in dtypes:
        raise ValueError(f"x: expected one of {', '.join(map(str, dtypes))}, got {x.dtype}; {_OTHERWISE}")
    hidden = x.shape[1]
    if scaled:
        check_blocks(hidden)
        format = WireFormat(hidden, hidden // BLOCK)
    else:
        format = WireFormat(hidden * x.element_size(), 0)
    if format.row_bytes % 16 or not format.row_bytes:
        raise ValueError(
            f"x: expected rows of a multiple of 16 bytes, got {format.row_bytes} (hidden {hidden}, {x.dtype}); "
            f"{_OTHERWISE}"
        )
    needed = max(2 * format.bytes, format.stage_bytes(hidden * x.element_size()))
    if needed > SHARED_BYTES:
        raise ValueError(
            f"x: expected rows of which {SHARED_BYTES} bytes hold two as they travel and one as it is, got hidden "
            f"{hidden} of {x.dtype}, for which that takes {needed}; {_OTHERWISE}"
        )
    return format
