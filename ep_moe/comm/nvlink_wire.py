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
        return -(-(self.row_bytes + 4 * self.scales) // 128) * 128


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
        return WireFormat(hidden, hidden // BLOCK)
    row_bytes = hidden * x.element_size()
    if row_bytes % 16 or not row_bytes:
        raise ValueError(
            f"x: expected rows of a multiple of 16 bytes, got {row_bytes} (hidden {hidden}, {x.dtype}); {_OTHERWISE}"
        )
    if 2 * row_bytes > SHARED_BYTES:
        raise ValueError(f"x: expected rows of at most {SHARED_BYTES // 2} bytes, got {row_bytes}; {_OTHERWISE}")
    return WireFormat(row_bytes, 0)
