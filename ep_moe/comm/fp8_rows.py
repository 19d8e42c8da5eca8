"""Rows that arrive in FP8: kept as they are, or brought back to the dtype of the tokens."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_moe.comm.fp8 import BLOCK, dequantize_e4m3
from ep_moe.comm.nvlink_wire import ELEMENTS
from ep_moe.native import find_entry_points, has_code_for, launch, pointer

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class QuantizedRows:
    """Rows in FP8, for who multiplies them as they are.

    Attributes:
        values: e4m3 ``[rows, hidden]``; packed ones ``[local_experts, room, hidden]``, and so the others.
        scales: fp32 ``[rows, hidden / 128]``.
        stand_in: ``[rows, hidden]`` in the dtype of the tokens, one element long: the rows to autograd, whose gradient
            is theirs. It has no values.
    """

    values: Tensor
    scales: Tensor
    stand_in: Tensor


class DequantizeRowsArgs(ctypes.Structure):
    """``DequantizeRowsArgs`` of ``dequantize.cu``, which says what each field means."""

    _fields_ = (
        ("values", c_void_p),
        ("scales", c_void_p),
        ("out", c_void_p),
        ("num_rows", c_void_p),
        ("rows", c_int64),
        ("row_stride", c_int64),
        ("block_stride", c_int64),
        ("width", c_int32),
        ("element", c_int32),
    )


def dequantize_rows(values: Tensor, scales: Tensor, dtype: torch.dtype, row_count: Tensor | None = None) -> Tensor:
    """As :func:`~ep_moe.comm.fp8.dequantize_e4m3`, with the same bits, in one kernel where it fits.

    Args:
        values: e4m3 ``[rows, hidden]``.
        scales: fp32 ``[rows, hidden / 128]``, of any strides.
        dtype: of the result.
        row_count: int32, one element, on the device of ``values``: how many of the rows are real, if not all.

    Returns:
        ``[rows, hidden]``; unspecified in rows from ``row_count`` on.
    """
    if not _usable(values, dtype):
        return dequantize_e4m3(values, scales, dtype)
    library = _find_library()
    assert library is not None  # _usable() has seen to it
    out = torch.empty_like(values, dtype=dtype)
    arguments = DequantizeRowsArgs(
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        out=out.data_ptr(),
        num_rows=pointer(row_count),
        rows=values.shape[0],
        row_stride=scales.stride(0),
        block_stride=scales.stride(1),
        width=values.shape[1],
        element=ELEMENTS[dtype],
    )
    launch(library, "dequantize_rows", arguments, values.device)
    return out


def _usable(values: Tensor, dtype: torch.dtype) -> bool:
    return (
        values.is_cuda
        and dtype in ELEMENTS
        and values.shape[1] % BLOCK == 0
        and values.is_contiguous()
        and values.data_ptr() % _ALIGNMENT_BYTES == 0
        and has_code_for(values.get_device())
        and _find_library() is not None
    )


@functools.cache
def _find_library() -> ctypes.CDLL | None:
    """The CUDA library with the signature of the kernel declared, or ``None`` where there is none."""
    return find_entry_points({"dequantize_rows": DequantizeRowsArgs}, "rows are dequantised without their CUDA kernel")
