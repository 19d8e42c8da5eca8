"""Rows that leave in FP8: quantised by our kernel where there is one, otherwise by PyTorch, with equal bits."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from ep_moe.comm.fp8 import BLOCK, check_blocks, quantize_e4m3
from ep_moe.comm.nvlink_wire import ELEMENTS
from ep_moe.native import find_entry_points, has_code_for, launch

_ALIGNMENT_BYTES = 16


class RealRows(ctypes.Structure):
    """``RealRows`` of ``real_rows.cuh``, which says what each field means."""

    _fields_ = (("counts", c_void_p), ("rows", c_int64), ("room", c_int32))


class QuantizeRowsArgs(ctypes.Structure):
    """``QuantizeRowsArgs`` of ``quantize.cu``, which says what each field means."""

    _fields_ = (
        ("x", c_void_p),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("real", RealRows),
        ("row_stride", c_int64),
        ("block_stride", c_int64),
        ("width", c_int32),
        ("element", c_int32),
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`~ep_moe.comm.fp8.quantize_e4m3`, with the same bits, in one kernel where it fits."""
    rows, hidden = x.shape
    check_blocks(hidden)
    if not _usable(x):
        return quantize_e4m3(x)
    library = _find_library()
    assert library is not None  # _usable() has seen to it
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, hidden // BLOCK, dtype=torch.float32, device=x.device)
    arguments = QuantizeRowsArgs(
        x=x.data_ptr(),
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        real=RealRows(None, rows, 0),
        row_stride=scales.stride(0),
        block_stride=1,
        width=hidden,
        element=ELEMENTS[x.dtype],
    )
    launch(library, "quantize_rows", arguments, x.device)
    return values, scales


def _usable(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in ELEMENTS
        and x.is_contiguous()
        and x.data_ptr() % _ALIGNMENT_BYTES == 0
        and has_code_for(x.get_device())
        and _find_library() is not None
    )


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signature of the kernel declared, or ``None`` where there is none."""
    return find_entry_points({"quantize_rows": QuantizeRowsArgs}, "rows are quantised without their CUDA kernel")
